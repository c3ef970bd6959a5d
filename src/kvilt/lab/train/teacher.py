"""The teacher: the same model with full attention; its greedy answers, and its distributions at their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import DynamicCache

from kvilt.engine.encoder import batches
from kvilt.errors import TrainError
from kvilt.lab.train import checkpoint
from kvilt.lab.train.dense import Parts, Row, additive, collate, logits_of, row_of
from kvilt.lab.train.losses import TopK
from kvilt.model.model import Model
from kvilt.strategies.full import FullRecompute
from kvilt.types import cached, digest_of

FULL = FullRecompute()
PARTS = ("answer", "ids", "logp", "rest")


@dataclass(frozen=True, eq=False)
class Target:
    """What the teacher said to one prompt; its most likely tokens lie in a file."""

    answer: Tensor  # (tokens,) int64
    file: Path
    name: str

    def top(self) -> TopK:
        """The teacher's top k at every token of the answer."""
        kept, _ = checkpoint.read(self.file, [f"{self.name}.{part}" for part in PARTS[1:]])
        ids, logp, rest = kept.values()
        return TopK(ids.long(), logp, rest)


@dataclass(frozen=True)
class Teacher:
    """Answers each prompt once, and keeps what it said: another run, or a longer one, finds it."""

    model: Model
    folder: Path
    answer_tokens: int = 64  # longest answer
    top_k: int = 64  # tokens kept at each place
    own: bool = True  # answers are the teacher's own; else the data's
    _known: dict[str, Target] = field(default_factory=dict, repr=False)

    def targets(self, prompts: Sequence[Parts], on_progress: Callable[[int, int], None]) -> list[Target]:
        """One target for each prompt; `on_progress` hears (tokens done, tokens to do) of the prompts that are asked.

        Raises TrainError when the data has no answer where it should, or the model's logits are not numbers."""
        for file in self.folder.glob("*.safetensors"):
            self._note(file)
        left = {self._name(p): p for p in prompts if self._name(p) not in self._known}
        done, total = 0, sum(p.size for p in left.values())
        for batch in batches(left.values(), lambda p: p.size):
            on_progress(done, total)
            self._answer(batch)
            done += sum(p.size for p in batch)
        on_progress(total, total)
        return [self._known[self._name(p)] for p in prompts]

    @cached
    def _settings(self) -> str:
        return f"{self.model.digest} {self.model.shape.dtype} {self.answer_tokens} {self.top_k} {self.own}"

    def _name(self, prompt: Parts) -> str:
        """Content address of all that decides what the teacher says."""
        return digest_of(self._settings, prompt.digest)[:32]

    def _note(self, file: Path) -> None:
        with safe_open(str(file), "pt") as f:
            names = {key.partition(".")[0] for key in f.keys()}  # noqa: SIM118 (not a mapping)
            self._known.update({n: Target(f.get_tensor(f"{n}.answer").long(), file, n) for n in names})

    @torch.no_grad()
    def _answer(self, prompts: Sequence[Parts]) -> None:
        tensors: dict[str, Tensor] = {}
        said = self._own(prompts) if self.own else self._given(prompts)
        for prompt, (answer, top) in zip(prompts, said, strict=True):
            values = zip(PARTS, (answer, top.ids.int(), top.logp, top.rest), strict=True)
            tensors |= {f"{self._name(prompt)}.{part}": value for part, value in values}
        file = self.folder / f"{digest_of(*map(self._name, prompts))[:32]}.safetensors"
        checkpoint.write(file, tensors)
        self._note(file)

    def _own(self, prompts: Sequence[Parts]) -> list[tuple[Tensor, TopK]]:
        """Greedy answers, with the distributions that they were picked from."""
        steps: list[TopK] = []
        rows = [row_of(FULL, p, torch.empty(0, dtype=torch.long)) for p in prompts]
        keep = lambda logits: steps.append(self._top(logits))  # noqa: E731
        answers = generate(self.model, rows, self.answer_tokens, on_logits=keep)
        ids, logp, rest = (torch.stack([getattr(s, name) for s in steps], 1) for name in PARTS[1:])
        return [(a, TopK(ids[i, : len(a)], logp[i, : len(a)], rest[i, : len(a)])) for i, a in enumerate(answers)]

    def _given(self, prompts: Sequence[Parts]) -> list[tuple[Tensor, TopK]]:
        """The data's answers, with the distributions at their tokens."""
        answers = [p.answer[: self.answer_tokens] for p in prompts]
        logits = logits_of(self.model, collate([row_of(FULL, p, a) for p, a in zip(prompts, answers, strict=True)]))
        return [(a, self._top(logits[i, -len(a) :])) for i, a in enumerate(answers)]

    def _top(self, logits: Tensor) -> TopK:
        if not torch.isfinite(logits).all():
            raise TrainError("the teacher's logits are not finite: check the model's weights and dtype.")
        return TopK.of(logits, self.top_k).to(torch.device("cpu"))


@torch.no_grad()
def generate(
    model: Model, prompts: Sequence[Row], most: int, temperature: float = 0.0,
    generator: torch.Generator | None = None, on_logits: Callable[[Tensor], None] = lambda logits: None,
) -> list[Tensor]:  # fmt: skip
    """Decode prompts at once, each up to its end-of-text token (kept) or `most` tokens; greedy at temperature 0.

    `on_logits` gets the logits (prompts, vocab) of every step."""
    batch, stop = collate(prompts), _stops(model)
    device, cache = model.shape.device, DynamicCache()
    mask = additive(batch.mask.to(device), model.shape.dtype)
    # the last row sees all of its prompt
    position, seen = batch.positions[:, -1:].to(device), batch.mask[:, 0, -1].to(device)
    step: dict[str, Any] = {"inputs_embeds": model.embed(batch.tokens), "position_ids": batch.positions.to(device)}
    tokens: list[Tensor] = []
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    while len(tokens) < most and not done.all():
        out = model.hf(**step, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = out.logits[:, -1].float()
        on_logits(logits)
        tokens.append(_next(logits, temperature, generator))
        done |= torch.isin(tokens[-1], stop)
        position = position + 1
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
        mask = additive(seen[:, None, None], model.shape.dtype)
        step = {"input_ids": tokens[-1][:, None], "position_ids": position}
    return [_cut(row, stop) for row in torch.stack(tokens, 1)]


def _next(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    chances = (logits.cpu() / temperature).softmax(-1)
    return torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)


def _stops(model: Model) -> Tensor:
    ids = model.hf.generation_config.eos_token_id
    listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
    return torch.tensor(listed, dtype=torch.long, device=model.shape.device)


def _cut(tokens: Tensor, stop: Tensor) -> Tensor:
    ends = torch.isin(tokens, stop).nonzero()[:, 0]
    return tokens[: int(ends[0]) + 1].cpu() if len(ends) else tokens.cpu()

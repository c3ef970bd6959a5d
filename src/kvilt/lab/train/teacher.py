"""The teacher: the same model with full attention; its greedy answers, and its logits at their tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache

from kvilt.errors import TrainError
from kvilt.lab.train.dense import Parts, Row, additive, collate, logits_of, row_of
from kvilt.lab.train.losses import TopK
from kvilt.model.model import Model
from kvilt.strategies.full import FullRecompute
from kvilt.types import digest_of

BATCH_TOKENS = 16384  # padded prompt tokens of one teacher batch
FULL = FullRecompute()


@dataclass(frozen=True, eq=False)
class Target:
    """What the teacher said to one prompt; its top-k logits lie in a file."""

    answer: Tensor  # (tokens,) int64
    file: Path | None
    name: str

    def top(self) -> TopK:
        """The teacher's top k at every token of the answer."""
        assert self.file is not None
        with safe_open(str(self.file), "pt") as f:
            ids, logp, rest = (f.get_tensor(f"{self.name}.{part}") for part in ("ids", "logp", "rest"))
        return TopK(ids.long(), logp, rest)


@dataclass(frozen=True)
class Teacher:
    """Answers prompts once and keeps what it said, so that a second run finds it."""

    model: Model
    folder: Path
    answer_tokens: int = 64  # longest answer
    top_k: int = 64  # 0: keep no logits; they are computed again in every step
    own: bool = True  # answers are the teacher's own; else the data's

    def targets(self, prompts: Sequence[Parts], on_progress: Callable[[int, int], None] | None = None) -> list[Target]:
        """One target for each prompt. Raises TrainError when the data has no answer where it should."""
        found: dict[int, Target] = {}
        for batch in _batches(prompts):
            group = [prompts[i] for i in batch]
            found.update(zip(batch, self._group(group), strict=True))
            if on_progress:
                on_progress(len(found), len(prompts))
        return [found[i] for i in range(len(prompts))]

    def _group(self, group: Sequence[Parts]) -> list[Target]:
        file = self.folder / f"{self._name(group)}.safetensors"
        if not file.is_file():
            self._answer(group, file)
        with safe_open(str(file), "pt") as f:
            answers = [f.get_tensor(f"{i}.answer").long() for i in range(len(group))]
        return [Target(a, file if self.top_k else None, str(i)) for i, a in enumerate(answers)]

    def _name(self, group: Sequence[Parts]) -> str:
        """Content address of all that decides what the teacher says: a changed setting or sample makes a new file."""
        settings = f"{self.model.digest} {self.model.shape.dtype} {self.answer_tokens} {self.top_k} {self.own}"
        return digest_of(settings, *(p.digest for p in group))[:32]

    @torch.no_grad()
    def _answer(self, group: Sequence[Parts], file: Path) -> None:
        answers = self._own(group) if self.own else [_given(p, self.answer_tokens) for p in group]
        tensors = {f"{i}.answer": a for i, a in enumerate(answers)}
        if self.top_k:
            logits = logits_of(self.model, collate([row_of(FULL, p, a) for p, a in zip(group, answers, strict=True)]))
            if not torch.isfinite(logits).all():
                raise TrainError("the teacher's logits are not finite: check the model's weights and dtype.")
            for i, answer in enumerate(answers):
                top = TopK.of(logits[i, -len(answer) :].cpu(), self.top_k)
                tensors |= {f"{i}.ids": top.ids.int(), f"{i}.logp": top.logp, f"{i}.rest": top.rest}
        write_atomically(file, tensors)

    def _own(self, group: Sequence[Parts]) -> list[Tensor]:
        prompts = [row_of(FULL, p, torch.empty(0, dtype=torch.long)) for p in group]
        return generate(self.model, prompts, self.answer_tokens)


def _given(parts: Parts, most: int) -> Tensor:
    if not len(parts.answer):
        raise TrainError(f"{parts.sample.where}: no answer, but answers=data trains on the data's answers.")
    return parts.answer[:most]


def write_atomically(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that is whole or not there, even if the process is killed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, str(temporary), metadata)
    with temporary.open("rb+") as written:
        os.fsync(written.fileno())
    temporary.replace(file)


def _batches(prompts: Sequence[Parts]) -> Iterator[list[int]]:
    """Indices in groups of like length whose padded size stays under BATCH_TOKENS."""
    sizes = [len(p.system) + sum(map(len, p.documents)) + len(p.question) for p in prompts]
    group: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: (sizes[i], i)):
        if group and sizes[i] * (len(group) + 1) > BATCH_TOKENS:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


@torch.no_grad()
def generate(
    model: Model, prompts: Sequence[Row], most: int, temperature: float = 0.0, generator: torch.Generator | None = None
) -> list[Tensor]:
    """Decode prompts at once, each up to its end-of-text token (kept) or `most` tokens; greedy at temperature 0."""
    batch, stop = collate(prompts), _stops(model)
    device = model.shape.device
    cache = DynamicCache()
    mask = additive(batch.mask.to(device), model.shape.dtype)
    # the last row sees all of its prompt
    position, seen = batch.positions[:, -1:].to(device), batch.mask[:, 0, -1].to(device)
    step: dict[str, Any] = {"inputs_embeds": model.embed(batch.tokens), "position_ids": batch.positions.to(device)}
    tokens: list[Tensor] = []
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    while len(tokens) < most and not done.all():
        out = model.hf(**step, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens.append(_next(out.logits[:, -1].float(), temperature, generator))
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
    found = [] if ids is None else ids if isinstance(ids, list) else [ids]
    return torch.tensor(found, dtype=torch.long, device=model.shape.device)


def _cut(tokens: Tensor, stop: Tensor) -> Tensor:
    ends = torch.isin(tokens, stop).nonzero()[:, 0]
    return tokens[: int(ends[0]) + 1].cpu() if len(ends) else tokens.cpu()

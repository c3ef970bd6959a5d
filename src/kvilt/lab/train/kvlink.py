"""KVLink fine-tuning (arXiv 2502.16002, section 2.4): the whole model, or LoRA, under the mask that serves it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kvilt.engine.text import TextFormat
from kvilt.errors import TrainError
from kvilt.lab.train import checkpoint
from kvilt.lab.train.data import Pick, Sample, Source, check_samples, draw, held_apart, sources_of
from kvilt.lab.train.dense import merged, parts_of, row_of
from kvilt.lab.train.loop import Example, Loop, Report, Run, Settings
from kvilt.lab.train.packet import TRAINING
from kvilt.lab.train.tokens import link_tokens, start_links
from kvilt.lab.train.trained import LowRank, Trained, Weights
from kvilt.model.loading import MERGED, SHORT, choose_dtype, load_model
from kvilt.model.model import Model
from kvilt.rows import adapter
from kvilt.strategies.anchors import Anchors
from kvilt.strategies.kvlink import DESCRIPTION, KVLink, LinkTokens

LINKS = "links.safetensors"  # rows of the link tokens, beside an adapter
LONGEST = 4096  # tokens of a sample where max_tokens does not say


@dataclass(frozen=True)
class KVLinkConfig(Settings):
    """Settings of KVLink fine-tuning; defaults are those of the paper's code."""

    links: int = 5  # link tokens per document; 0: block fine-tuning
    slots: int = 40  # documents that have link tokens of their own
    markers: bool = True  # tokens that open and close the documents
    init: tuple[str, ...] = ()  # words from whose embeddings a slot's link tokens start; none: drawn like the others
    anchors: int = 0  # anchor tokens after every chunk, whose rows alone are kept of a document; 0: none, all rows
    chunk: int = 100  # tokens of a chunk
    lora: int = 0  # rank of LoRA; 0 trains all weights
    save: str = "checkpoint"  # or "adapter": LoRA and link tokens beside the model, which is left as it is
    max_tokens: int = 0  # longest sample; 0: 4,096, or what the context holds if that is less
    answer_tokens: int = 1024  # longest answer learned; plain text is cut at max_tokens
    fewest: int = 0  # documents of a draw at least, where the data names gold ones; 0: always all
    systems: tuple[str, ...] = ()  # system texts, one of which each sample gets; none: the serving default
    dtype: str = "auto"  # of the passes: bfloat16 where it is faster, else float32; weights stay float32
    lr: float = 5e-6
    schedule: str = "cosine"
    warmup: float = 0.1
    steps: int = 6000
    micro_batch: int = 4
    evaluate_every: int = 200
    held_out: float = 0.05
    held_out_limit: int = 256
    seed: int = 42

    def wrong(self) -> dict[str, bool]:
        """What may be wrong, and whether it is."""
        return {
            **super().wrong(),
            "links, slots": self.links < 0 or self.slots < 1,
            "anchors, chunk": self.anchors < 0 or self.chunk < 1,
            "save": self.save not in ("checkpoint", "adapter"),
            "save=adapter without lora, or with anchors": self.save == "adapter"
            and (not self.lora or self.anchors > 0),
            "lora, fewest, max_tokens": min(self.lora, self.fewest, self.max_tokens) < 0,
            "answer_tokens": self.answer_tokens < 1,
            "dtype": SHORT.get(self.dtype, self.dtype) not in ("auto", "float32", "bfloat16"),
        }


@dataclass(frozen=True, eq=False)
class Examples:
    """Samples made into masked passes when they are needed."""

    sources: tuple[Source, ...]
    strategy: KVLink
    formats: tuple[TextFormat, ...]
    config: KVLinkConfig
    longest: int

    def __call__(self, pick: Pick) -> Example:
        """One sample with all its questions. Raises TrainError when it is longer than `longest`."""
        c, text = self.config, self.formats[(pick.index + pick.view) % len(self.formats)]
        sample = self.sources[pick.source].samples[pick.index]
        cut = self.longest if sample.plain else c.answer_tokens
        each = (parts_of(text, one) for one in draw(sample, pick.view, c.seed, c.fewest).each)
        row = merged([row_of(self.strategy, parts, parts.answer[:cut]) for parts in each])
        if len(row.tokens) > self.longest:
            raise TrainError(f"{sample.where}: {len(row.tokens)} tokens with its answer, max_tokens is {self.longest}.")
        return Example(row)

    def size(self, pick: Pick) -> int:
        """Characters of a sample."""
        sample = self.sources[pick.source].samples[pick.index]
        asked = sum(len(f.question) + len(f.answer) for f in sample.further)
        return sum(len(d.text) for d in sample.documents) + sum(map(len, sample.answers[:1])) + asked

    def check(self) -> None:
        """The longest samples, and those with the most documents, must fit before anything is trained."""
        every = [Pick(k, i, 0) for k, s in enumerate(self.sources) for i, one in enumerate(s.samples) if not one.plain]
        most = sorted(every, key=lambda p: len(self.sources[p.source].samples[p.index].documents))[-8:]
        for pick in dict.fromkeys((*sorted(every, key=self.size)[-32:], *most)):
            self(pick)


def train_kvlink(
    model: str, samples: Sequence[Sample] | Sequence[Source], config: KVLinkConfig, out: str | Path,
    held_out: Sequence[Sample] | None = None, on_progress: Report = lambda _: None, device: str = "auto",
) -> Path:  # fmt: skip
    """Fine-tune a checkpoint (folder or hub name); OUT gets the best held-out step and its kvlink.json.

    Runs on one CPU, one GPU, or many under `accelerate launch` or torchrun. Run again with the same arguments, it goes
    on from its last checkpoint, with more `steps` also beyond its end. Raises TrainError for bad data or settings before
    anything is trained."""
    out, sources, c = Path(out), sources_of(samples), config
    c.check()
    check_samples([*(s for source in sources for s in source.samples), *(held_out or ())], True, standard=True)
    sources, tests = held_apart(sources, held_out, c.held_out, c.held_out_limit, c.seed)
    every = (*sources, tests)
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    loaded, tokenizer = load_model(model, "float32", device)
    tokens = _tokens(loaded.hf, tokenizer, c)
    examples = _examples(loaded, tokenizer, tokens, every, c)
    examples.check()
    checkpoint.claim(out / TRAINING, c, loaded.digest, *(s.digest for source in every for s in source.samples))
    kind, _ = choose_dtype(c.dtype, torch.bfloat16, loaded.shape.device)
    half, ids = None if kind == torch.float32 else kind, sorted(tokens.every)
    trained = LowRank(loaded, c.lora, ids, half=half, seed=c.seed) if c.lora else Weights(loaded, half)
    Loop(Run(c, trained, every, 1 << 30, examples, examples.size, out / TRAINING, on_progress)).train()
    if os.environ.get("RANK", "0") == "0":
        _write(trained, tokenizer, tokens, out, model if c.save == "adapter" else "")
    return out


def _tokens(hf: Any, tokenizer: Any, c: KVLinkConfig) -> LinkTokens:
    reserved = TextFormat.of(tokenizer).reserved()
    tokens = link_tokens(hf, tokenizer, reserved, c.links, c.slots, c.anchors, c.chunk)
    tokens = tokens if c.markers else replace(tokens, start=(), end=())
    start_links(hf, tokenizer, tokens, c.init)
    return tokens


def _examples(
    model: Model, tokenizer: Any, tokens: LinkTokens, sources: tuple[Source, ...], c: KVLinkConfig
) -> Examples:
    strategy = Anchors(c.links).holding(tokens) if c.anchors else KVLink(c.links, tokens=tokens)
    longest = c.max_tokens or min(LONGEST, model.context_length)
    if longest > model.context_length:
        raise TrainError(f"max_tokens={longest} is more than the model's context holds ({model.context_length}).")
    formats = tuple(TextFormat.of(tokenizer, system) for system in (c.systems or (None,)))
    return Examples(sources, strategy, formats, c, longest)


def _write(trained: Trained, tokenizer: Any, tokens: LinkTokens, out: Path, base: str) -> None:
    """The checkpoint of the best step, as every model folder; or what was learned beside its `base`, by name."""
    if isinstance(trained, LowRank) and base:
        base = str(Path(base).resolve()) if Path(base).exists() else base
        adapter.save(replace(trained.adapter(), model=""), out / MERGED, base=base)
        save_file({"vectors": trained.parameters["rows"].detach().cpu().half()}, str(out / LINKS))
        (out / DESCRIPTION).write_text(tokens.renamed({i: -1 - n for n, i in enumerate(trained.ids)}, LINKS).to_json())
        return
    if isinstance(trained, LowRank):
        trained.merge()
    trained.model.hf.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    (out / DESCRIPTION).write_text(tokens.to_json())

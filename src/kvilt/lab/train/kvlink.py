"""KVLink fine-tuning (arXiv 2502.16002, section 2.4): the whole model, or LoRA, under the mask that serves it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import set_seed

from kvilt.engine.text import TextFormat
from kvilt.errors import MissingExtra, ModelError, TrainError
from kvilt.lab.train.data import Pick, Sample, Source, check_disjoint, draw, schedule, sources_of, split_held_out
from kvilt.lab.train.dense import Row, merged, parts_of, row_of
from kvilt.lab.train.hf import Settings, run
from kvilt.lab.train.job import Report
from kvilt.lab.train.tokens import link_tokens, start_links
from kvilt.model import attention, fit
from kvilt.model.loading import folder
from kvilt.strategies.anchors import Anchors
from kvilt.strategies.kvlink import KVLink, LinkTokens
from kvilt.types import digest_of

RUN = "run.json"  # what a folder's run is


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
    max_tokens: int = 4096  # longest sample
    answer_tokens: int = 1024  # longest answer learned; plain text is cut at max_tokens
    fewest: int = 0  # documents of a draw at least, where the data names gold ones; 0: always all
    systems: tuple[str, ...] = ()  # system texts, one of which each sample gets; none: the serving default
    held_out: float = 0.05  # share of the samples put aside when no held-out samples are given
    held_out_limit: int = 256


@dataclass(frozen=True, eq=False)
class Rows(Dataset[Row]):
    """Samples in the order of their use, made into masked passes when they are needed."""

    sources: tuple[Source, ...]
    picks: Sequence[Pick]
    strategy: KVLink
    formats: tuple[TextFormat, ...]
    config: KVLinkConfig

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, index: int) -> Row:
        pick, c = self.picks[index], self.config
        return self.row(draw(self.sources[pick.source].samples[pick.index], pick.view, c.seed, c.fewest), index)

    def row(self, sample: Sample, number: int) -> Row:
        """One sample with all its questions. Raises TrainError when it is longer than `max_tokens`."""
        c, text = self.config, self.formats[number % len(self.formats)]
        longest = c.max_tokens if sample.plain else c.answer_tokens
        each = (parts_of(text, one) for one in sample.each)
        row = merged([row_of(self.strategy, parts, parts.answer[:longest]) for parts in each])
        if len(row.tokens) > c.max_tokens:
            raise TrainError(f"{sample.where}: {len(row.tokens)} tokens with its answer, max_tokens is {c.max_tokens}.")
        return row


def train_kvlink(
    model: str,
    samples: Sequence[Sample] | Sequence[Source],
    config: KVLinkConfig,
    out: str | Path,
    held_out: Sequence[Sample] | None = None,
    on_progress: Report = lambda _: None,
) -> Path:
    """Fine-tune a checkpoint (folder or hub name); OUT gets the best held-out step and its kvlink.json.

    Runs on one CPU, one GPU, or many under `accelerate launch` or torchrun. Run again with the same arguments, it goes
    on from its last checkpoint. Raises TrainError for bad data or settings before anything is trained."""
    out, sources = Path(out), sources_of(samples)
    _check(config)
    _check_samples([*(s for source in sources for s in source.samples), *(held_out or ())])
    if held_out is None:
        sources, held_out = split_held_out(sources, config.held_out, config.seed)
    check_disjoint(sources, held_out)
    hf, tokenizer = _load(model)
    c, reserved = config, TextFormat.of(tokenizer).reserved()
    tokens = link_tokens(hf, tokenizer, reserved, c.links, c.slots, c.anchors, c.chunk)
    tokens = tokens if c.markers else replace(tokens, start=(), end=())
    start_links(hf, tokenizer, tokens, c.init)
    strategy = Anchors(c.links).holding(tokens) if c.anchors else KVLink(c.links, tokens=tokens)
    rows = _rows(strategy, tokenizer, sources, config)
    tests = _tests(rows, held_out)
    _check_lengths(rows, (*sources, *tests.sources), hf.config.max_position_embeddings)
    _claim(out, model, config, sources)
    set_seed(config.seed)  # LoRA's matrices are drawn
    run(_adapted(hf, config, tokens), tokenizer, rows, tests, config, tokens, out, on_progress)
    return out


def _check(c: KVLinkConfig) -> None:
    c.check()
    wrong = {
        "links, slots": c.links < 0 or c.slots < 1,
        "anchors, chunk": c.anchors < 0 or c.chunk < 1,
        "lora, fewest": min(c.lora, c.fewest) < 0,
        "max_tokens, answer_tokens, held_out_limit": min(c.max_tokens, c.answer_tokens, c.held_out_limit) < 1,
    }
    found = [name for name, bad in wrong.items() if bad]
    if found:
        raise TrainError(f"bad setting: {found[0]} in {c}.")


def _check_samples(samples: Sequence[Sample]) -> None:
    for s in samples:
        if not s.answers:
            raise TrainError(f'{s.where}: no answer: KVLink learns from answers; add "answers": [...].')
        if s.reuse and not s.documents:
            raise TrainError(f"{s.where}: no documents to reuse.")


def _load(model: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        hf = AutoModelForCausalLM.from_pretrained(folder(model), dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder(model))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load model {model!r}: {error}") from error
    fit.check_config(hf.config)
    attention.install(hf)
    return hf, tokenizer


def _rows(strategy: KVLink, tokenizer: Any, sources: tuple[Source, ...], c: KVLinkConfig) -> Rows:
    """The schedule; inside a step samples of like length stand together, so that little is padded."""
    formats = tuple(TextFormat.of(tokenizer, system) for system in (c.systems or (None,)))
    picks = schedule(sources, c.steps * c.batch, 1 << 30, c.seed)
    steps = [picks[i : i + c.batch] for i in range(0, len(picks), c.batch)]
    ordered = [p for step in steps for p in sorted(step, key=lambda p: _characters(sources[p.source].samples[p.index]))]
    return Rows(sources, ordered, strategy, formats, c)


def _tests(rows: Rows, held_out: Sequence[Sample]) -> Rows:
    if not held_out:
        raise TrainError("the held-out split is empty: early stopping needs some samples that are not trained on.")
    few = tuple(held_out[:: max(1, -(-len(held_out) // rows.config.held_out_limit))])
    picks = sorted((Pick(0, i, 0) for i in range(len(few))), key=lambda p: _characters(few[p.index]))
    return Rows((Source(few, name="held-out"),), picks, rows.strategy, rows.formats, rows.config)


def _characters(sample: Sample) -> int:
    asked = sum(len(f.question) + len(f.answer) for f in sample.further)
    return sum(len(d.text) for d in sample.documents) + sum(map(len, sample.answers[:1])) + asked


def _check_lengths(rows: Rows, sources: Sequence[Source], context: int) -> None:
    """The longest samples, and those with the most documents, must fit before anything is trained."""
    c = rows.config
    if c.max_tokens > context:
        raise TrainError(f"max_tokens={c.max_tokens} is more than the model's context holds ({context}).")
    every = [s for source in sources for s in source.samples if not s.plain]
    for i in {
        *sorted(range(len(every)), key=lambda i: _characters(every[i]))[-32:],
        *sorted(range(len(every)), key=lambda i: len(every[i].documents))[-8:],
    }:
        rows.row(every[i], 0)


def _claim(out: Path, model: str, c: KVLinkConfig, sources: Sequence[Source]) -> None:
    """Note what this folder's run is. Raises TrainError when it holds another run."""
    made = digest_of(json.dumps(asdict(c)), model, *(s.digest for source in sources for s in source.samples))
    out.mkdir(parents=True, exist_ok=True)
    note = out / RUN
    if note.is_file() and json.loads(note.read_text()).get("digest") != made:
        raise TrainError(f"{out} belongs to a run with another model, data or settings. Choose another folder.")
    if os.environ.get("RANK", "0") == "0":
        temporary = note.with_suffix(".part")
        temporary.write_text(json.dumps({"digest": made, "model": model, "config": asdict(c)}, indent=1))
        temporary.replace(note)


def _adapted(hf: Any, c: KVLinkConfig, tokens: LinkTokens) -> Any:
    if not c.lora:
        return hf
    try:
        import peft
    except ImportError:
        raise MissingExtra("peft", "train") from None
    settings = peft.LoraConfig(
        r=c.lora,
        lora_alpha=2 * c.lora,
        target_modules="all-linear",
        trainable_token_indices=sorted(tokens.every) or None,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(hf, settings)

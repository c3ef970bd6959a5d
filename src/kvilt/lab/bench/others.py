"""Decoding, encoding, memory and compression, each against plain transformers or plain rows in the same run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvilt.engine.engine import Engine
from kvilt.lab.bench.subject import DOCUMENT_TOKENS, Subject
from kvilt.lab.bench.timing import seconds, summary, take_turns
from kvilt.lab.bench.ttft import setting
from kvilt.model import attention
from kvilt.model.decoding import Settings, generate
from kvilt.model.model import Model
from kvilt.plan import Plan
from kvilt.rows.rows import whole
from kvilt.stores.disk import DiskStore
from kvilt.strategies.block import BlockAttention
from kvilt.types import Document, DocumentCache, Encoding


def decoding(subject: Subject, folder: Path, documents: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens per second after reuse, and of transformers' `generate` with a DynamicCache of the same length.

    APE, whose attention has two parts at every step, is measured beside."""
    model, made = subject.model, setting(subject, ["block", "ape"], folder, documents)
    plans = {name: made.engines[name].plan(made.question, made.documents) for name in ("block", "ape")}
    prompt, exactly = torch.cat([s.tokens for s in plans["block"].segments]), {"min_new_tokens": tokens}

    def ours(name: str) -> float:
        with model.run(plans[name], tokens) as run:
            return seconds(lambda: generate(run, prompt, tokens, Settings.of(model.hf, exactly)))

    def plain() -> float:
        cache, ids = _dynamic(model, len(prompt) - 1), prompt[None].clamp(min=0).to(model.shape.device)
        options = {**exactly, "max_new_tokens": tokens, "do_sample": False, "past_key_values": cache}
        with _attention(model, "sdpa"):
            return seconds(lambda: model.hf.generate(ids, **options))

    with closing(made.store):
        works: dict[str, Callable[[], float]] = {"kvilt": partial(ours, "block"), "transformers": plain}
        works["ape"] = partial(ours, "ape")
        return {"context": len(prompt), "tokens": tokens, **_rates(works, tokens - 1, repeats)}


def _rates(works: dict[str, Callable[[], float]], tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens per second of all, taking turns; the first round warms up."""
    times = take_turns(works, repeats + 1)
    rates = {name: summary([tokens / s for s in values[1:]]) for name, values in times.items()}
    return {"tokens_per_s": rates, "ratio": rates["kvilt"]["median"] / rates["transformers"]["median"]}


def _dynamic(model: Model, rows: int) -> DynamicCache:
    s, cache = model.shape, DynamicCache()
    for layer in range(s.layers):
        cache.update(*torch.randn(2, 1, s.heads, rows, s.head_dim, dtype=s.dtype, device=s.device), layer)
    return cache


@contextmanager
def _attention(model: Model, name: str) -> Iterator[None]:
    """Another attention implementation for the length of a block."""
    model.hf.set_attn_implementation(name)
    try:
        yield
    finally:
        model.hf.set_attn_implementation(attention.NAME)


def encoding(subject: Subject, batch: int, repeats: int) -> dict[str, Any]:
    """Tokens per second of encoding (caches cut out and compacted), and of plain batched prefill without padding."""
    model = subject.model
    ids = [subject.text.document_ids(d)[:DOCUMENT_TOKENS] for d in subject.documents(batch)]
    stacked = torch.stack(ids)  # (documents, tokens)

    def plain() -> float:
        with _attention(model, "sdpa"), torch.no_grad():
            return seconds(lambda: model.hf(stacked.to(model.shape.device), use_cache=True, logits_to_keep=1))

    ours = lambda: seconds(lambda: model.encode(list(stacked), Encoding()))  # noqa: E731
    return {"batch": batch, **_rates({"kvilt": ours, "transformers": plain}, stacked.numel(), repeats)}


MEMORY_SCRIPT = """
import re, sys
from pathlib import Path
from kvilt.lab.bench.subject import random_subject
from kvilt.lab.bench.ttft import setting

def resident(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

subject = random_subject(sys.argv[1])
made, model = setting(subject, ["block"], Path(sys.argv[3]), int(sys.argv[2])), subject.model
engine = made.engines["block"]
if sys.argv[4] == "answer":
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    engine.answer(made.question, made.documents, max_new_tokens=8)
    peak = resident("VmHWM")
    plan = engine.plan(made.question, made.documents)
    print(before, peak, (len(plan.positions) + 8) * model.bytes_per_token, sum(p.numel() * 4 for p in model.hf.parameters()))
"""


def memory(shape: str, folder: Path, documents: int) -> dict[str, Any]:
    """Peak resident memory of one answer in a fresh process, over the model and one placed cache. Bytes.

    The documents are encoded by another process first, whose activations do not count."""
    for what in ("encode", "answer"):
        command = [sys.executable, "-c", MEMORY_SCRIPT, shape, str(documents), str(folder), what]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    before, peak, cache, weights = map(int, out.split())
    grown = peak - before
    sizes = {"before": before, "peak": peak, "placed_cache": cache, "weights": weights, "grown": grown}
    return {**sizes, "beyond_model_and_cache": (grown - cache) / (weights + cache)}


def compression(
    subject: Subject, documents: Sequence[Document], specs: Sequence[str], folder: Path, repeats: int
) -> dict[str, Any]:
    """Bytes per token, relative errors of keys and values, and seconds to read and place, of each compression.

    "" is none, and what the others are held to; caches are read from disk."""
    rows: dict[str, Any] = {}
    turns: dict[str, Callable[[], float]] = {}
    plain: list[DocumentCache] = []
    model = subject.model
    for name in ("none", *(s for s in specs if s)):
        store, spec = DiskStore(str(folder)), "" if name == "none" else name
        engine = Engine(model, subject.text, BlockAttention(), store, compress=spec)
        engine.encode(documents)
        plan = engine.plan(subject.question, documents)
        caches = [s.cache for s in plan.segments if s.cache is not None and s.name == "document"]
        plain = plain or caches
        keys, values = _errors(caches, plain)
        size = sum(c.nbytes for c in caches) / sum(c.length for c in plain)
        rows[name] = {"bytes_per_token": size, "keys_error": keys, "values_error": values}
        turns[name] = _placing(model, plan)
        store.close()
    times = take_turns(turns, repeats + 1)  # the first round warms up
    for name, row in rows.items():
        row["load_s"] = summary(times[name][1:])
        row["load_of_plain"] = row["load_s"]["median"] / summary(times["none"][1:])["median"]
    of = {"model": subject.name, "dtype": str(model.shape.dtype), "tokens": sum(c.length for c in plain)}
    return {**of, "documents": len(documents), "rows": rows}


def _errors(caches: Sequence[DocumentCache], plain: Sequence[DocumentCache]) -> tuple[float, float] | tuple[None, None]:
    """Root mean square errors of the kept rows' keys and values over all layers, relative; None for shortened texts."""
    off, size = torch.zeros(2), torch.zeros(2)
    for one, other in zip(caches, plain, strict=True):
        assert one.rows is not None
        assert other.rows is not None
        if not torch.equal(one.tokens, other.tokens):
            return None, None
        wanted = whole(other.rows)[:, :, :, one.offsets].float()
        off += _squares(whole(one.rows).float() - wanted)
        size += _squares(wanted)
    keys, values = (off / size).sqrt().tolist()
    return keys, values


def _squares(rows: Tensor) -> Tensor:
    return rows.square().sum((0, 2, 3, 4))  # (2,): keys, values


def _placing(model: Model, plan: Plan) -> Callable[[], float]:
    """Reading all layers from their files, decoding, and placing them."""

    def once() -> float:
        with model.placed(plan) as placed:
            return seconds(placed.place_all)

    return once

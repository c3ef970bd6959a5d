"""Decoding, encoding and memory, each against plain transformers in the same run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvilt.lab.bench.timing import seconds, summary, take_turns
from kvilt.lab.bench.ttft import DOCUMENT_TOKENS, setting
from kvilt.model import attention
from kvilt.model.decoding import generate
from kvilt.model.model import Model
from kvilt.types import Encoding


def decoding(model: Model, folder: Path, documents: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens per second after reuse, and of transformers' `generate` with a DynamicCache of the same length."""
    made = setting(model, ["block"], folder, documents)
    plan = made.engines["block"].plan(made.question, made.documents)
    prompt = torch.cat([s.tokens for s in plan.segments])

    def ours() -> float:
        logits, placed = model.run(plan, tokens)
        taken = seconds(lambda: generate(model, logits, placed, prompt, tokens, min_new_tokens=tokens))
        model.pool.give(placed.buffer)
        return taken

    def plain() -> float:
        cache = _dynamic(model, len(prompt) - 1)
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "past_key_values": cache}
        with _attention(model, "sdpa"):
            return seconds(lambda: model.hf.generate(prompt[None].clamp(min=0), **options))

    found = take_turns({"kvilt": ours, "transformers": plain}, repeats + 1)
    rates = {name: summary([(tokens - 1) / s for s in values[1:]]) for name, values in found.items()}
    return {
        "context": len(prompt),
        "tokens": tokens,
        "tokens_per_s": rates,
        "ratio": rates["kvilt"]["median"] / rates["transformers"]["median"],
    }


def _dynamic(model: Model, rows: int) -> DynamicCache:
    s, cache = model.shape, DynamicCache()
    for layer in range(s.layers):
        cache.update(*(torch.randn(1, s.heads, rows, s.head_dim, dtype=s.dtype) for _ in range(2)), layer)
    return cache


class _attention:  # noqa: N801 (a context manager, used like a function)
    """Another attention implementation for the length of a block."""

    def __init__(self, model: Model, name: str) -> None:
        self.model, self.name = model, name

    def __enter__(self) -> None:
        self.model.hf.set_attn_implementation(self.name)

    def __exit__(self, *_: object) -> None:
        self.model.hf.set_attn_implementation(attention.NAME)


def encoding(model: Model, batch: int, repeats: int) -> dict[str, Any]:
    """Tokens per second of encoding (caches cut out and compacted), and of plain batched prefill without padding."""
    documents = [torch.randint(5, 4000, (DOCUMENT_TOKENS,)) for _ in range(batch)]
    stacked = nn.utils.rnn.pad_sequence(documents, batch_first=True)

    def ours() -> float:
        return seconds(lambda: model.encode(documents, Encoding()))

    def plain() -> float:
        with _attention(model, "sdpa"):
            return seconds(lambda: _prefill(model, stacked))

    found = take_turns({"kvilt": ours, "transformers": plain}, repeats + 1)
    rates = {name: summary([stacked.numel() / s for s in values[1:]]) for name, values in found.items()}
    return {"batch": batch, "tokens_per_s": rates, "ratio": rates["kvilt"]["median"] / rates["transformers"]["median"]}


@torch.no_grad()
def _prefill(model: Model, ids: Tensor) -> None:
    model.hf(ids, use_cache=True, logits_to_keep=1)


MEMORY_SCRIPT = """
import re, sys
from pathlib import Path
from kvilt.lab.bench.models import random_model
from kvilt.lab.bench.ttft import setting

def resident(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

shape, documents, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
model = random_model(shape)
made = setting(model, ["block"], folder, documents)
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

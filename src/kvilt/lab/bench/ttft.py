"""Time to first token of strategies, beside full prefill and beside the floor.

Everything a request pays is inside: tokenisation, keys, reading the documents' files, placing, the pass, picking the token.
The floor is the forward pass of the computed tokens alone over an already placed buffer, plus the bytes of the reused
rows at the rate at which `readinto` reads the same files into a reused buffer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvilt.engine.engine import Engine
from kvilt.engine.text import TextFormat
from kvilt.lab.bench.models import collection, text_of, word_tokenizer
from kvilt.lab.bench.timing import seconds, summary, take_turns
from kvilt.model.model import Model
from kvilt.model.placing import PlacedCache
from kvilt.plan import Plan
from kvilt.registry import build
from kvilt.stores.disk import DiskStore
from kvilt.strategies.base import Strategy
from kvilt.strategies.wrapper import Wrapper
from kvilt.types import Document

QUESTION_TOKENS = 20
DOCUMENT_TOKENS = 500


@dataclass(frozen=True, eq=False)
class Setting:
    """One context length: engines that share a model and a store, and a prompt."""

    engines: dict[str, Engine]
    documents: list[Document]
    question: str
    store: Path


def setting(model: Model, specs: Sequence[str], folder: Path, documents: int, compress: str = "") -> Setting:
    """Encode the collection for every strategy and warm the page cache by answering once."""
    logging.getLogger("kvilt").setLevel(logging.ERROR)
    store = DiskStore(path=str(folder / "store"))
    text = TextFormat.of(word_tokenizer(), system="w1 w2 w3 w4 w5")
    wrapper = folder / "wrapper.safetensors"
    width = model.hf.config.hidden_size
    if not wrapper.is_file():
        header, trailer, links = torch.randn(3, 8, width) * 0.02
        Wrapper(header, trailer, links=links).save(wrapper)
    engines = {spec: Engine(model, text, _strategy(spec, wrapper), store, compress=compress) for spec in specs}
    texts = collection(documents, DOCUMENT_TOKENS - 1)
    for engine in engines.values():
        if engine.strategy.encoding is not None:
            engine.encode(texts)
    return Setting(engines, texts, text_of(QUESTION_TOKENS, seed=9999), folder / "store")


def _strategy(spec: str, wrapper: Path) -> Strategy:
    spec = spec.replace("WRAPPER", str(wrapper))
    strategy = build("strategy", spec)
    assert isinstance(strategy, Strategy)
    return strategy


def measure(made: Setting, repeats: int, full_once: bool = False) -> dict[str, dict[str, Any]]:
    """TTFT, floor and steps of every strategy, in turns; a first round of all but full prefill warms up."""
    steps: dict[str, dict[str, float]] = {}

    def ttft(name: str) -> Callable[[], float]:
        def once() -> float:
            usage = made.engines[name].answer(made.question, made.documents, max_new_tokens=1).usage
            steps[name] = usage.steps_s
            return usage.ttft_s

        return once

    turns = {name: ttft(name) for name in made.engines}
    reusing = {name: e for name, e in made.engines.items() if e.strategy.encoding is not None}
    plans = {name: e.plan(made.question, made.documents) for name, e in reusing.items()}
    turns |= {f"{name} forward": _forward(made.engines[name].model, plan) for name, plan in plans.items()}
    files = _files(made, next(iter(plans.values())))
    turns["readinto"] = lambda: _readinto(files)
    for warm in (t for name, t in turns.items() if name != "full"):
        warm()
    found = take_turns(turns, repeats, once=("full",) if full_once else ())
    rate = sum(f.stat().st_size for f in files) / summary(found["readinto"])["median"]
    return {name: _row(name, made, found, plans.get(name), rate) | {"steps_s": steps[name]} for name in made.engines}


def _files(made: Setting, plan: Plan) -> list[Path]:
    """The files that a plan reads."""
    keys = [s.cache.key.digest for s in plan.segments if s.cache is not None]
    return [next(made.store.rglob(f"{key}*.safetensors")) for key in keys]


def _row(name: str, made: Setting, found: dict[str, list[float]], plan: Plan | None, rate: float) -> dict[str, Any]:
    row: dict[str, Any] = {"ttft_s": summary(found[name])}
    if "full" in found:
        row["of_full"] = row["ttft_s"]["median"] / summary(found["full"])["median"]
    if plan is None:
        return row
    loaded = sum(s.cache.nbytes for s in plan.segments if s.cache is not None and s.reused.any())
    forward = summary(found[f"{name} forward"])["median"]
    floor = forward + loaded / rate
    row |= {"forward_s": forward, "bytes": loaded, "readinto_bytes_per_s": rate, "floor_s": floor}
    row |= {"of_floor": row["ttft_s"]["median"] / floor, "computed_tokens": len(plan.computed_rows)}
    return {**row, "charged": plan.charged(made.engines[name].info.linear_cost)}


def _forward(model: Model, plan: Plan) -> Callable[[], float]:
    """The computed tokens' pass alone over rows that lie in the buffer already."""

    def once() -> float:
        placed = PlacedCache(plan, model.pool.take(len(plan.positions)), model.rope)
        for layer in range(model.shape.layers):
            placed.place(layer)
        placed.pieces = []
        with torch.no_grad():
            taken = seconds(lambda: model.forward(plan, placed, logits_to_keep=1))
        model.pool.give(placed.buffer)
        return taken

    return once


def _readinto(files: Sequence[Path]) -> float:
    """Reading the files whole into one reused buffer."""
    buffer = memoryview(bytearray(max(f.stat().st_size for f in files)))

    def once() -> None:
        for path in files:
            with open(path, "rb", buffering=0) as file:
                file.readinto(buffer)

    once()  # the buffer's pages exist
    return seconds(once)

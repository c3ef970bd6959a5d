"""What compression saves and costs: bytes per token, relative errors of keys and values, seconds to load and place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kvilt.compress.base import Compression
from kvilt.engine.encoder import Encoder
from kvilt.engine.text import TextFormat
from kvilt.lab.bench.timing import seconds, summary, take_turns
from kvilt.model.model import Model
from kvilt.model.placing import PlacedCache
from kvilt.plan import Plan, Segment
from kvilt.rows.rows import whole
from kvilt.stores.disk import DiskStore
from kvilt.types import Document, DocumentCache, Encoding


def measure(
    model: Model, text: TextFormat, documents: Sequence[Document], specs: Sequence[str], folder: Path, repeats: int
) -> dict[str, Any]:
    """A row for each compression ("" is none, and what the others are held to); caches are read from disk."""
    rows: dict[str, Any] = {}
    turns: dict[str, Callable[[], float]] = {}
    plain: list[DocumentCache] = []
    for spec in ("", *(s for s in specs if s)):
        store = DiskStore(str(folder))
        encoder = Encoder(model, text, store, Encoding(), compression=Compression.of(spec))
        encoder.encode(documents)
        caches = encoder.make(encoder.items(documents))
        plain = plain or caches
        tokens = sum(c.length for c in plain)
        errors = {f"{name}_error": _error(caches, plain, side) for side, name in enumerate(("keys", "values"))}
        rows[spec or "none"] = {"bytes_per_token": sum(c.nbytes for c in caches) / tokens, **errors}
        turns[spec or "none"] = _placing(model, _plan(caches))
    found = take_turns(turns, repeats + 1)  # the first round warms up
    for name, row in rows.items():
        row["load_s"] = summary(found[name][1:])
        row["load_of_plain"] = row["load_s"]["median"] / summary(found["none"][1:])["median"]
    return {"dtype": str(model.shape.dtype), "tokens": tokens, "documents": len(documents), "rows": rows}


def _error(caches: Sequence[DocumentCache], plain: Sequence[DocumentCache], side: int) -> float | None:
    """Root mean square error of the kept rows over all layers, relative; None for shortened texts."""
    off = total = 0.0
    for one, other in zip(caches, plain, strict=True):
        assert one.rows is not None
        assert other.rows is not None
        if not torch.equal(one.tokens, other.tokens):
            return None
        wanted = whole(other.rows)[:, side, :, one.offsets].float()
        off += float((whole(one.rows)[:, side].float() - wanted).square().sum())
        total += float(wanted.square().sum())
    return float((off / total) ** 0.5)


def _plan(caches: Sequence[DocumentCache]) -> Plan:
    segments, at = [], 0
    for cache in caches:
        segments.append(Segment(cache.placed_tokens, at, cache))
        at += cache.length
    return Plan((*segments, Segment(torch.zeros(1, dtype=torch.long), at)), at + 1)


def _placing(model: Model, plan: Plan) -> Callable[[], float]:
    """Reading all layers from their files, decoding, and placing them."""

    def once() -> float:
        placed = PlacedCache(plan, model.pool.take(len(plan.positions)), model.rope)
        taken = seconds(lambda: _fill(placed, model.shape.layers))
        model.pool.give(placed.buffer)
        return taken

    return once


def _fill(placed: PlacedCache, layers: int) -> None:
    for layer in range(layers):
        placed.place(layer)

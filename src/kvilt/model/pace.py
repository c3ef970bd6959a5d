"""How fast a model computes on this machine and how fast caches are placed: what a plan's first token will take."""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING

import torch

from kvilt.model.placed import PlacedCache
from kvilt.plan import Plan, Segment

if TYPE_CHECKING:
    from kvilt.model.model import Model

SHORT, LONGEST = 16, 4096  # tokens of the timed passes
REPEATS = 2  # the first pass of a length may also set things up
PLACED_LAYERS = 4  # as many layers are placed to see how fast that goes
GROWTH = 4  # a kind of storage is timed again when there is so many times more to place


class Pace:
    """Rates of one model, measured when first asked for: the same plan gets the same prediction. Thread-safe.

    seconds = fixed + work * per_unit + sum(bytes / rate of their kind of storage); work counts matrices and attention in
    units of attending to one key (`Plan.work`)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._computing: tuple[float, float] | None = None  # seconds of any pass, and of one unit of work
        self._placing: dict[type, tuple[int, float]] = {}  # kind of storage: bytes it was timed with, seconds per byte

    def seconds(self, model: Model, plan: Plan, linear: float) -> float:
        """Predicted seconds from a plan to its first token; `linear` is `ModelInfo.linear_cost`."""
        sizes: dict[type, int] = {}
        for s in plan.segments:
            if s.cache is not None and plan.loaded(s).any():
                sizes[type(s.cache.layers)] = sizes.get(type(s.cache.layers), 0) + s.cache.nbytes
        with self._lock:
            self._computing = self._computing or computing(model, linear)
            for kind, size in sizes.items():
                if size >= GROWTH * self._placing.get(kind, (1, 0.0))[0]:
                    self._placing[kind] = size, placing(model, plan, kind)
            fixed, unit = self._computing
            return fixed + unit * plan.work(linear) + sum(n * self._placing[kind][1] for kind, n in sizes.items())


def computing(model: Model, linear: float) -> tuple[float, float]:
    """Seconds of any pass, and of one unit of work, from two lengths far enough apart to tell them."""
    short, most = _first_token(model, SHORT), min(model.context_length, LONGEST)
    tokens = min(4 * SHORT, most)
    long = _first_token(model, tokens)
    while long < 2 * short and 4 * tokens <= most:
        tokens *= 4
        long = _first_token(model, tokens)
    done, more = _bare(SHORT).work(linear), _bare(tokens).work(linear)
    unit = max(long - short, 0.1 * long) / max(more - done, 1)  # noise must not make work free
    return max(short - unit * done, 0.0), unit


def placing(model: Model, plan: Plan, kind: type) -> float:
    """Seconds to place a byte of a plan's caches that are kept in one kind of storage."""
    placed = PlacedCache(plan, model.pool.take(len(plan.positions)), model.rope)
    pieces = [p for p in placed.pieces if type(p.cache.layers) is kind]
    layers = min(PLACED_LAYERS, len(placed.buffer))
    try:
        placed.buffer[:layers].zero_()  # memory that was never touched would be timed, too
        began = _now(model)
        for layer in range(layers):
            for piece in pieces:
                piece.place(layer, placed.buffer[layer, 0], placed.buffer[layer, 1], model.rope, None)
        return (_now(model) - began) / (sum(p.cache.nbytes for p in pieces) * layers / len(placed.buffer))
    finally:
        model.pool.give(placed.buffer)


def _bare(tokens: int) -> Plan:
    return Plan((Segment(torch.zeros(tokens, dtype=torch.long), 0),), tokens)


def _first_token(model: Model, tokens: int) -> float:
    """Seconds of computing a prompt of this length, the fastest of several."""
    best = math.inf
    for _ in range(REPEATS):
        began = _now(model)
        _, placed = model.run(_bare(tokens))
        best = min(best, _now(model) - began)
        model.pool.give(placed.buffer)
    return best


def _now(model: Model) -> float:
    if model.shape.device.type == "cuda":
        torch.cuda.synchronize(model.shape.device)
    return time.perf_counter()

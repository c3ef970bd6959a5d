"""A plan's rows in one preallocated buffer: reused keys are moved as they are copied in, and decoding appends in place."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kvilt.attention import TwoPart
from kvilt.codec import Packed
from kvilt.plan import Plan, Segment
from kvilt.rope import Angles, Rope, Turned
from kvilt.types import CacheKey, DocumentCache, Layers, TensorLayers, Which

ROOM_STEP = 256  # capacities are rounded up, so that prompts of like length share a buffer


@dataclass(frozen=True)
class Shape:
    """Shape of a model's cache."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


class BufferPool:
    """Keeps the last released buffer, so that steady traffic touches no fresh memory. Thread-safe."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._free: Tensor | None = None
        self._lock = threading.Lock()

    def take(self, rows: int) -> Tensor:
        """A buffer (layers, 2, heads, >= rows, head_dim) with undefined content."""
        with self._lock:
            found, self._free = self._free, None
        if found is not None and found.shape[3] >= rows:
            return found
        del found  # before the larger one is made: two placed caches at once would double the peak
        s, rows = self.shape, -(-rows // ROOM_STEP) * ROOM_STEP
        return torch.empty(s.layers, 2, s.heads, rows, s.head_dim, dtype=s.dtype, device=s.device)

    def give(self, buffer: Tensor) -> None:
        """Hand a buffer back; the larger one is kept."""
        with self._lock:
            if self._free is None or self._free.shape[3] < buffer.shape[3]:
                self._free = buffer

    def clear(self) -> None:
        """Free the kept buffer."""
        with self._lock:
            self._free = None


class StopAtLayer(Exception):
    """Raised inside a forward pass when a probe has seen enough."""


class PlacedCache(Cache):
    """The transformers cache of one running plan.

    Rows lie in the order of the plan's segments. During the plan's pass, `update` places the reused rows of its layer and
    writes the computed rows between them; afterwards it appends. `get_seq_length` is the next *position*, which is not
    the number of rows when the plan has gaps, so transformers' own position arithmetic stays right.
    """

    def __init__(self, plan: Plan, buffer: Tensor, rope: Rope, stop: int | None = None) -> None:
        super().__init__(layers=[])
        self.buffer = buffer
        self.length = len(plan.positions)
        self.position = plan.end
        self.stop = stop
        self._plan: Plan | None = plan
        self.rope = rope
        self._loader: Loader | None = None
        rows = plan.computed_rows
        first = int(rows[0])
        contiguous = int(rows[-1]) - first + 1 == len(rows)
        self._rows: slice | Tensor = slice(first, first + len(rows)) if contiguous else rows.to(buffer.device)
        self.attention = self._attention(plan)
        self.pieces = [
            Piece.of(s, base, buffer.device)
            for s, base in zip(plan.segments, plan.bases, strict=True)
            if s.reused.any()
        ]

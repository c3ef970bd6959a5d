"""A plan's rows in one preallocated buffer: reused rows are read into it, keys are rotated there, decoding appends in place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kvilt.model.loader import Loader, Staging
from kvilt.model.twopart import TwoPart
from kvilt.plan import Plan, Segment
from kvilt.rows.rows import Rotation
from kvilt.types import CacheKey, DocumentCache, Rows

ROOM_STEP = 256  # capacities are rounded up, so that prompts of like length share a buffer
GROUP_BYTES = 16 << 20  # rows placed at a time: of many layers for small prompts, still in the cache for large ones


@dataclass(frozen=True)
class Shape:
    """Shape of a model's cache."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


class BufferPool:
    """Keeps the last buffer that came back, so that steady traffic touches no fresh memory. Thread-safe."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._free: Tensor | None = None
        self._lock = threading.Lock()

    @contextmanager
    def lend(self, rows: int) -> Iterator[Tensor]:
        """A buffer (layers, 2, heads, >= rows, head_dim) with undefined content, until the block ends."""
        with self._lock:
            buffer, self._free = self._free, None
        if buffer is None or buffer.shape[3] < rows:
            del buffer  # before the larger one is made: two placed caches at once would double the peak
            s, rows = self.shape, -(-rows // ROOM_STEP) * ROOM_STEP
            with torch.inference_mode(False):  # a buffer born in inference mode could never be filled outside it
                buffer = torch.empty(s.layers, 2, s.heads, rows, s.head_dim, dtype=s.dtype, device=s.device)
        try:
            yield buffer
        finally:
            with self._lock:
                if self._free is None or self._free.shape[3] < buffer.shape[3]:
                    self._free = buffer

    def clear(self) -> None:
        """Free the kept buffer."""
        with self._lock:
            self._free = None


@dataclass(frozen=True, eq=False)
class Piece:
    """One segment's reused rows: where they are read, and which rows of the buffer they become."""

    rows: Rows
    into: slice | Tensor  # rows of the buffer; a tensor where they are scattered
    source: Tensor | None  # which of the stored rows, None for all

    @classmethod
    def of(cls, segment: Segment, base: int, loaded: Tensor) -> Piece | None:
        """The rows at the places `loaded`, (length,) bool, of a segment whose first row is `base`.

        Recomputed rows inside a whole document are placed too and overwritten in the same layer: one long copy is faster
        than many short ones."""
        cache, places = segment.cache, segment.places
        if cache is None or cache.rows is None or not bool(loaded.any()):
            return None
        if len(cache.offsets) == len(places):
            return cls(cache.rows, slice(base, base + len(places)), None)
        keep = loaded[cache.offsets]
        return cls(cache.rows, base + torch.searchsorted(places, cache.offsets[keep]), keep.nonzero()[:, 0])

    def place(self, layers: slice, buffer: Tensor, staging: Staging | None) -> None:
        """Read some layers into the buffer (layers, 2, heads, capacity, head_dim) of those layers."""
        if isinstance(self.into, slice) and self.source is None:
            target = buffer[:, :, :, self.into]
            if staging is None or not staging.takes(self.rows):
                self.rows.read(layers, target)
            else:
                staging.upload(self.rows, layers, target)
            return
        count, block = len(buffer), self.rows.shape[1:]
        rows = torch.empty(count, 2, *block, dtype=self.rows.dtype)  # read where stored rows lie, mostly the host
        self.rows.read(layers, rows)
        picked = rows if self.source is None else rows[:, :, :, self.source]
        at = self.into if isinstance(self.into, slice) else self.into.to(buffer.device)
        buffer[:, :, :, at] = picked.to(buffer.device, buffer.dtype)


class StopAtLayer(Exception):
    """Raised inside a forward pass when a probe has seen enough."""


class PlacedCache(Cache):
    """The transformers cache of one running plan.

    Rows lie in the order of the plan's segments. During the plan's pass, `update` places the reused rows of its layer and
    writes the computed rows between them; afterwards it appends. `get_seq_length` is the next *position*, which is not
    the number of rows when the plan has gaps, so transformers' own position arithmetic stays right."""

    def __init__(
        self, plan: Plan, buffer: Tensor, rotation: Rotation, stop: int | None = None, depth: int | None = None
    ) -> None:
        super().__init__(layers=[])
        self.buffer, self.rotation, self.stop = buffer, rotation, stop
        self.depth = depth or stop or len(buffer)  # layers that the pass reaches
        self.length = len(plan.positions)
        self.position = plan.end
        self._plan: Plan | None = plan
        self._ready = 0  # layers that are placed
        self._loader: Loader | None = None
        rows, first, end = plan.computed_rows, int(plan.computed_rows[0]), int(plan.computed_rows[-1]) + 1
        self._rows: slice | Tensor = slice(first, end) if end - first == len(rows) else rows.to(buffer.device)
        self.attention = self._attention(plan)
        self.reader = plan.reader
        self._blended = None if plan.blended is None else plan.blended[:, None].to(buffer.device)  # (computed, 1)
        parts = zip(plan.segments, plan.bases, strict=True)
        self.pieces = [p for s, base in parts if (p := Piece.of(s, base, plan.loaded(s))) is not None]
        size = sum(p.rows.nbytes for p in self.pieces)
        self.bytes_loaded = size  # as stored
        self.group = max(1, min(len(buffer), GROUP_BYTES * len(buffer) // max(size, 1)))
        behind = plan.is_suffix and plan.blended is None  # all that is loaded lies before what is computed
        placed = plan.positions[:first] if behind else plan.positions  # computed rows between are overwritten
        self._end = len(placed)
        self._angles = rotation.angles(placed, buffer.device) if self.pieces else None

    def _attention(self, plan: Plan) -> TwoPart | None:
        """The hook that every pass over this cache needs, decoding included; None for plain attention."""
        if plan.context is None or plan.context_rows is None:
            return None
        context = torch.zeros(self.capacity, dtype=torch.bool)  # appended rows are none of it
        context[: self.length] = plan.context_rows
        return TwoPart(plan.context, context.to(self.buffer.device))

    def load_ahead(self, staged: bool | None = None) -> None:
        """Place layers from another thread, ahead of the forward pass; `staged` (default: on CUDA) through host buffers."""
        count, device = len(self.buffer), self.buffer.device
        size = max((-(-p.rows.nbytes // count) for p in self.pieces), default=0)
        staged = device.type == "cuda" if staged is None else staged
        self._loader = Loader(self.place, count, self.group, size, device, staged)

    def place(self, layers: slice, staging: Staging | None = None) -> None:
        """Read some layers' reused rows into the buffer and rotate their keys to their positions, all in few calls."""
        if self._angles is None:
            return
        buffer = self.buffer[layers]
        for piece in self.pieces:
            piece.place(layers, buffer, staging)
        keys = buffer[:, 0, :, : self._end]
        self.rotation.rotate(keys, self._angles, keys)

    def place_all(self) -> None:
        """Place every layer now, before the pass."""
        self.place(slice(None))
        self._ready = len(self.buffer)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new rows of one layer; all rows so far, (1, heads, rows, head_dim) each."""
        keys, values = self.buffer[layer_idx]
        if self._plan is not None:
            self._wait(layer_idx)
            new = self._mix(keys, key_states[0]), self._mix(values, value_states[0])
            keys[:, self._rows], values[:, self._rows] = new
            if self.stop is not None and layer_idx + 1 >= self.stop:
                raise StopAtLayer
            return keys[None, :, : self.length], values[None, :, : self.length]
        end = self.length + key_states.shape[2]
        keys[:, self.length : end], values[:, self.length : end] = key_states[0], value_states[0]
        return keys[None, :, :end], values[None, :, :end]

    def _wait(self, layer: int) -> None:
        """Return once a layer is placed."""
        if self._loader is not None:
            self._loader.wait(layer)
        elif layer >= self._ready:
            end = min(layer + self.group, self.depth)
            self.place(slice(layer, end))
            self._ready = end

    def _mix(self, placed: Tensor, fresh: Tensor) -> Tensor:
        """What the computed rows become, (heads, computed, head_dim): fresh, or mixed with what is placed there."""
        if self._plan is None or self._blended is None:
            return fresh
        both = torch.lerp(placed[:, self._rows].float(), fresh.float(), self._plan.blend).to(fresh.dtype)
        return torch.where(self._blended, both, fresh)  # elsewhere the buffer holds anything

    def finish(self) -> None:
        """End of the plan's pass: nothing loads any more, and from here on rows are appended."""
        if self._loader is not None:
            self._loader.stop()
        self._plan, self._loader = None, None

    def advance(self, tokens: int) -> None:
        """Count appended rows once all layers have them."""
        self.length += tokens
        self.position += tokens

    @property
    def capacity(self) -> int:
        """Rows the buffer has room for."""
        return self.buffer.shape[3]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The next position."""
        return self.position

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        """Unused: masks are made from the plan."""
        return self.length, 0

    def taken(self, segment: Segment, base: int, layers: int, key: CacheKey) -> DocumentCache:
        """What the lowest layers now hold for a segment, as a cache of its own."""
        data = self.buffer[:layers, :, :, base : base + len(segment.places)].clone()
        rows = self.rotation.plain(data, segment.start + segment.places)
        return DocumentCache(segment.tokens, segment.places, segment.length, key, rows)


@dataclass(eq=False)
class Run:
    """A plan that was computed: the logits of its last token (vocab,) float32, and the cache to decode with."""

    placed: PlacedCache
    logits: Tensor
    after: Callable[[Tensor, PlacedCache], Tensor]  # `Model.after`

    @property
    def bytes_loaded(self) -> int:
        """Bytes of the reused rows, as stored."""
        return self.placed.bytes_loaded

    def step(self, token: Tensor) -> Tensor:
        """Append one token (1, 1); logits of the next, (1, vocab) float32."""
        logits = self.peek(token[0])[-1:]
        self.placed.advance(1)
        return logits

    def peek(self, tokens: Tensor) -> Tensor:
        """Logits behind each of several tokens (tokens,), (tokens, vocab) float32; the run stays where it is."""
        return self.after(tokens, self.placed)

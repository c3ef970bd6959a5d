"""A plan's rows in one preallocated buffer: reused keys are moved as they are copied in, and decoding appends in place."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kvilt.model.attention import TwoPart
from kvilt.model.pieces import Piece, Staging
from kvilt.model.rope import Rope
from kvilt.plan import Plan, Segment
from kvilt.rows.codec import Packed
from kvilt.types import CacheKey, DocumentCache, TensorLayers

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
        self.buffer, self.rope, self.stop = buffer, rope, stop
        self.length = len(plan.positions)
        self.position = plan.end
        self._plan: Plan | None = plan
        self._loader: Loader | None = None
        rows = plan.computed_rows
        first = int(rows[0])
        contiguous = int(rows[-1]) - first + 1 == len(rows)
        self._rows: slice | Tensor = slice(first, first + len(rows)) if contiguous else rows.to(buffer.device)
        self.attention = self._attention(plan)
        self._blended = None if plan.blended is None else plan.blended[:, None].to(buffer.device)  # (computed, 1)
        parts = [(s, base, plan.loaded(s)) for s, base in zip(plan.segments, plan.bases, strict=True)]
        self.pieces = [Piece.of(s, base, loaded, buffer.device) for s, base, loaded in parts if loaded.any()]

    def _attention(self, plan: Plan) -> TwoPart | None:
        """The hook that every pass over this cache needs, decoding included; None for plain attention."""
        if plan.context is None or plan.context_rows is None:
            return None
        context = torch.zeros(self.capacity, dtype=torch.bool)  # appended rows are none of it
        context[: self.length] = plan.context_rows
        return TwoPart(plan.context, context.to(self.buffer.device))

    @property
    def bytes_loaded(self) -> int:
        """Bytes of the reused rows, as stored."""
        return sum(p.cache.nbytes for p in self.pieces)

    def load_ahead(self) -> None:
        """Place layers from another thread, ahead of the forward pass."""
        self._loader = Loader(self)

    def place(self, layer: int, staging: Staging | None = None) -> None:
        """Copy one layer's reused rows into the buffer, moving the keys."""
        keys, values = self.buffer[layer]
        for piece in self.pieces:
            piece.place(layer, keys, values, self.rope, staging)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new rows of one layer; all rows so far, (1, heads, rows, head_dim) each."""
        keys, values = self.buffer[layer_idx]
        if self._plan is not None:
            if self._loader is not None:
                self._loader.wait(layer_idx)
            elif self.pieces:
                self.place(layer_idx)
            new = self._mix(keys, key_states[0]), self._mix(values, value_states[0])
            keys[:, self._rows], values[:, self._rows] = new
            if self.stop is not None and layer_idx + 1 >= self.stop:
                raise StopAtLayer
            return keys[None, :, : self.length], values[None, :, : self.length]
        end = self.length + key_states.shape[2]
        keys[:, self.length : end], values[:, self.length : end] = key_states[0], value_states[0]
        return keys[None, :, :end], values[None, :, :end]

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

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Rows the buffer has room for."""
        return self.capacity

    def seen(self, segment: Segment, base: int, layers: int, key: CacheKey) -> DocumentCache:
        """What the lowest layers now hold for a segment, keys moved back to position 0."""
        rows = slice(base, base + len(segment.places))
        keys = tuple(self.rope.move(self.buffer[i, 0, :, rows], -segment.start) for i in range(layers))
        values = tuple(self.buffer[i, 1, :, rows].clone() for i in range(layers))
        return DocumentCache(segment.tokens, segment.places, segment.length, key, TensorLayers(keys, values))


class Loader:
    """Places layer after layer from a thread; on CUDA through pinned memory and a stream of its own.

    The forward pass waits for a layer only when it reaches it, so loading layer i + 1 overlaps computing layer i."""

    def __init__(self, placed: PlacedCache) -> None:
        self.placed = placed
        self.layers = len(placed.buffer)
        self.ready = [threading.Event() for _ in range(self.layers)]
        self.marks: list[Any] = [None] * self.layers
        self.error: BaseException | None = None
        self.cuda = placed.buffer.device.type == "cuda"
        self.stream = torch.cuda.Stream(placed.buffer.device) if self.cuda else None
        if self.stream is not None:  # the buffer may still be in use by the work queued before
            self.stream.wait_stream(torch.cuda.current_stream(placed.buffer.device))
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="kvilt-loader", daemon=True)
        self._thread.start()

    def wait(self, layer: int) -> None:
        """Return once a layer is placed, as far as work queued after this call can tell; re-raises what went wrong."""
        self.ready[layer].wait()
        if self.error is not None:
            raise self.error
        if self.marks[layer] is not None:
            torch.cuda.current_stream(self.placed.buffer.device).wait_event(self.marks[layer])

    def stop(self) -> None:
        """Return when the thread has written its last byte: the buffer may then serve another prompt."""
        self._stopped = True
        self._thread.join()
        if self.stream is not None:
            self.stream.synchronize()

    def _run(self) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(self.stream):
                self._place_all()
        except BaseException as error:  # handed to the waiting thread, whatever it is
            self.error = error
        finally:
            for event in self.ready:
                event.set()

    def _place_all(self) -> None:
        sizes = [p.cache.nbytes // (2 * self.layers) for p in self.placed.pieces if not isinstance(p.layers, Packed)]
        staging = Staging(max(sizes)) if self.cuda and sizes else None
        for layer in range(self.layers):
            if self._stopped:
                return
            self.placed.place(layer, staging)
            if self.stream is not None:
                self.marks[layer] = self.stream.record_event()
            self.ready[layer].set()

"""The reused rows of one segment on their way into a placed cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvilt.model.rope import Angles, Rope, Turned
from kvilt.plan import Segment
from kvilt.rows.codec import Packed
from kvilt.types import DocumentCache, Layers, Which


@dataclass(frozen=True, eq=False)
class Piece:
    """One segment's reused rows: where they come from and where they go."""

    cache: DocumentCache
    layers: Layers
    by: int | Angles  # how far the stored keys are to be rotated
    rows: slice | Tensor  # of the buffer
    source: Tensor | None  # rows of the stored cache, None for all of them

    @classmethod
    def of(cls, segment: Segment, base: int, loaded: Tensor, device: torch.device) -> Piece:
        """The rows at the places `loaded`, (length,) bool, of a segment whose first row is `base`.

        Recomputed rows inside a whole document are placed too and overwritten in the same layer: one long copy is
        faster than many short ones."""
        assert segment.cache is not None
        cache, places, layers = segment.cache, segment.places, segment.cache.layers
        assert layers is not None
        rows: slice | Tensor = slice(base, base + len(places))
        source = None
        if len(cache.offsets) != len(places):
            keep = loaded[cache.offsets]
            rows = base + torch.searchsorted(places, cache.offsets[keep])
            source = keep.nonzero()[:, 0]
        if not isinstance(layers, Turned):
            return cls(cache, layers, segment.start, rows, source)
        stand = segment.start + (cache.offsets if source is None else cache.offsets[source])
        return cls(cache, layers.packed, layers.rope.angles(stand, device), rows, source)

    def place(self, layer: int, keys: Tensor, values: Tensor, rope: Rope, staging: Staging | None) -> None:
        """Copy into (heads, rows, head_dim) buffers of one layer."""
        layers = self.layers
        direct = layers.dtype == values.dtype or isinstance(layers, Packed)
        if isinstance(self.rows, slice) and values.device.type == "cpu" and direct:
            layers.fetch(layer, "values", values[:, self.rows])
            rope.move(layers.fetch(layer, "keys"), self.by, keys[:, self.rows])
            return
        values[:, self.rows] = self._rows_of(layer, "values", values, staging).to(values.dtype)
        stored = self._rows_of(layer, "keys", keys, staging)
        moved = keys[:, self.rows] if isinstance(self.rows, slice) else keys.new_empty(stored.shape)
        rope.move(stored, self.by, moved)  # into the buffer's own dtype: rounded once
        if not isinstance(self.rows, slice):
            keys[:, self.rows] = moved

    def _rows_of(self, layer: int, which: Which, target: Tensor, staging: Staging | None) -> Tensor:
        """The general way: another dtype, another device or scattered rows."""
        layers = self.layers
        if isinstance(layers, Packed):  # fewer bytes to upload, decoded where they are needed
            rows = layers.fetch(layer, which, device=target.device)
            return rows if self.source is None else rows[:, self.source.to(rows.device)]
        rows = layers.fetch(layer, which, None if staging is None else staging.take(layers.shape, layers.dtype))
        if self.source is not None:
            rows = rows[:, self.source]
        rows = rows.to(target.device, non_blocking=staging is not None)
        if staging is not None:
            staging.sent()
        return rows


class Staging:
    """Pinned host buffers used in turn; one is reused only when its last upload is through."""

    def __init__(self, size: int, count: int = 4) -> None:
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(count)]
        self._uploads = [torch.cuda.Event() for _ in range(count)]
        self._at = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next buffer as (heads, rows, head_dim); call `sent` when its upload is queued."""
        self._at = (self._at + 1) % len(self._buffers)
        self._uploads[self._at].synchronize()
        heads, rows, dim = shape[1:]
        return self._buffers[self._at][: heads * rows * dim * dtype.itemsize].view(dtype).view(heads, rows, dim)

    def sent(self) -> None:
        """Mark the upload of the buffer taken last as queued on the current stream."""
        self._uploads[self._at].record()

"""Rows in memory, some rows of others, and the rotation that puts keys where they are used.

Keys are stored without any rotation. One rotation, at the row's final position, is then all that any reader needs: the
engine, vLLM's workers, quantised rows (whose channels share scales only without rotation), and strategies that compare
keys. `docs/how-it-works.md` has the measurement of what this costs in half precision."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvilt.types import DocumentCache, Rows, digest_of

Angles = tuple[Tensor, Tensor]  # cos and sin, (positions, rotary_dim / 2) float32 each


@dataclass(frozen=True, eq=False)
class TensorRows:
    """Keys and values held in memory."""

    data: Tensor  # (layers, 2, heads, rows, head_dim)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        layers, _, heads, rows, dim = self.data.shape
        return layers, heads, rows, dim

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self.data.nbytes

    def read(self, layers: slice, out: Tensor) -> None:
        """Copy some layers into `out` (layers, 2, heads, rows, head_dim)."""
        out.copy_(self.data[layers])


@dataclass(frozen=True, eq=False)
class SelectedRows:
    """Some rows of a document's keys and values."""

    rows: Rows
    index: Tensor  # (rows,) int64

    @property
    def shape(self) -> tuple[int, int, int, int]:
        layers, heads, _, dim = self.rows.shape
        return layers, heads, len(self.index), dim

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of these rows, as stored."""
        return self.rows.nbytes * len(self.index) // max(1, self.rows.shape[2])

    def read(self, layers: slice, out: Tensor) -> None:
        """Read whole layers, copy the selected rows into `out` (layers, 2, heads, rows, head_dim)."""
        out.copy_(whole(self.rows, layers, out.device)[..., self.index.to(out.device), :])


@dataclass(frozen=True, eq=False)
class HeadRows:
    """Some heads of a document's keys and values, as a tensor-parallel rank holds them."""

    rows: Rows
    heads: slice

    @property
    def shape(self) -> tuple[int, int, int, int]:
        layers, heads, rows, dim = self.rows.shape
        return layers, len(range(heads)[self.heads]), rows, dim

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of these heads, as stored."""
        return self.rows.nbytes * self.shape[1] // max(1, self.rows.shape[1])

    def read(self, layers: slice, out: Tensor) -> None:
        """Read whole layers, copy the heads into `out` (layers, 2, heads, rows, head_dim)."""
        out.copy_(whole(self.rows, layers, out.device)[:, :, self.heads])


def whole(rows: Rows, layers: slice = slice(None), device: torch.device | None = None) -> Tensor:
    """Some layers (default: all) in memory of their own, (layers, 2, heads, rows, head_dim) of the rows' dtype."""
    count, *block = rows.shape
    out = torch.empty(len(range(count)[layers]), 2, *block, dtype=rows.dtype, device=device)
    rows.read(layers, out)
    return out


def select(cache: DocumentCache, index: Tensor) -> DocumentCache:
    """A cache with some of its rows alone, (rows,) int64 ascending; the others' places are left empty."""
    rows = None if cache.rows is None else SelectedRows(cache.rows, index)
    return replace(cache, offsets=cache.offsets[index], rows=rows)


@dataclass(eq=False)
class Rotation:
    """The rotary embedding of a model: what its attention expects of keys at their positions.

    Angles are computed as models do, in float32, so that rows rotated here equal rows that the model rotates itself. YaRN
    multiplies cos and sin by `scaling`: keys carry that from when they were computed, and rotating uses the plain angles.
    Channels beyond 2 * len(inv_freq) (partial rotary) are never rotated."""

    inv_freq: Tensor  # (rotary_dim / 2,) float32, CPU
    interleaved: bool = False  # GLM, Cohere: neighbouring channels are pairs; else channel i pairs with i + half
    scaling: float = 1.0  # of cos and sin (YaRN): keys made under another one are other keys
    _tables: dict[torch.device, Angles] = field(default_factory=dict, repr=False)

    def angles(self, positions: Tensor, device: torch.device | None = None) -> Angles:
        """cos and sin at positions (positions,) int64, 0 and above; read from a table that grows as needed."""
        device = positions.device if device is None else device
        end = int(positions.max()) + 1 if len(positions) else 0
        table = self._tables.get(device)
        if table is None or len(table[0]) < end:
            at = torch.arange(max(1024, 1 << (end - 1).bit_length()), dtype=torch.float32)
            angle = at[:, None] * self.inv_freq.float()[None]
            table = self._tables[device] = (angle.cos().to(device), angle.sin().to(device))
        at = positions.to(device)
        return table[0][at], table[1][at]

    def rotate(self, keys: Tensor, angles: Angles, out: Tensor | None = None, *, back: bool = False) -> Tensor:
        """Keys (..., rows, head_dim) rotated in float32 and rounded once, into `out` (default: a new tensor; may be `keys`).

        `back` takes a rotation off instead."""
        out = torch.empty_like(keys) if out is None else out
        cos, sin = angles[0], -angles[1] if back else angles[1]
        a, b = (part.float() for part in self._pairs(keys))  # views where keys are float32 already
        x, y = self._pairs(out)
        left = a * cos - b * sin  # both sides are computed before either is written: `out` may be `keys`
        right = b * cos + a * sin
        x.copy_(left)
        y.copy_(right)
        rest = 2 * len(self.inv_freq)
        if out is not keys and rest < keys.shape[-1]:
            out[..., rest:] = keys[..., rest:]
        return out

    def _pairs(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the two channels of every rotated pair, (..., rotary_dim / 2) each."""
        half = len(self.inv_freq)
        if self.interleaved:
            return keys[..., : 2 * half : 2], keys[..., 1 : 2 * half : 2]
        return keys[..., :half], keys[..., half : 2 * half]

    @property
    def identity(self) -> str:
        """What keys depend on, for the cache key."""
        scaled = (str(self.scaling),) if self.scaling != 1.0 else ()
        return digest_of(self.inv_freq.double(), str(self.interleaved), *scaled)

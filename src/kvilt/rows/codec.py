"""Codecs: keys and values in fewer bits. Stores keep and verify what a codec made; it is decoded while rows are placed.

Numbers share a scale in blocks: keys of one channel over the rows, values of one row over the channels (KIVI, arXiv 2402.02750).
Keys are held without any rotation, since a channel that turns with the position has no scale of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvilt.errors import ModelError
from kvilt.types import Layers, Which

AXIS: dict[Which, int] = {"keys": 1, "values": 2}  # along which numbers of (heads, rows, head_dim) share a scale
MARGIN = 2**-8  # grids are bfloat16: rounding one must not make its block's range smaller
TINY = 1e-30
GRID = ".grid"  # stands beside each tensor of numbers

Spec = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Codec(ABC):
    """Holds x as q where x = low + q * step; each block's step, and low unless it is 0, stand in a bfloat16 grid."""

    kind: ClassVar[str] = "numbers"
    name: ClassVar[str]
    dtype: ClassVar[torch.dtype] = torch.uint8
    block: ClassVar[int | None] = None  # numbers that share a step; None: all along the axis
    has_low: ClassVar[bool] = True

    @abstractmethod
    def step(self, low: Tensor, high: Tensor) -> Tensor:
        """The step of blocks whose numbers lie between low and high."""

    def encode(self, scaled: Tensor) -> Tensor:
        """q of (x - low) / step."""
        return scaled.round()

    def squeeze(self, numbers: Tensor) -> Tensor:
        """One number to an element -> as they are stored."""
        return numbers

    def spread(self, stored: Tensor) -> Tensor:
        """As they are stored -> one number to an element."""
        return stored

    def pack(self, rows: Tensor, which: Which) -> tuple[Tensor, Tensor]:
        """Numbers as stored, and grid, of one layer's (heads, rows, head_dim)."""
        rows, axis = rows.float(), AXIS[which]
        shape, size = list(rows.shape), self.block or max(rows.shape[AXIS[which]], 1)
        shape[axis] = -(-rows.shape[axis] // size)
        grid = torch.zeros(1 + self.has_low, *shape, dtype=torch.bfloat16)
        numbers = torch.empty(rows.shape, dtype=self.dtype)
        for x, q, (step, *low) in _blocks(axis, size, grid, rows, numbers):
            least, most = x.amin(axis + 1, keepdim=True), x.amax(axis + 1, keepdim=True)
            for into in low:
                least = into.copy_(least - least.abs() * MARGIN).float()
                x = x - least
            step.copy_((self.step(least, most) * (1 + MARGIN)).clamp(min=TINY))
            q.copy_(self.encode(x / step.float()))
        return self.squeeze(numbers), grid

    def unpack(self, stored: Tensor, grid: Tensor, which: Which, out: Tensor | None = None) -> Tensor:
        """What `pack` was given, each number within a step; float32, or of `out`'s dtype if that is given."""
        numbers, axis = self.spread(stored), AXIS[which]
        fits = out is not None and out.dtype == torch.float32
        exact = out if out is not None and fits else torch.empty(numbers.shape, device=numbers.device)
        size = self.block or max(numbers.shape[axis], 1)
        for x, q, (step, *low) in _blocks(axis, size, grid.float(), exact, numbers):
            x.copy_(q).mul_(step)
            for least in low:
                x.add_(least)
        return exact if out is None or exact is out else out.copy_(exact)


def _blocks(axis: int, size: int, grid: Tensor, *rows: Tensor) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, ...]]]:
    """Views of the whole blocks, then of what is left over: rows (..., blocks, size, ...), grid (..., blocks, 1, ...)."""
    whole, left = divmod(rows[0].shape[axis], size)
    for first, count, length in ((0, whole, size), (whole, 1, left)):
        if count and length:
            split = [count, length]
            x, q = (torch.unflatten(t.narrow(axis, first * size, count * length), axis, split) for t in rows)
            yield x, q, grid.narrow(axis + 1, first, count).unsqueeze(axis + 2).unbind()


@dataclass(frozen=True)
class Int8(Codec):
    """8-bit integers: keys per channel of the document, values per row; half of bfloat16's bytes."""

    name = "int8"

    def step(self, low: Tensor, high: Tensor) -> Tensor:
        return (high - low) / 255


@dataclass(frozen=True)
class Int4(Codec):
    """4-bit integers, two to a byte, in groups of 64: keys per channel over 64 rows, values per row over 64 channels."""

    name = "int4"
    block = 64

    def step(self, low: Tensor, high: Tensor) -> Tensor:
        return (high - low) / 15

    def squeeze(self, numbers: Tensor) -> Tensor:
        if numbers.shape[-1] % 2:
            raise ModelError(f"int4 holds channels in pairs, this model's heads have {numbers.shape[-1]}: use int8.")
        left, right = numbers.chunk(2, -1)
        return left | right << 4

    def spread(self, stored: Tensor) -> Tensor:
        return torch.cat([stored & 15, stored >> 4], -1)


@dataclass(frozen=True)
class Fp8(Codec):
    """8-bit floats (e4m3fn), keys scaled per channel, values per row: int8's bytes, larger errors, wider range."""

    name = "fp8"
    dtype = torch.float8_e4m3fn
    has_low = False

    def step(self, low: Tensor, high: Tensor) -> Tensor:
        return torch.maximum(low.abs(), high.abs()) / torch.finfo(self.dtype).max

    def encode(self, scaled: Tensor) -> Tensor:
        return scaled.to(self.dtype)

    def spread(self, stored: Tensor) -> Tensor:
        """Through float16, whose exponent counts from another place: exact, and four times as fast on a CPU."""
        bits = stored.view(torch.uint8).to(torch.int16)
        return ((bits & 0x7F) << 7 | (bits & 0x80) << 8).view(torch.float16).float() * 256


CODECS: dict[str, Codec] = {c.name: c for c in (Int8(), Int4(), Fp8())}


class Packed(ABC):
    """Layers held by a codec. Their keys are not rotated at all: `rope.Turned` reads them as everybody expects them."""

    codec: Codec

    @property
    @abstractmethod
    def specs(self) -> Mapping[str, Spec]:
        """Dtype and shape of every tensor, grids included."""

    @abstractmethod
    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """One tensor as it is stored; the next read may overwrite it."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(layers, heads, rows, head_dim)."""
        (heads, rows, _), layers = self.specs["keys.0"][1], len(self.specs) // 4
        return layers, heads, rows, self.specs[f"keys.0{GRID}"][1][-1]

    @property
    def dtype(self) -> torch.dtype:
        """What `fetch` returns: rows are rounded to the model's dtype only once, where they are placed."""
        return torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self.specs.values())

    def fetch(self, layer: int, which: Which, out: Tensor | None = None, device: torch.device | None = None) -> Tensor:
        """The decoded rows of one layer, keys without rotation; on `device`, where they are decoded, or in `out`."""
        name = f"{which}.{layer}"
        where = device or torch.device("cpu")
        grid = self.read(name + GRID).to(where, copy=True)
        return self.codec.unpack(self.read(name).to(where), grid, which, out)


class PackedLayers(Packed):
    """Packed rows in memory."""

    def __init__(self, codec: Codec, parts: Mapping[str, Tensor]) -> None:
        self.codec, self.parts = codec, parts
        self._specs = {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}

    @property
    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    @classmethod
    def of(cls, layers: Layers, codec: Codec, unturn: Callable[[Tensor], Tensor]) -> PackedLayers:
        """Pack layers; `unturn` takes the rotation from keys, in float32."""
        parts = {}
        for layer in range(layers.shape[0]):
            for which in AXIS:
                rows = layers.fetch(layer, which).float()
                rows = unturn(rows) if which == "keys" else rows
                parts[f"{which}.{layer}"], parts[f"{which}.{layer}{GRID}"] = codec.pack(rows, which)
        return cls(codec, parts)

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        return self.parts[name] if out is None else out.copy_(self.parts[name])

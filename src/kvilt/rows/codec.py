"""Codecs: keys and values in fewer bits, decoded while rows are placed.

Numbers share a scale in blocks: keys of one channel over the rows, values of one row over the channels (KIVI, arXiv 2402.02750).
That works because keys are stored without rotation: a channel that turns with the position has no scale of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvilt.errors import ModelError
from kvilt.types import Rows

SIDES = (("scales_keys", -2), ("scales_values", -1))  # along which axis of (..., rows, head_dim) numbers share a scale
MARGIN = 2**-8  # scales are bfloat16: rounding one must not make its block's range smaller
TINY = 1e-30


@dataclass(frozen=True)
class Codec(ABC):
    """Holds x as q where x = low + q * step; each block's step, and low unless it is 0, are its bfloat16 scales."""

    kind: ClassVar[str] = "numbers"
    name: ClassVar[str]
    dtype: ClassVar[torch.dtype] = torch.uint8
    block: ClassVar[int | None] = None  # numbers that share a step; None: all along the axis
    has_low: ClassVar[bool] = True
    to_item: ClassVar[int] = 1  # numbers that one stored item holds

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

    def quantise(self, rows: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Numbers as stored, and scales (layers, 1 or 2, heads, ...), of rows (layers, heads, rows, head_dim)."""
        x = self._split(rows.float(), axis)
        low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
        scales = []
        if self.has_low:
            low = (low - low.abs() * MARGIN).bfloat16()
            scales, x = [low], x - low.float()
        step = (self.step(low.float(), high) * (1 + MARGIN)).clamp(min=TINY).bfloat16()
        numbers = self._join(self.encode(x / step.float()).to(self.dtype), axis, rows.shape[axis])
        return self.squeeze(numbers), torch.stack([s.squeeze(axis) for s in (step, *scales)], 1)

    def scales(self, shape: Sequence[int], axis: int) -> tuple[int, ...]:
        """Shape of the scales of one side of rows (layers, heads, rows, head_dim)."""
        layers, *block = shape
        block[axis] = -(-block[axis] // (self.block or max(block[axis], 1)))
        return (layers, 1 + self.has_low, *block)

    def dequantise(self, stored: Tensor, scales: Tensor, axis: int) -> Tensor:
        """What `quantise` was given, each number within a step, float32."""
        numbers = self.spread(stored)
        x = self._split(numbers, axis).float()
        step, *low = (s.unsqueeze(axis) for s in scales.float().unbind(1))
        x = x.mul_(step) if x.dtype != numbers.dtype else x * step
        return self._join(x.add_(low[0]) if low else x, axis, numbers.shape[axis])

    def _split(self, rows: Tensor, axis: int) -> Tensor:
        """Rows with `axis` cut into (blocks, size); the last block is filled up with copies of its last number."""
        count = rows.shape[axis]
        size = self.block or max(count, 1)
        if short := -count % size:
            last = rows.narrow(axis, count - 1, 1)
            filling = [short if i == rows.dim() + axis else n for i, n in enumerate(rows.shape)]
            rows = torch.cat([rows, last.expand(filling)], axis)
        return torch.unflatten(rows, axis, (-(-count // size), size))

    def _join(self, blocks: Tensor, axis: int, count: int) -> Tensor:
        """The inverse of `_split`."""
        return blocks.flatten(axis - 1, axis).narrow(axis, 0, count)


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
    to_item = 2

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

    def spread(self, stored: Tensor) -> Tensor:
        """Through float16, whose exponent counts from another place: exact, and four times as fast on a CPU."""
        bits = stored.view(torch.uint8).to(torch.int16)
        return ((bits & 0x7F) << 7 | (bits & 0x80) << 8).view(torch.float16).float() * 256

    def encode(self, scaled: Tensor) -> Tensor:
        return scaled


CODECS: dict[str, Codec] = {c.name: c for c in (Int8(), Int4(), Fp8())}


@dataclass(frozen=True, eq=False)
class QuantisedRows:
    """Rows held by a codec: numbers (layers, 2, heads, rows, stored head_dim) and the scales of each side.

    `part(name, layers)` gives some layers of "rows", "scales_keys" or "scales_values", from memory or from a file."""

    codec: Codec
    shape: tuple[int, int, int, int]
    nbytes: int
    part: Callable[[str, slice], Tensor]

    @classmethod
    def of(cls, rows: Rows, codec: Codec) -> QuantisedRows:
        """Quantise rows of any kind, in memory."""
        layers, heads, count, dim = rows.shape
        data = torch.empty(layers, 2, heads, count, dim)
        rows.read(slice(None), data)
        numbers, scales = zip(*(codec.quantise(data[:, i], axis) for i, (_, axis) in enumerate(SIDES)), strict=True)
        parts = {"rows": torch.stack(numbers, 1), **{name: s for (name, _), s in zip(SIDES, scales, strict=True)}}
        size = sum(part.nbytes for part in parts.values())
        return cls(codec, rows.shape, size, lambda name, layers: parts[name][layers])

    @property
    def dtype(self) -> torch.dtype:
        """Rows are rounded to the model's dtype only where they are placed."""
        return torch.float32

    def parts(self) -> dict[str, Tensor]:
        """Everything that is stored, by name, in the order of the file."""
        return {name: self.part(name, slice(None)) for name in ("rows", *(name for name, _ in SIDES))}

    def read(self, layers: slice, out: Tensor) -> None:
        """Dequantise some layers into `out` (layers, 2, heads, rows, head_dim), on the device where it lies."""
        numbers = self.part("rows", layers).to(out.device)  # fewer bytes to upload than decoded rows
        for side, (name, axis) in enumerate(SIDES):
            scales = self.part(name, layers).to(out.device)
            out[:, side] = self.codec.dequantise(numbers[:, side], scales, axis)

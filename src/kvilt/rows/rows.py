"""Rows in memory and in a file, some rows of others, and the rotation that puts keys where they are used.

Keys are stored without any rotation. One rotation, at the row's final position, is then all that any reader needs: the
engine, vLLM's workers, quantised rows (whose channels share scales only without rotation), and strategies that compare
keys. `docs/how-it-works.md` has the measurement of what this costs in half precision."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from kvilt.errors import DamagedCache, UnreadableCache
from kvilt.rows.header import FIRST, Header, Readable, Span
from kvilt.types import DocumentCache, Rows

CHUNK = 1 << 20  # numbers rotated at a time on a CPU, so that what float32 needs of them stays in its cache
DIRECT = 8 << 10  # bytes of a block from which on it is read straight to where it is used
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}
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
class PartRows:
    """Some rows of a document's keys and values, or some heads, as a tensor-parallel rank holds them."""

    rows: Rows
    index: Tensor | slice = field(default_factory=lambda: slice(None))  # rows, (rows,) int64
    heads: slice = field(default_factory=lambda: slice(None))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        layers, heads, rows, dim = self.rows.shape
        count = len(range(rows)[self.index] if isinstance(self.index, slice) else self.index)
        return layers, len(range(heads)[self.heads]), count, dim

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of these rows and heads, as stored."""
        _, heads, rows, _ = self.rows.shape
        return self.rows.nbytes * self.shape[1] * self.shape[2] // max(1, heads * rows)

    def read(self, layers: slice, out: Tensor) -> None:
        """Read whole layers, copy these rows and heads into `out` (layers, 2, heads, rows, head_dim)."""
        index = self.index if isinstance(self.index, slice) else self.index.to(out.device)
        out.copy_(whole(self.rows, layers, out.device)[:, :, self.heads, index])


def whole(rows: Rows, layers: slice = slice(None), device: torch.device | None = None) -> Tensor:
    """Some layers (default: all) in memory of their own, (layers, 2, heads, rows, head_dim) of the rows' dtype."""
    count, *block = rows.shape
    out = torch.empty(len(range(count)[layers]), 2, *block, dtype=rows.dtype, device=device)
    rows.read(layers, out)
    return out


def select(cache: DocumentCache, index: Tensor) -> DocumentCache:
    """A cache with some of its rows alone, (rows,) int64 ascending; the others' places are left empty."""
    rows = None if cache.rows is None else PartRows(cache.rows, index)
    return replace(cache, offsets=cache.offsets[index], rows=rows)


def fill(blob: Readable, key: str, offset: int, into: Sequence[memoryview]) -> None:
    """Read bytes of a stored document. Raises DamagedCache where they end early, UnreadableCache where reading fails."""
    try:
        if into:
            blob.read(offset, into)
    except EOFError as error:
        raise DamagedCache(key, "it is cut off") from error
    except OSError as error:
        raise UnreadableCache(key, error.strerror or str(error)) from error


class _Scratch(threading.local):
    """One growing buffer per thread, so that reading touches no fresh memory."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = dtype.itemsize * torch.Size(shape).numel()
        if self.buffer.numel() < size:
            with torch.inference_mode(False):
                self.buffer = torch.empty(-(-size // (1 << 20)) << 20, dtype=torch.uint8)
        return self.buffer[:size].view(dtype).view(*shape)


_scratch = _Scratch()


class FileRows:
    """The rows of one file, read straight into the caller's memory and checked when a layer is read for the first time.

    The file is immutable: what has been checked once in this process is not checked again while the file stays open."""

    def __init__(self, blob: Readable, header: Header, digests: Tensor, to_item: int = 1) -> None:
        self.blob, self.header = blob, header
        self._span = header.spans["rows"]
        memory: memoryview | None = getattr(blob, "memory", None)
        self._memory = None if memory is None or memory.readonly else torch.frombuffer(memory, dtype=torch.uint8)
        self._digests = bytes(digests.numpy().tobytes())
        self._blocks = digests.shape[1]
        self._unchecked = {(name, layer) for name in self._parts() for layer in range(self._span.shape[0])}
        layers, _, heads, rows, dim = self._span.shape
        self.shape: tuple[int, int, int, int] = (layers, heads, rows, dim * to_item)
        self.dtype = DTYPES[self._span.dtype]
        self.nbytes = sum(header.spans[name].end - header.spans[name].start for name in self._parts())
        if digests.shape != (layers, 2 * heads + len(self._parts()) - 1, 32):
            raise DamagedCache(header.key, "its digests are not those of its rows")

    def _parts(self) -> list[str]:
        return [name for name in self.header.spans if name not in FIRST]

    def read(self, layers: slice, out: Tensor) -> None:
        """Read some layers into `out` (layers, 2, heads, rows, head_dim). Raises DamagedCache, OSError.

        No copy is made where every head of `out` is one contiguous block of the stored dtype in CPU memory."""
        count = range(self.shape[0])[layers]
        if not len(count) or not out.numel():
            return
        if self._memory is not None:
            out.copy_(self.part("rows", layers))
            return
        block = out[0, 0, 0]  # (rows, head_dim)
        there = out.device.type == "cpu" and out.dtype == self.dtype
        direct = there and block.is_contiguous() and block.nbytes >= DIRECT
        target = out if direct else _scratch.take([len(count), *self._span.shape[1:]], self.dtype)
        self._read("rows", self._span, count, target)
        if not direct:
            out.copy_(target)

    def part(self, name: str, layers: slice) -> Tensor:
        """Some layers of one of the file's tensors (layers, ...): where they lie in memory, else in memory of their own."""
        span, count = self.header.spans[name], range(self.shape[0])[layers]
        if self._memory is not None:
            return self._lent(name, span, count)
        out = torch.empty([len(count), *span.shape[1:]], dtype=DTYPES[span.dtype])
        if out.numel():
            self._read(name, span, count, out)
        return out

    def _lent(self, name: str, span: Span, layers: range) -> Tensor:
        assert self._memory is not None
        if span.end > len(self._memory):
            raise DamagedCache(self.header.key, "it is cut off")
        out = self._memory[span.start : span.end].view(DTYPES[span.dtype]).view(span.shape)[layers.start : layers.stop]
        self._verify(name, layers, list(_pieces(out, heads=name == "rows")) if self._unchecked else [])
        return out

    def _read(self, name: str, span: Span, layers: range, out: Tensor) -> None:
        size = (span.end - span.start) // span.shape[0]  # bytes of a layer
        scattered = not out.is_contiguous()
        pieces = list(_pieces(out, heads=name == "rows")) if self._unchecked or scattered else []  # one per digest
        into = pieces if scattered else [memoryview(out.detach().view(-1).view(torch.uint8).numpy().data)]
        fill(self.blob, self.header.key, span.start + layers.start * size, into)
        self._verify(name, layers, pieces)

    def _verify(self, name: str, layers: range, pieces: list[memoryview]) -> None:
        """Check the layers that were not checked before; `pieces` has a memoryview for each of their digests, in order."""
        first = 0 if name == "rows" else self._blocks - len(self._parts()) + self._parts().index(name)
        for i, layer in enumerate(layers):
            if (name, layer) in self._unchecked:
                each = len(pieces) // len(layers)
                self._check(name, layer, first, pieces[i * each : (i + 1) * each])
                if not getattr(self.blob, "remote", False):  # what comes from another machine comes anew every time
                    self._unchecked.discard((name, layer))

    def _check(self, name: str, layer: int, first: int, pieces: Sequence[memoryview]) -> None:
        for number, piece in enumerate(pieces, layer * self._blocks + first):
            if blake3(piece).digest() != self._digests[32 * number : 32 * number + 32]:
                raise DamagedCache(self.header.key, f"{name} of layer {layer} does not match its digest")


def _pieces(out: Tensor, heads: bool) -> Iterator[memoryview]:
    """The memory of a tensor (layers, ...) in order: for rows head by head, else layer by layer."""
    array: Any = out.detach().view(torch.uint8).numpy()
    blocks = (head for layer in array for side in layer for head in side) if heads else iter(array)
    return (block.reshape(-1).data for block in blocks)


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
        if keys.device.type == "cpu" and keys.numel() > CHUNK and keys.dim() > 2:
            size = max(1, CHUNK * len(keys) // keys.numel())
            for some, into in zip(torch.split(keys, size), torch.split(out, size), strict=True):
                self.rotate(some[0] if size == 1 else some, angles, into[0] if size == 1 else into, back=back)
            return out
        cos, sin, rest = angles[0], -angles[1] if back else angles[1], 2 * len(self.inv_freq)
        work = keys[..., :rest].to(torch.float32, copy=True)  # (..., rows, rotary_dim)
        a, b = self._pairs(work)
        turned = (a * cos).addcmul_(b, sin, value=-1)  # in place: fresh memory is slow
        b.mul_(cos).addcmul_(a, sin)
        a.copy_(turned)
        out[..., :rest] = work
        if out is not keys and rest < keys.shape[-1]:
            out[..., rest:] = keys[..., rest:]
        return out

    def plain(self, data: Tensor, positions: Tensor) -> TensorRows:
        """Rows (layers, 2, heads, rows, head_dim) without the rotation of these positions (rows,); `data` itself is changed."""
        angles = self.angles(positions, data.device)
        self.rotate(data[:, 0], angles, data[:, 0], back=True)
        return TensorRows(data)

    def _pairs(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the two channels of every rotated pair, (..., rotary_dim / 2) each."""
        half = len(self.inv_freq)
        if self.interleaved:
            return keys[..., : 2 * half : 2], keys[..., 1 : 2 * half : 2]
        return keys[..., :half], keys[..., half : 2 * half]

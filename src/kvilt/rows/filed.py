"""The rows of one stored document, read straight from its file into the caller's memory and checked on every read."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import Tensor

from kvilt.errors import DamagedCache
from kvilt.rows.codec import CODECS, Packed, Spec
from kvilt.types import CacheKey, Which

CHUNK = 256 << 10  # read this much, digest it while it is still in the processor's cache


@dataclass(frozen=True)
class Span:
    """Where one tensor lies in the file (bytes from the beginning), and the BLAKE3 digest of those bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    digest: str


@dataclass(frozen=True)
class Header:
    """What a file says of itself. Times are seconds since the epoch."""

    key: CacheKey
    length: int
    dropped: int
    title: str
    namespace: str
    created: float
    expires: float | None
    codec: str
    spans: dict[str, Span]
    bytes: int  # of the whole file


class _Scratch(threading.local):
    """One growing buffer per thread, so that reading allocates nothing."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, span: Span) -> Tensor:
        size = span.end - span.start
        if self.buffer.numel() < size:
            with torch.inference_mode(False):  # a tensor born in inference mode could never serve a trainer
                self.buffer = torch.empty(-(-size // (1 << 20)) << 20, dtype=torch.uint8)
        return self.buffer[:size].view(span.dtype).view(span.shape)


_scratch = _Scratch()


class FileLayers:
    """Keys and values of one file (codec `raw`)."""

    def __init__(self, fd: int, header: Header) -> None:
        self._fd = fd  # kept open: an evicted file stays readable for whoever found it before
        self.header = header
        rows = {name: s for name, s in header.spans.items() if name.startswith(("keys.", "values."))}
        self._specs = {name: (span.dtype, span.shape) for name, span in rows.items()}
        self._nbytes = sum(span.end - span.start for span in rows.values())
        self._close = weakref.finalize(self, os.close, fd)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        heads, rows, dim = self.header.spans["keys.0"].shape
        return len(self.specs) // 2, heads, rows, dim

    @property
    def dtype(self) -> torch.dtype:
        return self.header.spans["keys.0"].dtype

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Dtype and shape of every tensor of rows."""
        return self._specs

    @property
    def nbytes(self) -> int:
        """Bytes of the rows as stored."""
        return self._nbytes

    def fetch(self, layer: int, which: Which, out: Tensor | None = None) -> Tensor:
        """The (heads, rows, head_dim) rows of one layer, written into `out` if given.

        Without `out` they lie in a buffer that this thread's next fetch overwrites. No copy is made when every head of
        `out` is one contiguous block of the stored dtype in CPU memory. Raises DamagedCache."""
        return self.read(f"{which}.{layer}", out)

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """One tensor of the file, its digest verified over the bytes just read. Raises DamagedCache."""
        span = self.header.spans[name]
        if out is not None and tuple(out.shape) != span.shape:
            raise ValueError(f"{name} is {span.shape}, the buffer for it {tuple(out.shape)}")
        target = out if out is not None and _takes_bytes(out, span.dtype) else _scratch.take(span)
        self._fill(target, name, span)
        return target if out is None or target is out else out.copy_(target)

    def close(self) -> None:
        """Close the file now rather than with the last reference."""
        self._close()

    def _fill(self, target: Tensor, name: str, span: Span) -> None:
        hasher, offset = blake3(), span.start
        for pieces in _pieces(target) if span.end > span.start else ():
            want = sum(len(piece) for piece in pieces)
            try:
                got = os.preadv(self._fd, pieces, offset)
            except OSError as error:
                raise DamagedCache(self.header.key.digest, f"{name} cannot be read: {error.strerror}") from error
            if got != want:
                raise DamagedCache(self.header.key.digest, f"{name} is cut off")
            for piece in pieces:
                hasher.update(piece)
            offset += want
        if hasher.hexdigest() != span.digest:
            raise DamagedCache(self.header.key.digest, f"{name} does not match its digest")


class PackedFile(Packed, FileLayers):
    """Keys and values of one file whose codec is not `raw`: read and verified in the same way, decoded when fetched."""

    def __init__(self, fd: int, header: Header) -> None:
        FileLayers.__init__(self, fd, header)
        self.codec = CODECS[header.codec]

    specs = FileLayers.specs
    read = FileLayers.read


def _takes_bytes(out: Tensor, dtype: torch.dtype) -> bool:
    if out.device.type != "cpu" or out.dtype != dtype:
        return False
    return out.is_contiguous() or (out.ndim > 1 and out[0].is_contiguous())


def _pieces(target: Tensor) -> Iterator[list[memoryview]]:
    """The memory of a tensor in order, as lists of about CHUNK bytes for one `preadv` each."""
    array = target.detach().view(torch.uint8).numpy()
    blocks = array.reshape(1, -1) if target.is_contiguous() else array.reshape(len(array), -1)
    group: list[memoryview] = []
    size = 0
    for block in blocks:
        view = block.data
        for start in range(0, len(view), CHUNK):
            group.append(view[start : start + CHUNK])
            size += len(group[-1])
            if size >= CHUNK or len(group) == 512:  # 512: well below the system's limit on buffers per call
                yield group
                group, size = [], 0
    if group:
        yield group

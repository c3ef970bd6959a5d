"""Document caches as bytes and back (the format is described in `rows.header`). No pickle anywhere."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from kvilt.errors import DamagedCache, DocumentError, UnreadableCache
from kvilt.rows.codec import CODECS, SIDES, QuantisedRows
from kvilt.rows.header import (
    DIGEST_AT,
    FIRST,
    ITEM,
    MAX_HEADER,
    MAX_TITLE,
    VERSION,
    Header,
    Readable,
    Span,
    read_header,
)
from kvilt.rows.rows import whole
from kvilt.types import CacheKey, DocumentCache, Rows

RAW = "raw"
NO_DIGEST = "0" * 64  # stands in a header until its own digest is known
PAGE = 4096
DIRECT = 8 << 10  # bytes of a block from which on it is read straight to where it is used
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def pack(
    cache: DocumentCache, *, title: str = "", created: float = 0.0, expires: float | None = None
) -> list[memoryview]:
    """The file of a cache: its header, then its tensors. Raises DocumentError for names that are too long to store."""
    rows = cache.rows
    if rows is None:
        raise ValueError("a document that was tokenised only has no rows to store")
    if len(title.encode("utf-8", "replace")) > MAX_TITLE:
        raise DocumentError(f"the title {title[:40]!r}... is longer than {MAX_TITLE} bytes: shorten it.")
    quantised = isinstance(rows, QuantisedRows)
    parts = rows.parts() if isinstance(rows, QuantisedRows) else {"rows": whole(rows)}
    first = {name: tensor for name in FIRST[:3] if (tensor := getattr(cache, name)) is not None}
    tensors = {**first, "digests": _digests(parts), **parts}
    data = {name: _bytes(tensor) for name, tensor in tensors.items()}
    meta = {
        "format": "kvilt",
        "version": VERSION,
        "codec": rows.codec.name if quantised else RAW,  # type: ignore[attr-defined]
        "key": cache.key.digest,
        "fields": json.dumps(asdict(cache.key)),
        "length": str(cache.length),
        "dropped": str(cache.dropped),
        "title": title.encode("utf-8", "replace").decode(),  # other libraries refuse half characters
        "created": repr(created),
        "expires": "" if expires is None else repr(expires),
        **{f"digest.{name}": blake3(data[name]).hexdigest() for name in FIRST if name in data},
    }
    shapes = {name: (_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    return [memoryview(_write_header(meta, shapes)), *data.values()]


def _write_header(meta: Mapping[str, str], tensors: Mapping[str, tuple[str, Sequence[int]]]) -> bytes:
    """The bytes before the first tensor, padded so that the rows begin on a page; `tensors` are dtypes and shapes."""
    spans: dict[str, dict[str, Any]] = {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + ITEM[dtype] * math.prod(shape)
        spans[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({"__metadata__": {"header": NO_DIGEST, **meta}, **spans}, separators=(",", ":"))
    text += " " * (-(8 + len(text) + int(spans["rows"]["data_offsets"][0])) % PAGE)
    if 8 + len(text) > MAX_HEADER:
        raise DocumentError("the document's title, namespace and compression take more than a file's header holds.")
    raw = len(text).to_bytes(8, "little") + text.encode()
    seal = blake3(raw[:DIGEST_AT]).update(raw[DIGEST_AT + 64 :]).hexdigest()
    return raw[:DIGEST_AT] + seal.encode() + raw[DIGEST_AT + 64 :]


def _digests(parts: dict[str, Tensor]) -> Tensor:
    """BLAKE3 of every block, (layers, blocks, 32) uint8."""
    layers = [
        b"".join(blake3(_bytes(block)).digest() for block in _blocks(parts, i)) for i in range(len(parts["rows"]))
    ]
    return torch.frombuffer(bytearray(b"".join(layers)), dtype=torch.uint8).view(len(layers), -1, 32)


def _blocks(parts: dict[str, Tensor], layer: int) -> Iterator[Tensor]:
    """What has a digest of its own in one layer: each head's keys, each head's values, scales of each side."""
    yield from parts["rows"][layer].flatten(0, 1)
    yield from (tensor[layer] for name, tensor in parts.items() if name != "rows")


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def open_cache(blob: Readable, expected: CacheKey) -> DocumentCache:
    """A stored cache, whose rows are read and checked when they are needed; the blob is kept as long as the cache lives.

    Raises DamagedCache for whatever is not a whole, unaltered file holding `expected`, OtherVersion, and OSError."""
    header = read_header(expected.digest, blob)
    key = CacheKey(**header.fields) if set(header.fields) == set(asdict(expected)) else None
    if key != expected:
        raise DamagedCache(expected.digest, "its key does not match its identity fields")
    with torch.inference_mode(False):  # a tensor born in inference mode could never serve a trainer
        first = {name: _first(blob, header, name) for name in FIRST if name in header.spans}
    rows, places = _rows(blob, header, first.pop("digests")), first["offsets"]
    if len(places) and not 0 <= int(places[0]) <= int(places[-1]) < header.length:
        raise DamagedCache(expected.digest, "its rows have places outside the document")
    return DocumentCache(length=header.length, key=expected, rows=rows, dropped=header.dropped, **first)


def _rows(blob: Readable, header: Header, digests: Tensor) -> Rows:
    codec = CODECS.get(header.codec)
    if codec is None and header.codec != RAW:
        raise DamagedCache(header.key, f"its codec {header.codec!r} is not known to this Kvilt")
    rows = FileRows(blob, header, digests, 1 if codec is None else codec.to_item)
    wanted = {} if codec is None else {name: codec.scales(rows.shape, axis) for name, axis in SIDES}
    if {name: span.shape for name, span in header.spans.items() if name not in (*FIRST, "rows")} != wanted:
        raise DamagedCache(header.key, "its tensors are not those of its codec")
    return rows if codec is None else QuantisedRows(codec, rows.shape, rows.nbytes, rows.part)


def _first(blob: Readable, header: Header, name: str) -> Tensor:
    """One of the small tensors before the rows, checked."""
    span = header.spans[name]
    out = torch.empty(span.shape, dtype=_DTYPES[span.dtype])
    data = _bytes(out)
    _fill(blob, header.key, span.start, [data] if len(data) else [])
    if blake3(data).hexdigest() != header.digests[name]:
        raise DamagedCache(header.key, f"{name} does not match its digest")
    return out


def _fill(blob: Readable, key: str, offset: int, into: Sequence[memoryview]) -> None:
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
        self._digests = bytes(digests.numpy().tobytes())
        self._blocks = digests.shape[1]
        self._unchecked = {(name, layer) for name in self._parts() for layer in range(self._span.shape[0])}
        layers, _, heads, rows, dim = self._span.shape
        self.shape: tuple[int, int, int, int] = (layers, heads, rows, dim * to_item)
        self.dtype = _DTYPES[self._span.dtype]
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
        block = out[0, 0, 0]  # (rows, head_dim)
        direct = (
            out.device.type == "cpu" and out.dtype == self.dtype and block.is_contiguous() and block.nbytes >= DIRECT
        )
        target = out if direct else _scratch.take([len(count), *self._span.shape[1:]], self.dtype)
        self._read("rows", self._span, count, target)
        if not direct:
            out.copy_(target)

    def part(self, name: str, layers: slice) -> Tensor:
        """Some layers of one of the file's tensors (layers, ...), in memory of their own."""
        span, count = self.header.spans[name], range(self.shape[0])[layers]
        out = torch.empty([len(count), *span.shape[1:]], dtype=_DTYPES[span.dtype])
        if out.numel():
            self._read(name, span, count, out)
        return out

    def _read(self, name: str, span: Span, layers: range, out: Tensor) -> None:
        size = (span.end - span.start) // span.shape[0]  # bytes of a layer
        unchecked = [layer for layer in layers if (name, layer) in self._unchecked]
        scattered = not out.is_contiguous()
        pieces = list(_pieces(out, heads=name == "rows")) if unchecked or scattered else []  # one memoryview per digest
        into = pieces if scattered else [_bytes_of(out)]
        _fill(self.blob, self.header.key, span.start + layers.start * size, into)
        each = len(pieces) // len(layers)
        first = 0 if name == "rows" else self._blocks - len(self._parts()) + self._parts().index(name)
        for layer in unchecked:
            i = layer - layers.start
            self._check(name, layer, first, pieces[i * each : (i + 1) * each])
            self._unchecked.discard((name, layer))

    def _check(self, name: str, layer: int, first: int, pieces: Sequence[memoryview]) -> None:
        for number, piece in enumerate(pieces, layer * self._blocks + first):
            if blake3(piece).digest() != self._digests[32 * number : 32 * number + 32]:
                raise DamagedCache(self.header.key, f"{name} of layer {layer} does not match its digest")


def _pieces(out: Tensor, heads: bool) -> Iterator[memoryview]:
    """The memory of a tensor (layers, ...) in order: for rows head by head, else layer by layer."""
    array: Any = out.detach().view(torch.uint8).numpy() if out.dtype != torch.uint8 else out.detach().numpy()
    if not heads:
        yield from (memoryview(layer.reshape(-1).data) for layer in array)
        return
    for layer in array:
        for side in layer:
            yield from (memoryview(head.reshape(-1).data) for head in side)


def _bytes_of(out: Tensor) -> memoryview:
    """The memory itself of a contiguous tensor in CPU memory."""
    return memoryview(out.detach().view(-1).view(torch.uint8).numpy().data)

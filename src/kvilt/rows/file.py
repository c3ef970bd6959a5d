"""Document caches as bytes and back (the format is described in `rows.header`). No pickle anywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from kvilt.errors import DamagedCache, DocumentError
from kvilt.rows import header as h
from kvilt.rows.codec import CODECS, SIDES, QuantisedRows
from kvilt.rows.header import FIRST, Header, Readable, read_header
from kvilt.rows.rows import DTYPES, FileRows, fill, whole
from kvilt.types import CacheKey, DocumentCache, Rows, bytes_of

RAW = "raw"
NO_DIGEST = "0" * 64  # stands in a header until its own digest is known
PAGE = 4096
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def pack(
    cache: DocumentCache, *, title: str = "", created: float = 0.0, expires: float | None = None
) -> list[memoryview]:
    """The file of a cache: its header, then its tensors. Raises DocumentError for names that are too long to store."""
    rows = cache.rows
    if rows is None:
        raise ValueError("a document that was tokenised only has no rows to store")
    if len(title.encode("utf-8", "replace")) > h.MAX_TITLE:
        raise DocumentError(f"the title {title[:40]!r}... is longer than {h.MAX_TITLE} bytes: shorten it.")
    codec, parts = (rows.codec.name, rows.parts()) if isinstance(rows, QuantisedRows) else (RAW, {"rows": whole(rows)})
    first = {name: tensor for name in FIRST[:-1] if (tensor := getattr(cache, name)) is not None}
    tensors = {**first, "digests": _digests(parts), **parts}
    data = {name: bytes_of(tensor) for name, tensor in tensors.items()}
    meta = {
        "format": "kvilt",
        "version": h.VERSION,
        "codec": codec,
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
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + h.ITEM[dtype] * math.prod(shape)
        spans[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"header": NO_DIGEST, **meta}, **spans}, separators=(",", ":"))
    text += " " * (-(8 + len(text) + int(spans["rows"]["data_offsets"][0])) % PAGE)
    if 8 + len(text) > h.MAX_HEADER:
        raise DocumentError("the document's title, namespace and compression take more than a file's header holds.")
    raw = len(text).to_bytes(8, "little") + text.encode()
    seal = blake3(raw[: h.DIGEST_AT]).update(raw[h.DIGEST_AT + 64 :]).hexdigest()
    return raw.replace(NO_DIGEST.encode(), seal.encode(), 1)


def _digests(parts: dict[str, Tensor]) -> Tensor:
    """BLAKE3 of every block, (layers, blocks, 32) uint8: of a layer each head's keys, each head's values, each side's scales."""
    rows, *scales = parts.values()
    blocks = (block for heads, *others in zip(rows.flatten(1, 2), *scales, strict=True) for block in (*heads, *others))
    digests = bytearray(b"".join(blake3(bytes_of(block)).digest() for block in blocks))
    return torch.frombuffer(digests, dtype=torch.uint8).view(len(rows), -1, 32)


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


def check_file(blob: Readable, digest: str) -> None:
    """Read a stored document completely. Raises DamagedCache, OtherVersion, OSError."""
    fields = read_header(digest, blob).fields
    key = CacheKey(**fields) if fields.keys() == CacheKey.__dataclass_fields__.keys() else None
    if key is None or key.digest != digest:
        raise DamagedCache(digest, "its key does not match its identity fields")
    if rows := open_cache(blob, key).rows:
        whole(rows)


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
    out = torch.empty(span.shape, dtype=DTYPES[span.dtype])
    data = bytes_of(out)
    fill(blob, header.key, span.start, [data] if len(data) else [])
    if blake3(data).hexdigest() != header.digests[name]:
        raise DamagedCache(header.key, f"{name} does not match its digest")
    return out

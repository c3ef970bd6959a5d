"""The file of one stored document: a safetensors file that any safetensors library reads.

Tensors: `tokens`, `offsets` (int64), `chunks` (int64, only of documents that were encoded in chunks) and per layer
`keys.{i}`, `values.{i}`, contiguous (heads, rows, head_dim).
Metadata: format and version, key digest and identity fields, length, dropped, title, namespace, times, codec, and a
BLAKE3 digest of every tensor. The header's own digest stands first, at a fixed place, and covers every other byte of
the header; so no bit of the file can change unnoticed. No pickle anywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from kvilt.errors import DamagedCache
from kvilt.rows.codec import CODECS, Packed, Spec
from kvilt.rows.filed import FileLayers, Header, PackedFile, Span
from kvilt.stores.process import Owner
from kvilt.types import CacheKey, DocumentCache

VERSION = "1"
SUFFIX = ".safetensors"
READERS: dict[str, type[FileLayers]] = {"raw": FileLayers, **dict.fromkeys(CODECS, PackedFile)}  # by codec

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
_NO_DIGEST = "0" * 64
_OPENING = b'{"__metadata__":{"header":"'  # the header's digest follows, behind the 8 bytes of its length
_DIGEST_AT = 8 + len(_OPENING)
_FIRST = ("tokens", "offsets", "chunks")  # what stands before the rows; chunks only where there are some
_PAGE = 4096
_MAX_HEADER = 64 << 20

Shapes = dict[str, Spec]


def write_file(
    path: Path,
    cache: DocumentCache,
    *,
    title: str = "",
    namespace: str = "default",
    created: float | None = None,
    expires: float | None = None,
) -> int:
    """Write a cache so that the file is there completely or not at all, whatever happens; its size in bytes.

    Raises OSError, leaving nothing behind, and DamagedCache if the rows come from a damaged file.
    """
    meta = _metadata(cache, title, namespace, time.time() if created is None else created, expires)
    temporary = path.with_name(f".{path.stem[:16]}.{Owner.current().tag}.{secrets.token_hex(4)}.tmp")
    try:
        size = _write_temporary(temporary, cache, meta)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)
    return size


def sync_folder(path: Path) -> None:
    """Make names in a folder durable; some file systems cannot, and need not."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)


def file_size(cache: DocumentCache, *, title: str = "", namespace: str = "default") -> int:
    """Bytes that `write_file` would write (within a page)."""
    header = _header(_metadata(cache, title, namespace, time.time(), time.time()), _shapes(cache), {})
    return len(header) + sum(_nbytes(*spec) for spec in _shapes(cache).values())


def open_file(path: Path, expected: CacheKey | None = None) -> DocumentCache:
    """Open a stored cache, whose rows are read and verified when fetched; the file is open as long as the cache lives.

    Raises DamagedCache for whatever is not a whole, unaltered file of this version holding `expected`; OSError.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        header = _read_header(fd, path.stem, expected)
        layers = READERS[header.codec](fd, header)
    except BaseException:
        os.close(fd)
        raise
    with torch.inference_mode(False):
        first = {name: layers.read(name).clone() for name in _FIRST if name in header.spans}
    return DocumentCache(length=header.length, key=header.key, layers=layers, dropped=header.dropped, **first)


def read_header(path: Path) -> Header:
    """What a file says of itself, verified, without reading its rows. Raises DamagedCache, OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return _read_header(fd, path.stem, None)
    finally:
        os.close(fd)


def _metadata(
    cache: DocumentCache, title: str, namespace: str, created: float, expires: float | None
) -> dict[str, str]:
    return {
        "format": "kvilt",
        "version": VERSION,
        "codec": cache.layers.codec.name if isinstance(cache.layers, Packed) else "raw",
        "key": cache.key.digest,
        "fields": json.dumps(asdict(cache.key)),
        "length": str(cache.length),
        "dropped": str(cache.dropped),
        "title": title.encode("utf-8", "replace").decode(),  # other libraries refuse half characters
        "namespace": namespace,
        "created": repr(created),
        "expires": "" if expires is None else repr(expires),
    }


def _shapes(cache: DocumentCache) -> Shapes:
    """Dtype and shape of every tensor, in file order."""
    if cache.layers is None:
        raise ValueError("a document that was tokenised only has no rows to store")
    shapes: Shapes = {name: (torch.int64, tuple(tensor.shape)) for name, tensor in _first(cache)}
    if isinstance(cache.layers, Packed):
        return {**shapes, **cache.layers.specs}
    count, *block = cache.layers.shape
    for i in range(count):
        shapes[f"keys.{i}"] = shapes[f"values.{i}"] = (cache.layers.dtype, tuple(block))
    return shapes


def _first(cache: DocumentCache) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name in _FIRST if (tensor := getattr(cache, name)) is not None]


def _tensors(cache: DocumentCache) -> Iterator[tuple[str, Tensor]]:
    yield from _first(cache)
    assert cache.layers is not None
    if isinstance(cache.layers, Packed):
        yield from ((name, cache.layers.read(name)) for name in cache.layers.specs)
        return
    for i in range(cache.layers.shape[0]):
        yield f"keys.{i}", cache.layers.fetch(i, "keys")
        yield f"values.{i}", cache.layers.fetch(i, "values")


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * torch.Size(shape).numel()


def _header(meta: dict[str, str], shapes: Shapes, digests: dict[str, str]) -> bytes:
    """Length and JSON, padded so that the first rows begin on a page; as long for absent digests as for real ones."""
    tensors, offset = {}, 0
    for name, (dtype, shape) in shapes.items():
        end = offset + _nbytes(dtype, shape)
        tensors[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    named = json.dumps({name: digests.get(name, _NO_DIGEST) for name in shapes})
    text = json.dumps(
        {"__metadata__": {"header": _NO_DIGEST, **meta, "digests": named}, **tensors}, separators=(",", ":")
    )
    before_rows = sum(_nbytes(*shapes[name]) for name in _FIRST if name in shapes)
    text += " " * (-(8 + len(text) + before_rows) % _PAGE)
    raw = len(text).to_bytes(8, "little") + text.encode()
    return raw[:_DIGEST_AT] + _seal(raw) + raw[_DIGEST_AT + 64 :]


def _seal(raw: bytes) -> bytes:
    """Digest of a header, but for the place where the digest itself stands."""
    return blake3(raw[:_DIGEST_AT]).update(raw[_DIGEST_AT + 64 :]).hexdigest().encode()


def _write_temporary(path: Path, cache: DocumentCache, meta: dict[str, str]) -> int:
    """Rows first, then the header with their digests; everything is on the disk when this returns."""
    shapes = _shapes(cache)
    offset = len(_header(meta, shapes, {}))
    digests: dict[str, str] = {}
    with open(path, "xb", buffering=0) as file:
        for name, tensor in _tensors(cache):
            if (tensor.dtype, tuple(tensor.shape)) != shapes[name]:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {shapes[name]}")
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            digests[name] = blake3(data).hexdigest()
            _write_all(file.fileno(), data, offset)
            offset += len(data)
        _write_all(file.fileno(), memoryview(_header(meta, shapes, digests)), 0)
        os.fsync(file.fileno())
    return offset


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def _read_header(fd: int, name: str, expected: CacheKey | None) -> Header:
    try:
        header = _parse(fd)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCache(name, str(error) if type(error) is ValueError else "its header is malformed") from error
    if expected is not None and header.key != expected:
        raise DamagedCache(name, f"it holds another document, {header.key.digest[:16]}")
    return header


def _parse(fd: int) -> Header:
    size = os.fstat(fd).st_size
    raw = os.pread(fd, 64 << 10, 0)
    length = 8 + int.from_bytes(raw[:8], "little")
    if not _DIGEST_AT + 64 < length <= min(size, _MAX_HEADER):
        raise ValueError("it is cut off, or not a safetensors file")
    raw = raw[:length] if len(raw) >= length else os.pread(fd, length, 0)
    if not raw[8:].startswith(_OPENING):
        raise ValueError("its header is not one of Kvilt's")
    data = json.loads(raw[8:])
    meta = data.pop("__metadata__")
    if problem := _version_problem(meta):
        raise ValueError(problem)
    if raw[_DIGEST_AT : _DIGEST_AT + 64] != _seal(raw):
        raise ValueError("its header does not match its digest")
    return _header_of(meta, _spans(data, json.loads(meta["digests"]), length, size), size)


def _version_problem(meta: dict[str, str]) -> str:
    """Why another version's file cannot be read (empty if it is not that)."""
    if meta["version"] != VERSION:
        return f"it has format version {meta['version']}, this Kvilt reads {VERSION}"
    return "" if meta["codec"] in READERS else f"its codec {meta['codec']!r} is not known to this Kvilt"


def _spans(tensors: dict[str, dict[str, list[int]]], digests: dict[str, str], base: int, size: int) -> dict[str, Span]:
    spans, end = {}, base
    for name, info in tensors.items():
        start, end = (base + offset for offset in info["data_offsets"])
        spans[name] = Span(_DTYPES[str(info["dtype"])], tuple(info["shape"]), start, end, digests[name])
    if end != size:
        raise ValueError(f"it has {size} bytes, not the {end} it was written with")
    return spans


def _header_of(meta: dict[str, str], spans: dict[str, Span], size: int) -> Header:
    key = CacheKey(**json.loads(meta["fields"]))
    if key.digest != meta["key"]:
        raise ValueError("its key does not match its identity fields")
    return Header(
        key=key,
        length=int(meta["length"]),
        dropped=int(meta["dropped"]),
        title=meta["title"],
        namespace=meta["namespace"],
        created=float(meta["created"]),
        expires=float(meta["expires"]) if meta["expires"] else None,
        codec=meta["codec"],
        spans=spans,
        bytes=size,
    )

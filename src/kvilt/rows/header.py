"""What a stored document says of itself: the header of its file, read and checked without torch.

A document is one safetensors file, which any safetensors library reads. Its tensors, in this order:

    tokens, offsets   int64; chunks too, of documents that were encoded in chunks
    digests           uint8 (layers, blocks, 32): BLAKE3 of every block of rows: each head's keys, each head's values, scales
    rows              (layers, 2, heads, rows, head_dim): keys without rotation, then values; layers one after another
    scales_keys, scales_values   of quantised rows (`rows.codec`)

Metadata: format and version, codec, key digest and the key's fields in clear, length, dropped, title, times of creation and
expiry, digests of the tensors before the rows. The header's own digest stands first, at a fixed place, and covers every other byte
of the header, so no bit of a file can change unnoticed. Digests find accidents, not attackers who may write to the store."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from blake3 import blake3

from kvilt.errors import DamagedCache, OtherVersion

VERSION = "2"
FIRST = ("tokens", "offsets", "chunks", "digests")  # read when a file is opened; rows come later
ITEM = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I8": 1, "U8": 1, "F8_E4M3": 1}  # bytes of a number
MAX_HEADER = 1 << 20
MAX_TITLE = 4096  # bytes
OPENING = b'{"__metadata__":{"header":"'  # the header's digest follows, behind the 8 bytes of its length
DIGEST_AT = 8 + len(OPENING)


class Readable(Protocol):
    """Bytes that can be read from anywhere: `stores.blobs.Blob`."""

    @property
    def size(self) -> int:
        """Bytes in all."""

    def read(self, offset: int, into: Sequence[memoryview]) -> None:
        """Fill all of `into` from `offset` on. Raises OSError, and EOFError where the bytes end."""


@dataclass(frozen=True)
class Span:
    """Where one tensor lies in the file (bytes from the beginning)."""

    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself. Times are seconds since the epoch."""

    key: str  # digest
    fields: Mapping[str, str]  # the key's identity in clear
    codec: str
    length: int
    dropped: int
    title: str
    created: float
    expires: float | None
    spans: Mapping[str, Span]
    digests: Mapping[str, str]  # of the tensors before the rows
    bytes: int  # of the whole file

    @property
    def tokens(self) -> int:
        """Tokens that were run to make the rows."""
        return self.spans["tokens"].shape[0]

    @property
    def namespace(self) -> str:
        """Whose document it is."""
        return self.fields.get("namespace", "shared")


def read_header(key: str, blob: Readable) -> Header:
    """The checked header of the document stored under `key` (64 hex digits).

    Raises DamagedCache for whatever is not a whole, unaltered header of that document, OtherVersion for another format
    version of Kvilt's, and OSError."""
    try:
        raw = _raw(blob)
        data = json.loads(raw[8:])
        meta = data.pop("__metadata__")
        if meta["version"] != VERSION:
            raise OtherVersion(key, str(meta["version"]), VERSION)
        if raw[DIGEST_AT : DIGEST_AT + 64] != _seal(raw):
            raise ValueError("its header does not match its digest")
        header = _parsed(meta, data, len(raw), blob.size)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        EOFError,
        OverflowError,
        IndexError,
    ) as error:
        raise DamagedCache(key, str(error) if type(error) is ValueError else "its header is malformed") from error
    if header.key != key:
        raise DamagedCache(key, f"it holds another document, {header.key[:16]}")
    return header


def _raw(blob: Readable) -> bytes:
    start = bytearray(min(16 << 10, blob.size))  # one read for most headers
    blob.read(0, [memoryview(start)])
    length = 8 + int.from_bytes(start[:8], "little")
    if not DIGEST_AT + 64 < length <= min(blob.size, MAX_HEADER):
        raise ValueError("it is cut off, or not a safetensors file")
    if length > len(start):
        start = bytearray(length)
        blob.read(0, [memoryview(start)])
    if not start[8:].startswith(OPENING):
        raise ValueError("its header is not one of Kvilt's")
    return bytes(start[:length])


def _parsed(meta: dict[str, str], tensors: dict[str, Any], base: int, size: int) -> Header:
    spans = {name: _span(info, base) for name, info in tensors.items()}
    if spans["rows"].shape[3] != spans["offsets"].shape[0] or not {"tokens", "digests"} <= set(spans):
        raise ValueError("its header is malformed")
    end = max(span.end for span in spans.values())
    if end != size:
        raise ValueError(f"it has {size} bytes, not the {end} it was written with")
    fields = {str(name): str(value) for name, value in json.loads(meta["fields"]).items()}
    return Header(
        key=str(meta["key"]),
        fields=fields,
        codec=str(meta["codec"]),
        length=int(meta["length"]),
        dropped=int(meta["dropped"]),
        title=str(meta["title"]),
        created=float(meta["created"]),
        expires=float(meta["expires"]) if meta["expires"] else None,
        spans=spans,
        digests={name: str(meta[f"digest.{name}"]) for name in FIRST if name in spans},
        bytes=size,
    )


def _span(info: dict[str, Any], base: int) -> Span:
    start, end = (base + int(offset) for offset in info["data_offsets"])
    shape = tuple(int(n) for n in info["shape"])
    if end - start != ITEM[info["dtype"]] * math.prod(shape) or min(shape, default=1) < 0 or start < base:
        raise ValueError("its header is malformed")
    return Span(str(info["dtype"]), shape, start, end)


def _seal(raw: bytes) -> bytes:
    """Digest of a header, but for the place where the digest itself stands."""
    return blake3(raw[:DIGEST_AT]).update(raw[DIGEST_AT + 64 :]).hexdigest().encode()

"""What a stored document says of itself: the header of its file, read and checked without torch.

A document is one safetensors file, which any safetensors library reads. Its tensors, in this order:

    tokens, offsets   int64; chunks too, of documents that were encoded in chunks, and order, of ranked ones
    digests           uint8 (layers, blocks, 32): BLAKE3 of every block of rows: each head's keys, each head's values, scales
    rows              (layers, 2, heads, rows, head_dim): keys without rotation, then values; layers one after another
    scales_keys, scales_values   of quantised rows (`rows.codec`)

Metadata: format and version, codec, key digest and the key's fields in clear, length, dropped, title, times of creation and
expiry, digests of the tensors before the rows. The header's own digest and the version stand first, at fixed places; the digest
covers every other byte of the header, so no bit of a file can change unnoticed. Digests find accidents, not attackers who may
write to the store."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from blake3 import blake3

from kvilt.errors import DamagedCache, OtherVersion

VERSION = "2"
FIRST = ("tokens", "offsets", "chunks", "order", "digests")  # read when a file is opened; rows come later
ITEM = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I8": 1, "U8": 1, "F8_E4M3": 1}  # bytes of a number
MAX_HEADER = 1 << 20
MAX_TITLE = 4096  # bytes
OPENING = b'{"__metadata__":{"header":"'  # the header's digest follows, behind the 8 bytes of its length
DIGEST_AT = 8 + len(OPENING)
LATEST = 253_402_300_800.0  # the year 10,000: no calendar shows a later time
_VERSION = re.compile(rb'","format":"kvilt","version":"(\d+)"')  # and after it the version, in all versions


class _Damage(ValueError):
    """A reason that a person can read."""


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
        raw = _raw(key, blob)
        data = json.loads(raw[8:])
        meta = data.pop("__metadata__")
        if raw[DIGEST_AT : DIGEST_AT + 64] != seal(raw):
            raise _Damage("its header does not match its digest")
        header = _parsed(meta, data, len(raw), blob.size)
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError, EOFError, OverflowError) as error:
        raise DamagedCache(key, str(error) if isinstance(error, _Damage) else "its header is malformed") from error
    if header.key != key:
        raise DamagedCache(key, f"it holds another document, {header.key[:16]}")
    return header


def _raw(key: str, blob: Readable) -> bytes:
    start = bytearray(min(16 << 10, blob.size))  # one read for most headers
    blob.read(0, [memoryview(start)])
    version = _VERSION.match(start, DIGEST_AT + 64)
    if not version or not start[8:].startswith(OPENING):
        raise _Damage("it is cut off, or no file of Kvilt's")
    if version[1] != VERSION.encode():
        raise OtherVersion(key, version[1].decode(), VERSION)
    length = 8 + int.from_bytes(start[:8], "little")
    if not DIGEST_AT + 64 < length <= min(blob.size, MAX_HEADER):
        raise _Damage("it is cut off, or its header is too long")
    if length > len(start):
        start = bytearray(length)
        blob.read(0, [memoryview(start)])
    return bytes(start[:length])


def _parsed(meta: dict[str, str], tensors: dict[str, Any], base: int, size: int) -> Header:
    spans = {name: _span(info, base, size) for name, info in tensors.items()}
    end = max(span.end for span in spans.values())
    if end != size:
        raise _Damage(f"it has {size} bytes, not the {end} it was written with")
    fields: dict[str, str] = json.loads(meta["fields"])
    "".join([*meta.values(), *fields, *fields.values()]).encode()  # texts alone, which anybody can print
    header = Header(
        key=meta["key"],
        fields=fields,
        codec=meta["codec"],
        length=int(meta["length"]),
        dropped=int(meta["dropped"]),
        title=meta["title"],
        created=float(meta["created"]),
        expires=float(meta["expires"]) if meta["expires"] else None,
        spans=spans,
        digests={name: meta[f"digest.{name}"] for name in FIRST if name in spans},
        bytes=size,
    )
    if not _is_sound(header):
        raise ValueError
    return header


def _is_sound(header: Header) -> bool:
    """Whether numbers and shapes are those of a document; what a tensor holds is checked when it is read."""
    spans, numbers = header.spans, (header.length, header.dropped)
    layers, sides, _, rows, _ = spans["rows"].shape
    run = [spans[name].shape for name in ("tokens", "chunks") if name in spans]
    times = (header.created, header.expires or 0.0)
    return (
        min(numbers) >= 0
        and run[0] == run[-1] == (sum(numbers),)
        and "tokens" in spans
        and (sides, spans["offsets"].shape, spans["digests"].shape[::2]) == (2, (rows,), (layers, 32))
        and all(0 <= time < LATEST for time in times)  # a time that is no number is not below anything
    )


def _span(info: dict[str, Any], base: int, size: int) -> Span:
    start, end = (base + int(offset) for offset in info["data_offsets"])
    shape = tuple(int(n) for n in info["shape"])
    whole = end - start == ITEM[info["dtype"]] * math.prod(shape) and start >= base
    if not whole or not all(0 <= n <= size for n in shape):  # an axis of 10^30 may hold nothing at all
        raise ValueError
    return Span(info["dtype"], shape, start, end)


def seal(raw: bytes) -> bytes:
    """Digest of a header, but for the place where the digest itself stands."""
    return blake3(raw[:DIGEST_AT]).update(raw[DIGEST_AT + 64 :]).hexdigest().encode()

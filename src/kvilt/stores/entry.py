"""What is known of one stored document, and how a document tells it itself."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from kvilt.errors import DamagedCache
from kvilt.rows.header import read_header
from kvilt.stores.blobs import Blob


@dataclass(frozen=True)
class Entry:
    """One stored document. Times are seconds since the epoch."""

    key: str  # digest
    bytes: int
    tokens: int
    title: str = ""
    namespace: str = "shared"
    created: float = 0.0
    used: float = 0.0
    hits: int = 0
    pinned: bool = False
    expires: float | None = None
    fields: dict[str, str] = field(default_factory=dict)  # the key's identity in clear

    def alive(self, now: float) -> bool:
        """Whether it may be served; a pin outlasts the time to live."""
        return self.expires is None or self.expires > now or self.pinned


@dataclass(frozen=True)
class StoreStats:
    """Totals of a store."""

    entries: int
    bytes: int
    budget: int | None
    hits: int
    misses: int
    evictions: int
    damaged: int


is_namespace = re.compile(r"[\w -~]{1,128}").fullmatch  # letters and digits of any script, and printable ASCII
Describe = Callable[[str, Blob], Entry]


def describe(key: str, blob: Blob) -> Entry:
    """A stored document as its own header tells it. Raises DamagedCache, OtherVersion, OSError."""
    header = read_header(key, blob)
    name = header.namespace
    sane = is_namespace(name) and 0 <= header.tokens <= blob.size
    if not (sane and math.isfinite(header.created + (header.expires or 0.0))):
        raise DamagedCache(key, "its header is malformed")
    title = header.title.encode("utf-8", "replace").decode()  # half characters could not be printed or entered
    times, fields = (header.created, header.created), dict(header.fields)
    return Entry(key, blob.size, header.tokens, title, name, *times, expires=header.expires, fields=fields)

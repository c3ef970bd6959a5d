"""What is known of one stored document, and how a document tells it itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from kvilt.errors import DamagedCache, UserError
from kvilt.rows.header import read_header
from kvilt.stores.blobs import Blob

MAX_NAMESPACE = 128  # characters


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


Describe = Callable[[str, Blob], Entry]


def check_namespace(name: str) -> str:
    """The namespace itself, if it can be one. Raises UserError."""
    if not (0 < len(name) <= MAX_NAMESPACE and name.isprintable()):
        raise UserError(f"namespace {name[:MAX_NAMESPACE]!r} must be 1 to {MAX_NAMESPACE} printable characters.")
    return name


def describe(key: str, blob: Blob) -> Entry:
    """A stored document as its own header tells it. Raises DamagedCache, OtherVersion, OSError."""
    header = read_header(key, blob)
    if not (0 <= header.tokens <= blob.size and math.isfinite(header.created + (header.expires or 0.0))):
        raise DamagedCache(key, "its header is malformed")
    try:
        check_namespace(header.namespace)
    except UserError as error:
        raise DamagedCache(key, str(error)) from error
    return Entry(
        key=key,
        bytes=blob.size,
        tokens=header.tokens,
        title=header.title.encode("utf-8", "replace").decode(),  # half characters could not be printed or entered
        namespace=header.namespace,
        created=header.created,
        used=header.created,
        expires=header.expires,
        fields=dict(header.fields),
    )

"""Interim: document caches as bytes in memory or in a folder, until the rebuilt stores land."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvilt.errors import DamagedCache
from kvilt.types import CacheKey, DocumentCache


@dataclass(frozen=True)
class Entry:
    """One stored document as the index knows it. Times are seconds since the epoch."""

    key: str  # digest
    bytes: int  # of the whole file or of the tensors
    tokens: int
    title: str = ""
    namespace: str = "default"
    created: float = 0.0
    used: float = 0.0
    hits: int = 0
    pinned: bool = False
    expires: float | None = None
    fields: dict[str, str] = field(default_factory=dict)  # the key's identity in clear


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


class _Blob:
    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def read(self, offset: int, into: Sequence[memoryview]) -> None:
        """Fill all of `into`."""
        for piece in into:
            if offset + len(piece) > self.size:
                raise EOFError
            piece[:] = self.data[offset : offset + len(piece)]
            offset += len(piece)


class Store:
    """Interim store."""

    def __init__(self, path: str = "", budget: str = "", policy: str = "", memory: str = "", quota: str = "") -> None:
        self.path = Path(path) if path else None
        self.blobs: dict[str, bytes] = {}
        self.opened: dict[str, DocumentCache] = {}

    def get_many(self, keys: Sequence[CacheKey]) -> list[DocumentCache | None]:
        """Stored caches."""
        return [self._open(key) for key in keys]

    def _open(self, key: CacheKey) -> DocumentCache | None:
        from kvilt.rows.file import open_cache

        digest = key.digest
        if digest not in self.opened:
            data = self.blobs.get(digest)
            if data is None and self.path and (self.path / digest).is_file():
                data = (self.path / digest).read_bytes()
            if data is None:
                return None
            try:
                self.opened[digest] = open_cache(_Blob(data), key)
            except DamagedCache:
                return None
        return self.opened[digest]

    def put(self, cache: DocumentCache, *, title: str = "", ttl: float | None = None) -> bool:
        """Store a cache."""
        from kvilt.rows.file import pack

        data = b"".join(pack(cache, title=title))
        self.blobs.setdefault(cache.key.digest, data)
        if self.path:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / cache.key.digest).write_bytes(data)
        return True

    def contains(self, digests: Iterable[str]) -> set[str]:
        """Which are stored."""
        return {d for d in digests if d in self.blobs or (self.path and (self.path / d).is_file())}

    def set_aside(self, digest: str, reason: str) -> None:
        """Take out of service."""
        self.blobs.pop(digest, None)
        self.opened.pop(digest, None)
        if self.path:
            (self.path / digest).unlink(missing_ok=True)

    def delete(self, digest: str, namespace: str | None = None) -> bool:
        """Forget."""
        there = bool(self.contains([digest]))
        self.set_aside(digest, "")
        return there

    def close(self) -> None:
        """Nothing."""

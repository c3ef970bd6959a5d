"""The store that the engine uses: document caches by what was run, over any blobs, with a catalogue if they have one."""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from kvilt.errors import DamagedCache, DocumentError, OtherVersion, StoreUnavailable, UserError
from kvilt.stores.blobs import Blob, BlobStore, check_key
from kvilt.stores.catalogue import Entry, StoreStats
from kvilt.stores.kept import Kept, check_namespace, describe, look

if TYPE_CHECKING:
    from kvilt.types import CacheKey, DocumentCache

__all__ = ["Entry", "Store", "StoreStats"]
log = logging.getLogger("kvilt")

REMEMBERED = 512  # opened caches, each of which keeps its file open


class Opened(NamedTuple):
    """What is remembered of a blob that was opened."""

    identity: Hashable  # of the blob
    cache: DocumentCache | None  # None: damaged, or another version's
    expires: float | None


class Store:
    """Document caches by content address.

    `put` of an existing key is a no-op, so writers need not coordinate. A damaged, foreign or half-written document is
    never returned: it is set aside, counted, logged, and counts as a miss. Another version's is left alone.
    """

    def __init__(self, blobs: BlobStore, kept: Sequence[Kept] | None = None) -> None:
        self.blobs = blobs
        self.kept = [blobs] if kept is None and isinstance(blobs, Kept) else list(kept or [])
        self._truth: BlobStore = self.kept[-1] if self.kept else blobs  # what is there, is there
        self._catalogue = self.kept[-1].catalogue if self.kept else None
        self._describe = self.kept[-1].describe if self.kept else describe
        self._memo: dict[str, Opened] = {}  # in order of last use; every use of it is one operation, so no lock
        for part in self.kept:
            part.memo = self._memo  # what is evicted is forgotten, or it would stay in memory
            weakref.finalize(self, part.catalogue.close)  # a store that is never closed writes its last uses too

    def get(self, key: CacheKey) -> DocumentCache | None:
        """The stored cache, or None."""
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[CacheKey], *, counted: bool = True) -> list[DocumentCache | None]:
        """The stored caches, None for what is not there; with `counted=False` nothing at all changes by it.

        Their rows are read later, and raise DamagedCache if they are damaged: see `set_aside`."""
        digests = [key.digest for key in keys]
        unique = dict(zip(digests, keys, strict=True))
        blobs = zip(unique.items(), self.blobs.get_many(list(unique)), strict=True)
        caches = {digest: self._opened(key, blob, counted) for (digest, key), blob in blobs}
        for digest in digests if counted else ():
            self._note("misses" if caches[digest] is None else "hits", digest)
        return [caches[digest] for digest in digests]

    def put(self, cache: DocumentCache, *, title: str = "", ttl: float | None = None) -> bool:
        """Store a cache for `ttl` seconds (None: for good); False if it was there.

        Raises StoreUnavailable when it cannot be written, and UserError for a title, namespace or time to live that
        could not be read again."""
        from kvilt.rows.file import pack
        from kvilt.rows.header import MAX_HEADER

        check_namespace(cache.key.namespace)
        if ttl is not None and not 0 < ttl < float("inf"):
            raise UserError(f"ttl={ttl!r}: a document's time to live is a number of seconds above 0.")
        digest, now = cache.key.digest, time.time()
        if self._is_served(cache.key):
            return False
        data = pack(cache, title=title, created=now, expires=None if ttl is None else now + ttl)
        if len(data[0]) > MAX_HEADER:
            raise DocumentError(
                f"document {title[:40]!r} needs a header of {len(data[0])} bytes: {MAX_HEADER} are read."
            )
        return self.blobs.put(digest, data)

    def contains(self, digests: Iterable[str]) -> set[str]:
        """Which of these digests are stored."""
        there = self._truth.contains(digests)
        if there and self._catalogue is not None:
            with contextlib.suppress(StoreUnavailable):
                there -= self._catalogue.expired()
        return {digest for digest in there if (held := self._memo.get(digest)) is None or held.cache is not None}

    def entries(self, namespace: str | None = None) -> list[Entry]:
        """Every stored document, oldest first; only those of a namespace, if one is given."""
        rows, now = self._rows(), time.time()
        there = [rows.get(key) or self._look(key) for key, _ in self._truth.list()]
        chosen = [e for e in there if e is not None and e.alive(now) and namespace in (None, e.namespace)]
        return sorted(chosen, key=lambda e: (e.created, e.key))

    def entry(self, digest: str) -> Entry | None:
        """One stored document."""
        if not self._truth.contains([check_key(digest)]):
            return None
        row = None
        if self._catalogue is not None:
            with contextlib.suppress(StoreUnavailable):
                row = self._catalogue.row(digest)
        entry = row or self._look(digest)
        return entry if entry is not None and entry.alive(time.time()) else None

    def delete(self, digest: str, namespace: str | None = None) -> bool:
        """Delete a document, if it is of that namespace (None: of any); whether it was there."""
        if not self._is_of(digest, namespace):
            return False
        self._memo.pop(digest, None)
        return self.blobs.delete(digest)

    def pin(self, digest: str, pinned: bool = True, namespace: str | None = None) -> bool:
        """Keep a document from eviction and expiry, or no longer; whether it is there. A pin outlives repairs."""
        if self._catalogue is None:
            raise StoreUnavailable("this store has no catalogue, so nothing in it can be pinned.")
        if not self.contains([digest]) or not self._is_of(digest, namespace):
            return False
        self._catalogue.pin(digest, pinned)
        return True

    def stats(self) -> StoreStats:
        """Totals; of several tiers those of the last one, which holds everything."""
        if self._catalogue is not None:
            with contextlib.suppress(StoreUnavailable):
                return self._catalogue.stats()
        sizes = [size for _, size in self._truth.list()]
        return StoreStats(len(sizes), sum(sizes))

    def set_aside(self, digest: str, reason: str) -> None:
        """Take a damaged document out of service; it is kept for inspection where the store can."""
        try:
            if self.blobs.set_aside(check_key(digest), reason):
                log.warning("stored document %s is damaged: %s. It was set aside", digest[:16], reason)
        except StoreUnavailable as error:
            log.warning("stored document %s is damaged: %s. It stays in place, unused: %s", digest[:16], reason, error)
            for blob in self.blobs.get_many([digest]):
                if blob is not None:
                    self._remember(digest, Opened(blob.identity, None, None))

    def gc(self) -> int:
        """Drop expired documents, leftovers, what was set aside a day ago, and what is over a limit; bytes freed."""
        return sum(part.gc() for part in self.kept) if self.kept else self.blobs.sweep()

    def verify(self) -> list[tuple[str, str]]:
        """Read every document completely; (key, reason) of each that cannot be, of which damaged ones are set aside."""
        problems = []
        for key, _ in self._truth.list():
            try:
                self._read_all(key)
            except DamagedCache as error:
                self.set_aside(key, error.reason)
                problems.append((key, error.reason))
            except OtherVersion as error:
                log.info("%s", error)
            except OSError as error:
                problems.append((key, f"it cannot be read: {error.strerror or error}"))
        return problems

    def close(self) -> None:
        """Write what is pending and release files and connections; the store may be used again."""
        self._memo.clear()
        self.blobs.close()

    def _opened(self, key: CacheKey, blob: Blob | None, counted: bool = True) -> DocumentCache | None:
        """The cache in a blob, opened once as long as the blob stays the same."""
        digest = key.digest
        held = self._memo.pop(digest, None)
        if blob is None:
            return None
        if held is None or held.identity != blob.identity:
            try:
                held = self._read(key, blob)
            except DamagedCache as error:
                if counted:
                    self.set_aside(digest, error.reason)
                return None
            except OSError as error:  # passing, perhaps: a miss
                log.warning("cannot read stored document %s: %s", digest[:16], error)
                return None
        self._remember(digest, held)
        over = held.expires is not None and held.expires <= time.time()
        return None if over and not self._is_pinned(digest) else held.cache

    def _read(self, key: CacheKey, blob: Blob) -> Opened:
        from kvilt.rows.file import open_cache

        try:
            expires = self._describe(key.digest, blob).expires
            return Opened(blob.identity, open_cache(blob, key), expires)
        except OtherVersion as error:
            log.info("%s", error)
            return Opened(blob.identity, None, None)

    def _is_served(self, key: CacheKey) -> bool:
        """Whether there is a document that can be served; if one is expired, it makes room for a new one."""
        (blob,) = self.blobs.get_many([key.digest])
        if self._opened(key, blob) is not None:
            return True
        held = self._memo.get(key.digest)
        if held is not None and held.cache is not None:
            self.blobs.delete(key.digest)
        return False

    def _remember(self, digest: str, opened: Opened) -> None:
        self._memo[digest] = opened
        while len(self._memo) > REMEMBERED:
            with contextlib.suppress(RuntimeError, StopIteration):  # another thread was faster
                self._memo.pop(next(iter(self._memo)), None)

    def _rows(self) -> dict[str, Entry]:
        """What the catalogue knows; without one, or while it is locked, every document tells itself."""
        if self._catalogue is not None:
            with contextlib.suppress(StoreUnavailable):
                return self._catalogue.rows()
        return {}

    def _look(self, digest: str) -> Entry | None:
        with contextlib.suppress(DamagedCache):
            entry = look(self._truth, self._describe, digest)
            return entry and replace(entry, pinned=self._is_pinned(digest))
        return None

    def _is_pinned(self, digest: str) -> bool:
        return self._catalogue is not None and digest in self._catalogue.pins

    def _is_of(self, digest: str, namespace: str | None) -> bool:
        check_key(digest)
        entry = None if namespace is None else self.entry(digest)
        return namespace is None or (entry is not None and entry.namespace == namespace)

    def _note(self, what: str, digest: str) -> None:
        if self._catalogue is not None:
            self._catalogue.note(what, digest if what == "hits" else "")
        for part in self.kept[:-1] if what == "hits" else ():
            part.catalogue.note(what, digest)

    def _read_all(self, digest: str) -> None:
        from kvilt.rows.file import open_cache
        from kvilt.rows.rows import whole
        from kvilt.types import CacheKey

        (blob,) = self._truth.get_many([digest])
        if blob is None:
            return
        entry = self._describe(digest, blob)
        key = CacheKey(**entry.fields) if entry.fields.keys() == CacheKey.__dataclass_fields__.keys() else None
        if key is None or key.digest != digest:
            raise DamagedCache(digest, "its key does not match its identity fields")
        rows = open_cache(blob, key).rows
        if rows is not None:
            for i in range(rows.shape[0]):
                whole(rows, slice(i, i + 1))

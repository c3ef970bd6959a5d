"""The store that the engine uses: document caches by what was run, over blobs under a catalogue."""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvilt.errors import DamagedCache, DocumentError, OtherVersion, StoreUnavailable, UserError
from kvilt.rows.header import MAX_HEADER
from kvilt.stores.blobs import Blob, BlobStore, check_key
from kvilt.stores.catalogue import Catalogue
from kvilt.stores.entry import Entry, StoreStats, check_namespace

if TYPE_CHECKING:
    from kvilt.types import CacheKey, DocumentCache

__all__ = ["Entry", "Store", "StoreStats"]
log = logging.getLogger("kvilt")

REMEMBERED = 512  # opened caches, each of which keeps its file open


class Opened(NamedTuple):
    """What is remembered of a blob that was opened."""

    identity: Hashable  # of the blob
    cache: DocumentCache | None  # None: damaged, or another version's
    expires: float | None = None


class Store:
    """Document caches by content address, in the blobs of one catalogue, or of several behind one another.

    `put` of an existing key is a no-op, so writers need not coordinate. A damaged, foreign or half-written document is
    never returned: it is set aside, counted, logged, and counts as a miss. Another version's is left alone.
    """

    def __init__(self, *catalogues: Catalogue, blobs: BlobStore | None = None) -> None:
        self.catalogues, self.last = catalogues, catalogues[-1]  # what is in the last one, is there
        self.blobs = blobs or self.last
        self._memo: dict[str, Opened] = {}  # in order of last use; every use of it is one operation, so no lock
        for catalogue in catalogues:
            catalogue.memo = self._memo  # what is evicted is forgotten, or it would stay in memory
            weakref.finalize(self, catalogue.flush, 0.0)  # a store that is never closed writes its last uses too

    def get(self, key: CacheKey) -> DocumentCache | None:
        """The stored cache, or None."""
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[CacheKey], *, counted: bool = True) -> list[DocumentCache | None]:
        """The stored caches, None for what is not there; with `counted=False` nothing at all changes by it.

        Their rows are read later, and raise DamagedCache if they are damaged: see `set_aside`."""
        unique = {key.digest: key for key in keys}
        blobs = zip(unique.values(), self.blobs.get_many(list(unique)), strict=True)
        caches = {key.digest: self._opened(key, blob, counted) for key, blob in blobs}
        for digest in [key.digest for key in keys] if counted else ():
            if caches[digest] is None:
                self.last.note("misses")
            else:
                for catalogue in self.catalogues:
                    catalogue.note("hits", digest)
        return [caches[key.digest] for key in keys]

    def put(self, cache: DocumentCache, *, title: str = "", ttl: float | None = None) -> bool:
        """Store a cache for `ttl` seconds (None: for good); False if it was there.

        Raises StoreUnavailable when it cannot be written, and UserError for a title, namespace or time to live that
        could not be read again."""
        from kvilt.rows.file import pack

        check_namespace(cache.key.namespace)
        if ttl is not None and not 0 < ttl < float("inf"):
            raise UserError(f"ttl={ttl!r}: a document's time to live is a number of seconds above 0.")
        if self._is_served(cache.key):
            return False
        now = time.time()
        data = pack(cache, title=title, created=now, expires=None if ttl is None else now + ttl)
        if len(data[0]) > MAX_HEADER:
            raise DocumentError(
                f"document {title[:40]!r} needs a header of {len(data[0])} bytes: {MAX_HEADER} are read."
            )
        return self.blobs.put(cache.key.digest, data)

    def contains(self, digests: Iterable[str]) -> set[str]:
        """Which of these digests are stored."""
        there = self.last.contains(digests)
        with contextlib.suppress(StoreUnavailable):
            there -= self.last.rows("expires <= ? AND NOT pinned", time.time()).keys() if there else set()
        return {digest for digest in there if (held := self._memo.get(digest)) is None or held.cache is not None}

    def entries(self, namespace: str | None = None) -> list[Entry]:
        """Every stored document, oldest first; only those of a namespace, if one is given."""
        stored = self._known([key for key, _ in self.last.list()])
        return sorted((e for e in stored if namespace in (None, e.namespace)), key=lambda e: (e.created, e.key))

    def entry(self, digest: str) -> Entry | None:
        """One stored document."""
        return next(self._known(list(self.last.contains([digest]))), None)

    def delete(self, digest: str, namespace: str | None = None) -> bool:
        """Delete a document, if it is of that namespace (None: of any); whether it was there."""
        entry = None if namespace is None else self.entry(digest)
        if namespace != (entry and entry.namespace):
            return False
        return self.blobs.delete(digest)

    def pin(self, digest: str, pinned: bool = True) -> bool:
        """Keep a document from eviction and expiry, or no longer; whether it is there. A pin outlives repairs."""
        there = bool(self.contains([digest]))
        if there:
            self.last.pin(digest, pinned)
        return there

    def stats(self) -> StoreStats:
        """Totals; of several stores behind one another those of the last one, which holds everything."""
        return self.last.stats()

    def set_aside(self, digest: str, reason: str) -> None:
        """Take a damaged document out of service; it is kept for inspection where the store can."""
        try:
            if self.blobs.set_aside(check_key(digest), reason):
                log.warning("stored document %s is damaged: %s. It was set aside", digest[:16], reason)
        except StoreUnavailable as error:
            log.warning("stored document %s is damaged: %s. It stays in place, unused: %s", digest[:16], reason, error)
            for blob in self.blobs.get_many([digest]):
                if blob is not None:
                    self._remember(digest, Opened(blob.identity, None))

    def gc(self) -> int:
        """Drop expired documents, leftovers, what was set aside a day ago, and what is over a limit; bytes freed."""
        return sum(catalogue.gc() for catalogue in self.catalogues)

    def verify(self) -> list[tuple[str, str]]:
        """Read every document completely; (key, reason) of each that cannot be, of which damaged ones are set aside."""
        problems = []
        for key, _ in self.last.list():
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

    def _opened(self, key: CacheKey, blob: Blob | None, counted: bool) -> DocumentCache | None:
        """The cache in a blob, opened once as long as the blob stays the same."""
        digest = key.digest
        held = self._memo.pop(digest, None)
        if blob is None:
            return None
        try:
            if held is None or held.identity != blob.identity:
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
            expires = self.last.describe(key.digest, blob).expires
            return Opened(blob.identity, open_cache(blob, key), expires)
        except OtherVersion as error:
            log.info("%s", error)
            return Opened(blob.identity, None)

    def _is_served(self, key: CacheKey) -> bool:
        """Whether there is a document that can be served; an expired one makes room."""
        (blob,) = self.blobs.get_many([key.digest])
        if self._opened(key, blob, counted=True) is not None:
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

    def _known(self, digests: Sequence[str]) -> Iterator[Entry]:
        """Stored documents as the catalogue knows them, or, where it does not or is locked, as they tell themselves."""
        rows: dict[str, Entry] = {}
        with contextlib.suppress(StoreUnavailable):
            rows = self.last.rows() if len(digests) > 1 else self.last.rows("key = ?", *digests or "-")
        for digest in digests:
            entry = rows.get(digest)
            with contextlib.suppress(DamagedCache):
                entry = entry or self.last.look(digest)
            if entry is not None and entry.alive(time.time()):
                yield entry

    def _is_pinned(self, digest: str) -> bool:
        return bool(self.last.pins.contains([digest]))

    def _read_all(self, digest: str) -> None:
        from kvilt.rows.file import open_cache
        from kvilt.rows.rows import whole
        from kvilt.types import CacheKey

        (blob,) = self.last.get_many([digest])
        if blob is not None:
            fields = self.last.describe(digest, blob).fields
            key = CacheKey(**fields) if fields.keys() == CacheKey.__dataclass_fields__.keys() else None
            if key is None or key.digest != digest:
                raise DamagedCache(digest, "its key does not match its identity fields")
            rows = open_cache(blob, key).rows
            if rows is not None:
                for i in range(rows.shape[0]):
                    whole(rows, slice(i, i + 1))

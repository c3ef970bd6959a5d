"""The store that the engine uses: document caches by what was run, over blobs under a catalogue."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, NamedTuple

from kvilt.errors import DamagedCache, OtherVersion, StoreUnavailable, UserError
from kvilt.stores.blobs import Blob, BlobStore, MemoryBlob, check_key
from kvilt.stores.catalogue import BATCH, Catalogue
from kvilt.stores.database import MOMENT
from kvilt.stores.entry import Entry, StoreStats, describe, is_namespace

if TYPE_CHECKING:
    from kvilt.types import CacheKey, DocumentCache

__all__ = ["Entry", "Store", "StoreStats"]
log = logging.getLogger("kvilt")

FLUSH_SECONDS = 2.0
REMEMBERED = 512  # opened caches, each of which keeps its file open

Use = tuple[int, str | None, float]  # process, key (None is a miss), time


def _record(uses: deque[Use], catalogues: Sequence[Catalogue], patience: float | None) -> None:
    noted = [uses.popleft() for _ in range(len(uses))]
    own = [(key, moment) for process, key, moment in noted if process == os.getpid()]  # a fork's parent writes its own
    hits = [(key, moment) for key, moment in own if key is not None]
    try:
        for catalogue in catalogues:
            catalogue.record(hits, len(own) - len(hits) if catalogue is catalogues[-1] else 0, patience)
    except StoreUnavailable:
        uses.extendleft(reversed(noted))


def _leave(uses: deque[Use], catalogues: Sequence[Catalogue]) -> None:
    _record(uses, catalogues, 0.0)
    for catalogue in catalogues:
        catalogue.disconnect()


def check_namespace(name: str) -> None:
    """Refuse what cannot be a namespace. Raises UserError."""
    if not is_namespace(name):
        raise UserError(f"namespace {name[:100]!r} must be 1 to 128 letters, digits or printable ASCII characters.")


class Opened(NamedTuple):
    """What is remembered of a blob that was opened."""

    identity: Hashable  # of the blob
    cache: DocumentCache | None  # None: damaged, or another version's
    expires: float | None = None


class Store:
    """Document caches by content address, in any blobs; where several are behind one another, under several catalogues.

    `put` of an existing key is a no-op, so writers need not coordinate. A damaged, foreign or half-written document is
    never returned: it is set aside, counted, logged, and counts as a miss. Another version's is left alone."""

    def __init__(self, blobs: BlobStore, *catalogues: Catalogue) -> None:
        if not catalogues:  # one that limits nothing, and reads nothing in advance, unless it is given
            blobs = blobs if isinstance(blobs, Catalogue) else Catalogue(blobs)
            catalogues = (blobs,)
        self.blobs, self.catalogues, self.last = blobs, catalogues, catalogues[-1]  # what is in the last one, is there
        self._memo: dict[str, Opened] = {}  # in order of last use; every use of it is one operation, so no lock
        self._uses: deque[Use] = deque(maxlen=100_000)
        self._timer: threading.Timer | None = None
        for catalogue in catalogues:
            catalogue.memo = self._memo  # what is evicted is forgotten, or it would stay in memory
        weakref.finalize(self, _leave, self._uses, catalogues)  # also where a store is never closed

    def get(self, key: CacheKey) -> DocumentCache | None:
        """The stored cache, or None."""
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[CacheKey], *, counted: bool = True) -> list[DocumentCache | None]:
        """The stored caches, None for what is not there; with `counted=False` nothing at all changes by it.

        Their rows are read later, and raise DamagedCache if they are damaged: see `set_aside`."""
        unique = {key.digest: key for key in keys}
        source = self.blobs if self.blobs is not self.last and counted else self.last.blobs
        blobs = zip(unique.values(), source.get_many(list(unique)), strict=True)
        caches = {key.digest: self._opened(key, blob, counted) for key, blob in blobs}
        if counted:
            used = [None if caches[key.digest] is None else key.digest for key in keys]
            self._uses.extend((os.getpid(), digest, time.time()) for digest in used)
            self._write_soon()
        return [caches[key.digest] for key in keys]

    def found(self, keys: Sequence[CacheKey]) -> dict[str, DocumentCache]:
        """The stored caches by digest; none where the store cannot be read."""
        try:
            caches = zip(keys, self.get_many(keys), strict=True)
        except StoreUnavailable as error:
            logging.getLogger("kvilt").warning("not read: %s", error)
            return {}
        return {key.digest: cache for key, cache in caches if cache is not None}

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
        key, now, title = cache.key, time.time(), title.encode("utf-8", "replace").decode()
        created = float(os.environ.get("SOURCE_DATE_EPOCH") or now)  # so that files can be made alike, byte for byte
        expires = None if ttl is None else now + ttl
        data = pack(cache, title=title, created=created, expires=expires)
        size, fields = sum(map(len, data)), asdict(key)
        if any(catalogue.asks(size) for catalogue in self.catalogues):
            self.flush()  # what was used last must not be evicted
        count, space = len(cache.tokens), key.namespace
        entry = Entry(key.digest, size, count, title, space, created, now, 0, False, expires, fields)
        return self._write(entry, data)

    def take(self, digest: str, data: bytes) -> bool:
        """Store a document's file as it is, which the caller has checked; False if it was there.

        Raises DamagedCache, OtherVersion and StoreUnavailable."""
        return self._write(replace(describe(digest, MemoryBlob(data)), used=time.time()), [memoryview(data)])

    def _write(self, entry: Entry, data: Sequence[memoryview]) -> bool:
        for catalogue in self.catalogues:
            catalogue.next = entry
        made = self.blobs.put(entry.key, data)
        self._write_soon()
        return made

    def contains(self, digests: Iterable[str]) -> set[str]:
        """Which of these digests are stored."""
        there = self.last.blobs.contains(digests)
        with contextlib.suppress(StoreUnavailable):
            there -= self.last.rows("expires <= ? AND NOT pinned", time.time()).keys() if there else set()
        return {digest for digest in there if (held := self._memo.get(digest)) is None or held.cache is not None}

    def entries(self, namespace: str | None = None) -> list[Entry]:
        """Every stored document, oldest first; only those of a namespace, if one is given."""
        return sorted(self.each(namespace), key=lambda entry: (entry.created, entry.key))

    def each(self, namespace: str | None = None) -> Iterator[Entry]:
        """The same one by one, in no order: there may be millions."""
        stored = self._known(key for key, _ in self.last.list())
        return (entry for entry in stored if namespace in (None, entry.namespace))

    def entry(self, digest: str) -> Entry | None:
        """One stored document."""
        return next(self._known(self.last.blobs.contains([digest])), None)

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
        self.flush(0.0)
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
        self.flush()
        return sum(catalogue.gc() for catalogue in self.catalogues)

    def verify(self) -> list[tuple[str, str]]:
        """Read every document completely; (key, reason) of each that cannot be, of which damaged ones are set aside."""
        return [(key, reason) for key, _ in self.last.list() if (reason := self._problem(key))]

    def close(self) -> None:
        """Write what is pending and release files and connections; the store may be used again."""
        self._memo.clear()
        self.flush(MOMENT)
        self.blobs.close()

    def flush(self, patience: float | None = None) -> None:
        """Write what was counted; while another process does not let us it is kept for the next time."""
        _record(self._uses, self.catalogues, patience)

    def _write_soon(self) -> None:
        """Have uses and what is pending written within a few seconds, without waiting for anything."""
        if self._timer is None or not self._timer.is_alive():
            self._timer = threading.Timer(FLUSH_SECONDS, _record, [self._uses, self.catalogues, 0.0])
            self._timer.daemon = True
            with contextlib.suppress(RuntimeError):  # no new threads while the interpreter ends: `_leave` does it then
                self._timer.start()

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
        over = held.expires is not None and held.expires <= time.time() and not self.last.pins.contains([digest])
        return None if over else held.cache

    def _read(self, key: CacheKey, blob: Blob) -> Opened:
        from kvilt.rows.file import open_cache

        try:
            return Opened(blob.identity, open_cache(blob, key), self.last.describe(key.digest, blob).expires)
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

    def _known(self, digests: Iterable[str]) -> Iterator[Entry]:
        """Stored documents as the catalogue knows them, or, where it does not or is locked, as they tell themselves."""
        self.flush(0.0)
        left = iter(digests)
        while batch := [*itertools.islice(left, BATCH)]:
            rows: dict[str, Entry] = {}
            with contextlib.suppress(StoreUnavailable):
                rows = self.last.rows(f"key IN ({', '.join('?' * len(batch))})", *batch)
            for digest in batch:
                entry = rows.get(digest)
                with contextlib.suppress(DamagedCache):
                    entry = entry or self.last.look(digest)
                if entry is not None and entry.alive(time.time()):
                    yield entry

    def _problem(self, digest: str) -> str:
        """Why a document cannot be read completely; empty if it can, or is not for us to read."""
        from kvilt.rows.file import check_file

        (blob,) = self.last.get_many([digest])
        try:
            if blob is not None:
                self.last.describe(digest, blob)
                check_file(blob, digest)
        except DamagedCache as error:
            self.set_aside(digest, error.reason)
            return error.reason
        except OSError as error:
            return f"it cannot be read: {error.strerror or error}"
        except OtherVersion as error:
            log.info("%s", error)
        return ""

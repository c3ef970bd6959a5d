"""Document caches as files in a folder, shared by any number of processes, within a byte budget."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

from kvilt.errors import DamagedCache, StoreUnavailable
from kvilt.rows.filed import FileLayers, Header
from kvilt.rows.format import file_size, open_file, read_header, sync_folder, write_file
from kvilt.stores.base import CacheStore, Entry, StoreStats
from kvilt.stores.folder import Folder, entry_of
from kvilt.stores.index import Index
from kvilt.stores.policy import Limits, make_policy
from kvilt.types import CacheKey, DocumentCache

log = logging.getLogger("kvilt")

_ADVICE = {
    errno.ENOSPC: "Free space there, or give the store a smaller budget or another path.",
    errno.EDQUOT: "Free space there, or give the store a smaller budget or another path.",
    errno.EFBIG: "Files may not grow that large here: raise the limit (ulimit -f) or give another path.",
    errno.EROFS: "It is read-only: stored documents are served, new ones need another path.",
    errno.EACCES: "Change its permissions, or give another path.",
    errno.EPERM: "Change its permissions, or give another path.",
}


def default_path() -> Path:
    """The user's own store: $XDG_CACHE_HOME/kvilt/store or ~/.cache/kvilt/store."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "kvilt" / "store"


class DiskStore(CacheStore):
    """Holds caches as files: `disk:path=caches,budget=200GB,policy=lru|lfu|greedy-dual,quota=20GB`.

    Whether a document is there, is decided by its file alone; the index serves listing, eviction and counting.
    Raises StoreUnavailable when the folder is not there and cannot be made.
    """

    def __init__(
        self,
        path: str | None = None,
        budget: str | int | None = None,
        policy: str = "lru",
        quota: str | int | None = None,
    ) -> None:
        self.path = Path(path).expanduser() if path else default_path()
        self._limits = Limits.of(budget, quota)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unavailable(error, "cannot make the store", self.path) from error
        self._folder = Folder(self.path)
        self._index = Index(self.path / "index.sqlite", make_policy(policy), self._folder.entries)
        weakref.finalize(self, self._index.close)  # a store that is never closed writes its last uses too
        self._writing = threading.Lock()

    def get(self, key: CacheKey) -> DocumentCache | None:
        cache = self._open(key)
        if cache is None:
            self._index.count("misses")
        else:
            self._index.touch(key.digest)
            self._index.count("hits")
        return cache

    def put(
        self, cache: DocumentCache, *, title: str = "", namespace: str = "default", ttl: float | None = None
    ) -> None:
        key, now = cache.key.digest, time.time()
        expires = None if ttl is None else now + ttl
        with self._writing:  # one at a time, so that the budget holds while writing too
            if self._live_header(key) is not None:
                return
            self._evict(file_size(cache, title=title, namespace=namespace), namespace)
            path = self._folder.file(key)
            try:
                if not path.parent.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    sync_folder(self.path)
                write_file(path, cache, title=title, namespace=namespace, created=now, expires=expires)
                self._folder.refused.discard(key)
            except OSError as error:
                raise _unavailable(error, "cannot write to the store", self.path) from error
            self._register(key, namespace)

    def contains(self, keys: Iterable[str]) -> set[str]:
        there = {key for key in keys if key not in self._folder.refused and self._folder.file(key).exists()}
        if there:
            with contextlib.suppress(StoreUnavailable):
                there -= {key for key in self._index.expired(time.time()) if not self._folder.pinned(key)}
        return there

    def delete(self, key: str) -> bool:
        there = self._folder.file(key).exists()
        self._remove(key)
        self._index.remove([key])
        return there

    def entries(self) -> Iterator[Entry]:
        now = time.time()
        found = self._index.entries()
        gone = {e.key for e in found if not self._folder.file(e.key).exists()}
        if gone:
            self._index.remove(gone)
        return iter([e for e in found if e.key not in gone and not _expired(e.expires, now, e.pinned)])

    def entry(self, key: str) -> Entry | None:
        header = self._live_header(key)
        if header is None:
            return None
        known = self._index.entry(key) or entry_of(header, False)
        return dataclasses.replace(known, pinned=self._folder.pinned(key))

    def stats(self) -> StoreStats:
        total = self._index.counters()
        counts = (total.get(name, 0) for name in ("hits", "misses", "evictions", "damaged"))
        return StoreStats(total["entries"], self._index.held(), self._limits.budget, *counts)

    def pin(self, key: str, pinned: bool = True) -> bool:
        if not self.contains([key]):
            return False
        try:
            self._folder.set_pinned(key, pinned)
        except OSError as error:
            raise _unavailable(error, "cannot pin in the store", self.path) from error
        self._index.set_pinned(key, pinned)
        return True

    def touch(self, key: str) -> None:
        self._index.touch(key)

    def set_aside(self, key: str, reason: str) -> None:
        if self._folder.take_out(key, reason):
            self._index.count("damaged")
        self._index.remove([key])

    def gc(self) -> int:
        now = time.time()
        try:
            freed = self._folder.sweep()
        except OSError as error:
            raise _unavailable(error, "cannot clean the store", self.path) from error
        self._reconcile()
        self._index.drop_claims()
        expired = {key for key in self._index.expired(now) if not self._folder.pinned(key)}
        freed += sum(map(self._remove, expired))
        self._index.remove(expired)
        return freed + sum(self._evict(0, namespace) for namespace in self._index.namespaces())

    def verify(self) -> list[tuple[str, str]]:
        found = []
        for key in self._folder.scan():
            try:
                self._read_all(key)
            except FileNotFoundError:
                continue
            except DamagedCache as error:
                self.set_aside(key, error.reason)
                found.append((key, error.reason))
            except OSError as error:
                found.append((key, f"it cannot be read: {error.strerror}"))
        return found

    def claim(self, key: str) -> bool:
        try:
            return self._index.claim(key)
        except StoreUnavailable:
            return True  # without coordination work may be done twice, which harms nothing

    def release(self, key: str) -> None:
        self._index.release(key)

    def close(self) -> None:
        self._index.close()

    def _open(self, key: CacheKey) -> DocumentCache | None:
        if key.digest in self._folder.refused:
            return None
        try:
            cache = open_file(self._folder.file(key.digest), key)
        except FileNotFoundError:
            return None
        except DamagedCache as error:
            self.set_aside(key.digest, error.reason)
            return None
        except OSError as error:
            log.warning("cannot read stored document %s: %s", key.digest[:16], error)
            return None
        assert isinstance(cache.layers, FileLayers)
        return None if self._is_over(key.digest, cache.layers.header) else cache

    def _is_over(self, key: str, header: Header) -> bool:
        return _expired(header.expires, time.time(), False) and not self._folder.pinned(key)

    def _live_header(self, key: str) -> Header | None:
        """The header of a document that `get` would find."""
        if key in self._folder.refused:
            return None
        try:
            header = read_header(self._folder.file(key))
        except DamagedCache as error:
            self.set_aside(key, error.reason)
            return None
        except OSError:
            return None
        return None if self._is_over(key, header) else header

    def _register(self, key: str, namespace: str) -> None:
        """Tell the index of a new file; a file it does not know is served all the same, and adopted by `gc`."""
        try:
            self._index.remove([key])  # of an expired one
            self._index.insert([self._folder.describe(key)])
            self._evict(0, namespace, keep=key)  # other processes may have written meanwhile
        except (StoreUnavailable, DamagedCache, OSError) as error:
            log.warning("stored document %s is not in the index: %s", key[:16], error)

    def _evict(self, size: int, namespace: str, keep: str = "") -> int:
        if self._limits == Limits():
            return 0
        victims = self._index.victims(  # pinned by the files, whatever the index knows of it
            self._limits, size, namespace, lambda key: key == keep or self._folder.pinned(key)
        )
        freed = sum(self._remove(victim.key) for victim in victims)
        self._index.evicted(victims)
        return freed

    def _remove(self, key: str) -> int:
        try:
            return self._folder.remove(key)
        except OSError as error:
            raise _unavailable(error, "cannot delete from the store", self.path) from error

    def _reconcile(self) -> None:
        """Adopt files the index does not know; forget rows without a file."""
        known = {entry.key for entry in self._index.entries()}
        self._index.insert(list(self._folder.entries(self._index.note, known)))
        self._index.remove([key for key in known if not self._folder.file(key).exists()])

    def _read_all(self, key: str) -> None:
        cache = open_file(self._folder.file(key))
        assert isinstance(cache.layers, FileLayers)
        if cache.key.digest != key:
            raise DamagedCache(key, f"it holds another document, {cache.key.digest[:16]}")
        for name in cache.layers.header.spans:
            cache.layers.read(name)


def _expired(expires: float | None, now: float, pinned: bool) -> bool:
    return expires is not None and expires <= now and not pinned


def _unavailable(error: OSError, what: str, path: Path) -> StoreUnavailable:
    advice = _ADVICE.get(error.errno or 0, "Check the path, or give another.")
    return StoreUnavailable(f"{what} at {path}: {error.strerror}. {advice}")

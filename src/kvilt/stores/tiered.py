"""Stores behind stores: the fast ones answer first, the last one keeps everything."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator

from kvilt.errors import DamagedCache, SpecError, StoreUnavailable
from kvilt.stores.base import CacheStore, Entry, StoreStats
from kvilt.stores.disk import DiskStore
from kvilt.stores.memory import MemoryStore
from kvilt.types import CacheKey, DocumentCache


class TieredStore(CacheStore):
    """Memory before disk: `tiered:memory=2GB,path=caches,budget=200GB,policy=lru,quota=20GB`.

    `policy` holds for both, `budget` and `quota` for the disk. `put` writes to every tier and fails only if the last
    one does; `get` copies what a slower tier had into the faster ones.
    """

    def __init__(
        self,
        memory: str | int = "2GB",
        path: str | None = None,
        budget: str | int | None = None,
        policy: str = "lru",
        quota: str | int | None = None,
    ) -> None:
        self._setup([MemoryStore(memory, policy), DiskStore(path, budget, policy, quota)])

    @classmethod
    def of(cls, *stores: CacheStore) -> TieredStore:
        """Tiers of any stores, fastest first. Raises SpecError."""
        if not stores:
            raise SpecError("a tiered store needs at least one store.")
        tiered = cls.__new__(cls)
        tiered._setup(list(stores))
        return tiered

    def _setup(self, stores: list[CacheStore]) -> None:
        self.stores = stores
        self._lock = threading.Lock()
        self._hits = self._misses = 0

    def get(self, key: CacheKey) -> DocumentCache | None:
        for level in range(len(self.stores)):
            cache = self.stores[level].get(key)
            if cache is not None and level:
                cache = self._promote(cache, level)
            if cache is not None:
                for slower in self.stores[level + 1 :]:
                    slower.touch(key.digest)
                break
        with self._lock:
            self._hits += cache is not None
            self._misses += cache is None
        return cache

    def put(
        self, cache: DocumentCache, *, title: str = "", namespace: str = "default", ttl: float | None = None
    ) -> None:
        for store in self.stores[:-1]:
            with contextlib.suppress(StoreUnavailable):  # the last tier is the one that counts
                store.put(cache, title=title, namespace=namespace, ttl=ttl)
        self.stores[-1].put(cache, title=title, namespace=namespace, ttl=ttl)

    def contains(self, keys: Iterable[str]) -> set[str]:
        wanted = list(keys)
        return set().union(*(store.contains(wanted) for store in self.stores))

    def delete(self, key: str) -> bool:
        return sum([store.delete(key) for store in self.stores]) > 0  # every tier, not only until one answers

    def entries(self) -> Iterator[Entry]:
        """Every document once, as the slowest tier that holds it describes it."""
        found: dict[str, Entry] = {}
        for store in self.stores:
            found.update((entry.key, entry) for entry in store.entries())
        return iter(found.values())

    def entry(self, key: str) -> Entry | None:
        found = (store.entry(key) for store in reversed(self.stores))
        return next((entry for entry in found if entry is not None), None)

    def stats(self) -> StoreStats:
        """Distinct documents; bytes, evictions and damage of all tiers; hits, misses of the whole; the last budget."""
        tiers = [store.stats() for store in self.stores]
        return StoreStats(
            entries=sum(1 for _ in self.entries()),
            bytes=sum(tier.bytes for tier in tiers),
            budget=tiers[-1].budget,
            hits=self._hits,
            misses=self._misses,
            evictions=sum(tier.evictions for tier in tiers),
            damaged=sum(tier.damaged for tier in tiers),
        )

    def pin(self, key: str, pinned: bool = True) -> bool:
        return sum([store.pin(key, pinned) for store in self.stores]) > 0

    def touch(self, key: str) -> None:
        for store in self.stores:
            store.touch(key)

    def set_aside(self, key: str, reason: str) -> None:
        for store in self.stores:
            store.set_aside(key, reason)

    def gc(self) -> int:
        return sum(store.gc() for store in self.stores)

    def verify(self) -> list[tuple[str, str]]:
        return [damage for store in self.stores for damage in store.verify()]

    def claim(self, key: str) -> bool:
        return self.stores[-1].claim(key)  # the tier that other processes share

    def release(self, key: str) -> None:
        self.stores[-1].release(key)

    def close(self) -> None:
        for store in self.stores:
            store.close()

    def _promote(self, cache: DocumentCache, level: int) -> DocumentCache | None:
        """Copy a cache into the faster tiers; the fastest copy, or None if its rows turn out to be damaged."""
        source, key = self.stores[level], cache.key
        entry = source.entry(key.digest)
        ttl = None if entry is None or entry.expires is None else entry.expires - time.time()
        if entry is None or (ttl is not None and ttl <= 0):
            return cache  # no longer there, or kept by its pin alone: a copy would outlive it
        for store in reversed(self.stores[:level]):
            try:
                store.put(cache, title=entry.title, namespace=entry.namespace, ttl=ttl)
            except StoreUnavailable:
                continue
            except DamagedCache as error:
                source.set_aside(key.digest, error.reason)
                return None
            store.pin(key.digest, entry.pinned)
            cache = store.get(key) or cache
        return cache

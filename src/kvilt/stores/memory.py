"""Document caches in this process's memory, within a byte budget."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from kvilt.rows.codec import Packed, PackedLayers
from kvilt.stores.base import CacheStore, Entry, StoreStats
from kvilt.stores.policy import Limits, Standing, make_policy
from kvilt.types import CacheKey, DocumentCache, TensorLayers


@dataclass
class _Held:
    cache: DocumentCache
    entry: Entry
    score: float


class MemoryStore(CacheStore):
    """Holds caches in memory: `memory:budget=4GB,policy=lru|lfu|greedy-dual,quota=1GB`.

    What `get` returns shares the stored tensors: read them, do not write. `put` raises StoreUnavailable only for a
    document that can never fit.
    """

    def __init__(self, budget: str | int = "4GB", policy: str = "lru", quota: str | int | None = None) -> None:
        self._limits = Limits.of(budget, quota)
        self._policy = make_policy(policy)
        self._lock = threading.RLock()
        self._held: dict[str, _Held] = {}  # in order of last use
        self._bytes: dict[str | None, int] = {None: 0}  # by namespace; None: all
        self._clock = 0.0
        self._hits = self._misses = self._evictions = self._damaged = 0

    def get(self, key: CacheKey) -> DocumentCache | None:
        with self._lock:
            held = self._held.get(key.digest)
            if held is None or _expired(held.entry, time.time()):
                self._misses += 1
                return None
            self._hits += 1
            self._use(held)
            return held.cache

    def put(
        self, cache: DocumentCache, *, title: str = "", namespace: str = "default", ttl: float | None = None
    ) -> None:
        now, key = time.time(), cache.key.digest
        if self.contains([key]):
            return
        owned = _owned(cache)  # the copy is made outside the lock: it may read a file
        size = owned.nbytes + sum(t.nbytes for t in (owned.tokens, owned.offsets, owned.chunks) if t is not None)
        expires = None if ttl is None else now + ttl
        entry = Entry(key, size, len(owned.tokens), title, namespace, now, now, 0, False, expires, asdict(cache.key))
        with self._lock:
            if self.contains([key]):
                return
            self._drop(key)  # an expired one
            self._evict(size, namespace)
            self._held[key] = _Held(owned, entry, self._policy.score(0, entry.tokens, size, self._clock))
            self._account(entry, +1)

    def contains(self, keys: Iterable[str]) -> set[str]:
        with self._lock:
            now = time.time()
            return {k for k in keys if k in self._held and not _expired(self._held[k].entry, now)}

    def delete(self, key: str) -> bool:
        with self._lock:
            return self._drop(key) > 0

    def entries(self) -> Iterator[Entry]:
        with self._lock:
            now = time.time()
            return iter([held.entry for held in self._held.values() if not _expired(held.entry, now)])

    def entry(self, key: str) -> Entry | None:
        with self._lock:
            held = self._held.get(key)
            return None if held is None or _expired(held.entry, time.time()) else held.entry

    def stats(self) -> StoreStats:
        with self._lock:
            counts = (self._hits, self._misses, self._evictions, self._damaged)
            return StoreStats(len(self._held), self._bytes[None], self._limits.budget, *counts)

    def pin(self, key: str, pinned: bool = True) -> bool:
        with self._lock:
            if not self.contains([key]):
                return False
            held = self._held[key]
            held.entry = dataclasses.replace(held.entry, pinned=pinned)
            return True

    def touch(self, key: str) -> None:
        with self._lock:
            if key in self._held:
                self._use(self._held[key])

    def set_aside(self, key: str, reason: str) -> None:
        with self._lock:
            self._damaged += self._drop(key) > 0

    def gc(self) -> int:
        with self._lock:
            now = time.time()
            freed = sum(self._drop(k) for k in [k for k, held in self._held.items() if _expired(held.entry, now)])
            return freed + sum(self._evict(0, name) for name in list(self._bytes) if name is not None)

    def verify(self) -> list[tuple[str, str]]:
        return []  # memory is trusted

    def close(self) -> None:
        with self._lock:
            self._held.clear()
            self._bytes = {None: 0}

    def _use(self, held: _Held) -> None:
        old = held.entry
        held.entry = dataclasses.replace(old, hits=old.hits + 1, used=time.time())
        held.score = self._policy.score(held.entry.hits, old.tokens, old.bytes, self._clock)
        self._held[old.key] = self._held.pop(old.key)

    def _evict(self, size: int, namespace: str) -> int:
        freed = 0
        for standing in self._limits.victims(size, namespace, lambda scope: self._bytes.get(scope, 0), self._ranked):
            self._clock = max(self._clock, standing.score)
            freed += self._drop(standing.key)
            self._evictions += 1
        return freed

    def _ranked(self, namespace: str | None) -> list[Standing]:
        now = time.time()
        free = [h for h in self._held.values() if not h.entry.pinned and namespace in (None, h.entry.namespace)]
        free.sort(key=lambda held: (not _expired(held.entry, now), held.score))  # stable: ties in order of last use
        return [Standing(held.entry.key, held.entry.bytes, held.score) for held in free]

    def _drop(self, key: str) -> int:
        held = self._held.pop(key, None)
        if held is None:
            return 0
        self._account(held.entry, -1)
        return held.entry.bytes

    def _account(self, entry: Entry, sign: int) -> None:
        for scope in (None, entry.namespace):
            self._bytes[scope] = self._bytes.get(scope, 0) + sign * entry.bytes


def _expired(entry: Entry, now: float) -> bool:
    return entry.expires is not None and entry.expires <= now and not entry.pinned


def _owned(cache: DocumentCache) -> DocumentCache:
    """The cache in memory of its own: never a view that keeps a whole batch alive, nor a file or a device."""
    layers = cache.layers
    if layers is None:
        raise ValueError("a document that was tokenised only has no rows to store")
    held = isinstance(layers, TensorLayers) and (*layers.keys, *layers.values)
    held = tuple(layers.parts.values()) if isinstance(layers, PackedLayers) else held
    if held and all(map(_is_whole, held)):
        return cache
    count, *block = layers.shape
    with torch.inference_mode(False):  # a tensor born in inference mode could never serve a trainer
        tokens, offsets = cache.tokens.cpu().clone(), cache.offsets.cpu().clone()
        if isinstance(layers, Packed):
            parts = {name: layers.read(name).clone() for name in layers.specs}
            return dataclasses.replace(cache, tokens=tokens, offsets=offsets, layers=PackedLayers(layers.codec, parts))
        rows = torch.empty(2, count, *block, dtype=layers.dtype)  # one allocation for all layers
    for i in range(count):
        with torch.no_grad():
            layers.fetch(i, "keys", rows[0, i])
            layers.fetch(i, "values", rows[1, i])
    return dataclasses.replace(
        cache, tokens=tokens, offsets=offsets, layers=TensorLayers(tuple(rows[0].unbind()), tuple(rows[1].unbind()))
    )


def _is_whole(tensor: Tensor) -> bool:
    plain = tensor.device.type == "cpu" and not tensor.is_inference() and not tensor.requires_grad
    return plain and tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes

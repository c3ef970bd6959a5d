"""Blob stores behind blob stores: the fast ones answer first, the last one holds everything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from kvilt.errors import StoreError, StoreUnavailable
from kvilt.stores.blobs import Blob, Blobs, BlobStore, OnePerKey, check_key
from kvilt.stores.disk import DiskStore
from kvilt.stores.memory import MemoryStore
from kvilt.stores.sizes import Size
from kvilt.stores.store import Store


class TieredBlobs(BlobStore):
    """Blobs in the last tier, and copies of some of them in faster ones. What the last tier lost, no other answers."""

    def __init__(self, tiers: Sequence[BlobStore]) -> None:
        self.tiers, self.last = list(tiers), tiers[-1]
        self._flights = OnePerKey()

    def get_many(self, keys: Sequence[str]) -> Blobs:
        blobs: dict[str, Blob] = {}
        missing = self._there(keys)
        for level, tier in enumerate(self.tiers):
            for key, blob in zip(missing, tier.get_many(missing), strict=True):
                if blob is not None:
                    blobs[key] = self._promoted(key, blob, level)
            missing = [key for key in missing if key not in blobs]
        return [blobs.get(key) for key in keys]

    def put(self, key: str, data: Sequence[memoryview]) -> bool:
        made = self.last.put(key, data)
        for tier in self.tiers[:-1]:
            with contextlib.suppress(StoreError):  # the last tier is the one that counts
                tier.put(key, data)
        return made

    def delete(self, key: str) -> bool:
        return sum([tier.delete(key) for tier in reversed(self.tiers)]) > 0  # all of them, not only the first

    def list(self) -> Iterator[tuple[str, int]]:
        return self.last.list()

    def contains(self, keys: Iterable[str]) -> set[str]:
        return self.last.contains(keys)

    def set_aside(self, key: str, reason: str) -> bool:
        return sum([tier.set_aside(key, reason) for tier in self.tiers]) > 0

    def sweep(self) -> int:
        return sum(tier.sweep() for tier in self.tiers)

    def close(self) -> None:
        for tier in self.tiers:
            tier.close()

    def _there(self, keys: Sequence[str]) -> Sequence[str]:
        """Which keys the last tier holds; all of them may be, while it cannot be asked."""
        unique = list(dict.fromkeys(check_key(key) for key in keys))
        with contextlib.suppress(StoreUnavailable):
            return [*self.last.contains(unique)]
        return unique

    def _promoted(self, key: str, blob: Blob, level: int) -> Blob:
        """A copy in the fastest tier that takes one; who asks while it is being copied waits for that."""
        if level == 0:
            return blob
        with self._flights.alone(key) as busy, contextlib.suppress(OSError, EOFError, StoreError):  # a copy is a gain
            if busy and (copy := self._copy(key, level)):
                return copy
            data = memoryview(bytearray(blob.size))
            blob.read(0, [data])
            for tier in reversed(self.tiers[:level]):
                with contextlib.suppress(StoreUnavailable):
                    tier.put(key, [data])
        return self._copy(key, level) or blob

    def _copy(self, key: str, level: int) -> Blob | None:
        """What the tiers before `level` have of it."""
        return next((copy for tier in self.tiers[:level] for copy in tier.get_many([key]) if copy), None)


class TieredStore(Store):
    """Memory before disk, `tiered:memory=2GB,path=caches,budget=200GB,policy=lru,quota=20GB`, or any stores, fastest first.

    Of memory before disk `policy` is both's, `budget` and `quota` are the disk's."""

    def __init__(
        self,
        *_stores: Store,
        memory: Size = "2GB",
        path: str | None = None,
        budget: Size = None,
        policy: str = "lru",
        quota: Size = None,
    ) -> None:
        self.stores = _stores or (MemoryStore(memory, policy), DiskStore(path, budget, policy, quota))
        blobs = TieredBlobs([store.blobs for store in self.stores])
        super().__init__(blobs, *(catalogue for store in self.stores for catalogue in store.catalogues))

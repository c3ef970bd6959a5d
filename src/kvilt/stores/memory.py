"""Blobs in this process's memory, and the store of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvilt.stores.blobs import Blobs, BlobStore, MemoryBlob, check_key
from kvilt.stores.catalogue import Catalogue
from kvilt.stores.sizes import Size, parse_size
from kvilt.stores.store import Store


class MemoryBlobs(BlobStore):
    """Blobs in this process's memory."""

    def __init__(self) -> None:
        self._blobs: dict[str, MemoryBlob] = {}  # every use of it is one operation, so no lock is needed

    def get_many(self, keys: Sequence[str]) -> Blobs:
        return [self._blobs.get(check_key(key)) for key in keys]

    def put(self, key: str, data: Sequence[memoryview]) -> bool:
        if check_key(key) in self._blobs:
            return False
        blob = MemoryBlob([memoryview(b"".join(data))])
        return self._blobs.setdefault(key, blob) is blob

    def delete(self, key: str) -> bool:
        return self._blobs.pop(check_key(key), None) is not None

    def list(self) -> Iterator[tuple[str, int]]:
        return iter([(key, blob.size) for key, blob in self._blobs.copy().items()])

    def close(self) -> None:
        self._blobs.clear()


class MemoryStore(Store):
    """Keeps documents in this process's memory: `memory:budget=4GB,policy=lru|lfu|greedy-dual,quota=1GB`."""

    def __init__(self, budget: Size = "4GB", policy: str = "lru", quota: Size = None) -> None:
        limits = parse_size(budget, "budget"), parse_size(quota, "quota")
        super().__init__(Catalogue(MemoryBlobs(), MemoryBlobs(), None, policy, *limits))

"""The store of documents in this process's memory."""

from __future__ import annotations

from kvilt.stores.blobs import MemoryBlobs
from kvilt.stores.catalogue import Catalogue
from kvilt.stores.sizes import Size, parse_size
from kvilt.stores.store import Store


class MemoryStore(Store):
    """Keeps documents in this process's memory: `memory:budget=4GB,policy=lru|lfu|greedy-dual,quota=1GB`."""

    def __init__(self, budget: Size = "4GB", policy: str = "lru", quota: Size = None) -> None:
        limits = parse_size(budget, "budget"), parse_size(quota, "quota")
        super().__init__(Catalogue(MemoryBlobs(), None, None, policy, *limits))

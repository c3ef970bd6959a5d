"""The store of documents in a folder."""

from __future__ import annotations

import os
from pathlib import Path

from kvilt.stores.catalogue import Catalogue
from kvilt.stores.folder import DiskBlobs, trouble
from kvilt.stores.sizes import Size, parse_size
from kvilt.stores.store import Store


class DiskStore(Store):
    """Keeps documents as files: `disk:path=caches,budget=200GB,policy=lru|lfu|greedy-dual,quota=20GB`.

    Without a budget it takes half of the disk's free space, its own documents counted as free."""

    def __init__(self, path: str | None = None, budget: Size = None, policy: str = "lru", quota: Size = None) -> None:
        self.path = Path(path).expanduser() if path else default_path()
        with trouble("cannot make the store", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        limits = parse_size(budget, "budget") or 0, parse_size(quota, "quota")  # 0: a share of the disk
        blobs, pins = DiskBlobs(self.path), DiskBlobs(self.path, ".pin")
        super().__init__(Catalogue(blobs, pins, self.path / "catalogue.sqlite", policy, *limits))


def default_path() -> Path:
    """The user's own store: $XDG_CACHE_HOME/kvilt/store or ~/.cache/kvilt/store."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "kvilt" / "store"

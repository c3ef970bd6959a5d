"""Document caches of random rows, and the stores that one contract suite runs on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from kvilt.stores.base import CacheStore
from kvilt.stores.disk import DiskStore
from kvilt.stores.memory import MemoryStore
from kvilt.stores.tiered import TieredStore

from kvilt.types import CacheKey, DocumentCache, TensorLayers, digest_of

POLICIES = ("lru", "lfu", "greedy-dual")
KINDS = ("memory", "disk", "tiered")


def make_key(seed: int, dtype: torch.dtype = torch.float32) -> CacheKey:
    return CacheKey("model", "tokenizer", "rope", str(dtype), "encoding", "", digest_of(f"document {seed}"))


def make_cache(
    seed: int,
    rows: int = 8,
    tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    layers: int = 2,
    heads: int = 2,
    dim: int = 4,
) -> DocumentCache:
    """Always the same cache for the same arguments; `tokens` above `rows` makes it pruned."""
    random = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, layers, heads, rows, dim, generator=random).to(dtype).unbind()
    run = torch.arange(tokens or rows) + 1000 * seed
    offsets = torch.arange(rows)
    held = TensorLayers(tuple(k.clone() for k in keys), tuple(v.clone() for v in values))
    return DocumentCache(run, offsets, len(run), make_key(seed, dtype), held)


def rows_of(cache: DocumentCache) -> torch.Tensor:
    """(2, layers, heads, rows, dim), read through `fetch`."""
    assert cache.layers is not None
    count = cache.layers.shape[0]
    read = [[cache.layers.fetch(i, which).clone() for i in range(count)] for which in ("keys", "values")]
    return torch.stack([torch.stack(part) for part in read])


def same(one: DocumentCache, other: DocumentCache) -> bool:
    """Bit-exact equality of everything a document cache holds."""
    return (
        one.key == other.key
        and (one.length, one.dropped) == (other.length, other.dropped)
        and torch.equal(one.tokens, other.tokens)
        and torch.equal(one.offsets, other.offsets)
        and torch.equal(rows_of(one), rows_of(other))
    )


def make_store(
    kind: str, path: Path, policy: str = "lru", budget: int | None = None, quota: int | None = None
) -> CacheStore:
    """A store whose last tier has that budget and quota."""
    if kind == "memory":
        return MemoryStore(budget or "1GB", policy, quota)
    if kind == "disk":
        return DiskStore(str(path), budget, policy, quota)
    return TieredStore("1GB", str(path), budget, policy, quota)


def last_tier(store: CacheStore) -> CacheStore:
    return store.stores[-1] if isinstance(store, TieredStore) else store


def unit(make: Callable[..., CacheStore], **shape: int) -> int:
    """Bytes the last tier counts for one document."""
    store = last_tier(make("unit"))
    store.put(make_cache(999, **shape))
    return store.stats().bytes

"""Budget, quota and eviction order, on every store with every eviction policy."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from kvilt.stores.base import CacheStore
from store_kit import last_tier, make_cache, make_key, unit

from kvilt.errors import StoreUnavailable

Maker = Callable[..., CacheStore]
pytestmark = pytest.mark.usefixtures("no_sync")


def test_eviction_order(make: Maker, policy: str) -> None:
    """Three equal documents fit. Uses: a, a, b, c. Computed by hand, r = tokens / bytes of one document.

    d comes: lru drops a (used longest ago); lfu drops b (one use, older than c's); greedy-dual drops b (2r, as c).
    e comes: lru drops b; lfu drops d (no use); greedy-dual drops c (2r; d has clock 2r + r = 3r, a has 3r).
    f comes: lru drops c; lfu drops e; greedy-dual drops a (3r like d and e, but used longest ago).
    """
    store = make(budget=3 * unit(make))
    for i in (0, 1, 2):
        store.put(make_cache(i))
    for i in (0, 0, 1, 2):
        store.get(make_key(i))
    survivors = []
    for new in (3, 4, 5):
        store.put(make_cache(new))
        tier = last_tier(store)
        survivors.append("".join("abcdef"[i] for i in range(6) if tier.contains([make_key(i).digest])))
    expected = {"lru": ["bcd", "cde", "def"], "lfu": ["acd", "ace", "acf"], "greedy-dual": ["acd", "ade", "def"]}
    assert survivors == expected[policy]
    assert last_tier(store).stats().evictions == 3


def test_pinned_documents_are_never_evicted(make: Maker) -> None:
    store = make(budget=3 * unit(make))
    store.put(make_cache(0))
    store.pin(make_key(0).digest)
    for i in range(1, 10):
        store.put(make_cache(i))
    assert last_tier(store).contains([make_key(0).digest])
    store.pin(make_key(0).digest, False)
    for i in range(10, 20):
        for _ in range(3):
            store.get(make_key(i - 1))
        store.put(make_cache(i))
    assert not last_tier(store).contains([make_key(0).digest])


def test_what_cannot_fit_is_said(make: Maker) -> None:
    size = unit(make)
    store = make(budget=2 * size)
    with pytest.raises(StoreUnavailable, match="larger"):
        store.put(make_cache(0, rows=2000))
    for i in (1, 2):
        store.put(make_cache(i))
        store.pin(make_key(i).digest)
    with pytest.raises(StoreUnavailable, match="pinned"):
        store.put(make_cache(3))
    tier = last_tier(store)
    assert tier.contains(make_key(i).digest for i in range(4)) == {make_key(1).digest, make_key(2).digest}


def test_expired_documents_go_first(make: Maker, clock: Callable[[float], None]) -> None:
    store = make(budget=3 * unit(make))
    store.put(make_cache(0))
    store.put(make_cache(1), ttl=10)
    store.put(make_cache(2))
    for _ in range(3):
        store.get(make_key(1))
    clock(20)
    store.put(make_cache(3))
    assert last_tier(store).contains(make_key(i).digest for i in range(4)) == {make_key(i).digest for i in (0, 2, 3)}


def test_quota_holds_per_namespace(make: Maker) -> None:
    store = make(quota=2 * unit(make))
    for i in range(5):
        store.put(make_cache(i), namespace="small")
        store.put(make_cache(100 + i), namespace=f"other{i}")
    held = [e.namespace for e in last_tier(store).entries()]
    assert held.count("small") == 2
    assert len(held) == 7
    with pytest.raises(StoreUnavailable, match="quota"):
        store.put(make_cache(50, rows=2000), namespace="small")


def test_the_budget_is_never_exceeded(make: Maker, tmp_path: Path) -> None:
    chance, budget = random.Random(0), 10 * unit(make, rows=40)
    store = make(budget=budget)
    for i in range(60):
        store.put(make_cache(i, rows=chance.randrange(1, 120)))
        store.get(make_key(chance.randrange(i + 1)))
        assert last_tier(store).stats().bytes <= budget
        assert sum(p.stat().st_size for p in (tmp_path / "store").rglob("*.safetensors")) <= budget
    assert last_tier(store).stats().entries > 3

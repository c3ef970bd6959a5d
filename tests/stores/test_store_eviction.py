"""Budget, quota and eviction order, on every kind of store."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from store_kit import digest, make_cache, make_key, stored, unit

from kvilt.errors import StoreUnavailable
from kvilt.stores.disk import DiskStore
from kvilt.stores.memory import MemoryStore
from kvilt.stores.store import Store

Maker = Callable[..., Store]
pytestmark = pytest.mark.usefixtures("no_sync")


def test_eviction_order(make: Maker, policy: str) -> None:
    """Danger: the wrong document goes.

    Three equal documents fit. Uses: a, a, b, c. Computed by hand, r = tokens / bytes of one document.
    d comes: lru drops a (used longest ago); lfu drops b (one use, older than c's); greedy-dual drops b (2r, as c).
    e comes: lru drops b; lfu drops d (no use); greedy-dual drops c (2r; d has clock 2r + r = 3r, a has 3r).
    f comes: lru drops c; lfu drops e; greedy-dual drops a (3r like d and e, but used longest ago).
    """
    store = make(budget=3 * unit(), policy=policy)
    for i in (0, 1, 2):
        store.put(make_cache(i))
    for i in (0, 0, 1, 2):
        store.get(make_key(i))
    survivors = []
    for new in (3, 4, 5):
        store.put(make_cache(new))
        survivors.append("".join("abcdef"[i] for i in sorted(stored(store, range(6)))))
    expected = {"lru": ["bcd", "cde", "def"], "lfu": ["acd", "ace", "acf"], "greedy-dual": ["acd", "ade", "def"]}
    assert survivors == expected[policy]
    assert store.stats().evictions == 3


@pytest.mark.parametrize(("policy", "kept"), [("greedy-dual", {1, 4}), ("lru", {3, 4}), ("lfu", {3, 4})])
def test_greedy_dual_keeps_what_is_dear_for_its_size(policy: str, kept: set[int]) -> None:
    """Danger: a pruned document, which costs as much to encode again as a whole one, goes before larger ones."""
    small, large = unit(rows=2, tokens=400), unit(rows=400)
    store = MemoryStore(2 * large + small - 1, policy)
    store.put(make_cache(1, rows=2, tokens=400))
    for i in (2, 3, 4):  # two of them fit, but not beside the first
        store.put(make_cache(i, rows=400))
    assert stored(store, range(5)) == kept


def test_pinned_documents_are_never_evicted(make: Maker) -> None:
    """Danger: what a user wants kept goes with the next document."""
    store = make(budget=3 * unit())
    store.put(make_cache(0))
    store.pin(digest(0))
    for i in range(1, 10):
        store.put(make_cache(i))
    assert stored(store, [0]) == {0}
    store.pin(digest(0), False)
    for i in range(10, 20):
        store.get(make_key(i - 1))
        store.put(make_cache(i))
    assert stored(store, [0]) == set()


def test_what_cannot_fit_is_said(make: Maker) -> None:
    """Danger: documents are evicted for one that cannot be stored in any case, or nobody is told why it is not."""
    store = make(budget=2 * unit())
    for i in (1, 2):
        store.put(make_cache(i))
    with pytest.raises(StoreUnavailable, match="larger"):
        store.put(make_cache(0, rows=2000))
    assert stored(store, range(4)) == {1, 2}
    for i in (1, 2):
        store.pin(digest(i))
    with pytest.raises(StoreUnavailable, match="pinned"):
        store.put(make_cache(3))
    assert stored(store, range(4)) == {1, 2}


def test_expired_documents_go_first(make: Maker, clock: Callable[[float], None]) -> None:
    """Danger: dead documents take the place of living ones."""
    store = make(budget=3 * unit())
    store.put(make_cache(0))
    store.put(make_cache(1), ttl=10)
    store.put(make_cache(2))
    for _ in range(3):
        store.get(make_key(1))
    clock(20)
    store.put(make_cache(3))
    assert stored(store, range(4)) == {0, 2, 3}


def test_quota_holds_per_namespace(make: Maker) -> None:
    """Danger D7: one namespace takes the room of all, or evicts the documents of another."""
    store = make(quota=2 * unit() + 500)
    for i in range(5):
        store.put(make_cache(i, namespace="small"))
        store.put(make_cache(i, namespace=f"other{i}"))
    names = [e.namespace for e in store.entries()]
    assert names.count("small") == 2
    assert len(names) == 7
    with pytest.raises(StoreUnavailable, match="quota"):
        store.put(make_cache(50, rows=2000, namespace="small"))
    assert len(store.entries()) == 7


def test_the_budget_is_never_exceeded(make: Maker, tmp_path: Path) -> None:
    """Danger: a store grows beyond what it was given."""
    chance, budget = random.Random(0), 10 * unit(rows=40)
    store = make(budget=budget)
    for i in range(40):
        store.put(make_cache(i, rows=chance.randrange(1, 120)))
        store.get(make_key(chance.randrange(i + 1)))
        assert store.stats().bytes <= budget
        assert sum(p.stat().st_size for p in (tmp_path / "store").rglob("*.safetensors")) <= budget
    assert store.stats().entries > 3


def test_a_smaller_budget_and_another_policy_hold_after_gc(tmp_path: Path) -> None:
    """Danger: a store goes on under the rules it was opened with first."""
    store = DiskStore(str(tmp_path))
    for seed in range(6):
        store.put(make_cache(seed))
    for seed in (0, 0, 1, 2, 3, 4, 5):
        store.get(make_key(seed))
    store.close()
    smaller = DiskStore(str(tmp_path), budget=2 * unit(), policy="lfu")
    assert smaller.gc() == 4 * unit()
    assert stored(smaller, range(6)) == {0, 5}
    smaller.close()


def test_a_disk_store_is_never_unlimited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: a store without a budget fills the disk. It takes half of the free space, its own documents counted."""
    store, room = DiskStore(str(tmp_path)), [8 * unit()]

    def usage(path: Path) -> object:
        held = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
        return type("Usage", (), {"free": room[0] - held})

    monkeypatch.setattr("shutil.disk_usage", usage)
    for seed in range(10):
        store.put(make_cache(seed))
    assert store.stats().entries == 4
    assert store.stats().budget == 4 * unit()
    room[0] = 4 * unit()  # others fill the disk: the store makes room
    store.put(make_cache(11))
    assert store.stats().entries == 2
    store.close()


def test_put_into_a_full_store_of_many_is_quick() -> None:
    """Danger: with 20,000 entries every `put` sorts all of them."""
    cache, size = make_cache(0), unit()
    store = MemoryStore(20_000 * size)
    store.catalogues[0].write(lambda db: None)
    rows = [replace(entry, key=f"{i:064x}") for entry in [_entry_of(cache)] for i in range(20_000)]
    store.catalogues[0].write(lambda db: store.catalogues[0]._insert(db, rows))
    assert store.stats().bytes == 20_000 * size
    took = []
    for seed in range(1, 30):
        fresh = replace(cache, key=make_key(seed))
        began = time.perf_counter()
        store.put(fresh)
        took.append(time.perf_counter() - began)
    assert store.stats().evictions == 29
    assert sorted(took)[len(took) // 4] < 1e-3  # a quiet moment of a busy machine


def _entry_of(cache: object) -> object:
    store = MemoryStore()
    store.put(cache)
    return store.entries()[0]

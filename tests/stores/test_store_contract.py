"""What every store promises, on every kind of store."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch
from store_kit import damage, digest, make_cache, make_key, same, stored, unit

from kvilt.errors import SpecError, StoreError, UserError
from kvilt.rows.rows import TensorRows, whole
from kvilt.stores.blobs import MemoryBlobs
from kvilt.stores.store import REMEMBERED, Store

Maker = Callable[..., Store]
pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_put_comes_back(store: Store, dtype: torch.dtype) -> None:
    """Danger: rows, tokens or places are not those that were stored."""
    cache = replace(make_cache(1, dtype=dtype, rows=7, tokens=11), dropped=2, length=9)
    assert store.put(cache)
    for _ in range(2):
        one = store.get(cache.key)
        assert same(one, cache)
        assert one.rows.dtype == dtype
        assert one.nbytes == cache.nbytes


def test_many_in_any_order(store: Store) -> None:
    """Danger: a request for several documents mixes them up, or fails for one that is asked for twice."""
    for seed in range(4):
        store.put(make_cache(seed))
    wanted = [3, 9, 1, 1, 0, 3]
    caches = store.get_many([make_key(seed) for seed in wanted])
    assert [cache is None for cache in caches] == [seed == 9 for seed in wanted]
    assert all(same(c, make_cache(seed)) for c, seed in zip(caches, wanted, strict=True) if c is not None)
    assert store.get_many([]) == []
    stats = store.stats()
    assert (stats.hits, stats.misses) == (5, 1)


def test_a_store_owns_its_rows(store: Store) -> None:
    """Danger: rows that are a view into a batch, or born in inference mode, change or cannot serve a trainer."""
    with torch.inference_mode():
        batch = make_cache(1).rows.data.repeat(1, 1, 1, 2, 1)
        store.put(replace(make_cache(1), rows=TensorRows(batch[:, :, :, :8])))
        batch.zero_()
    one = store.get(make_key(1))
    assert same(one, make_cache(1))
    assert not whole(one.rows).is_inference()


def test_put_of_an_existing_key_changes_nothing(store: Store) -> None:
    """Danger: a second writer replaces what others read just now."""
    first, second = make_cache(1), replace(make_cache(2), key=make_key(1))
    assert store.put(first, title="first")
    assert not store.put(second, title="second")
    assert same(store.get(first.key), first)
    assert [e.title for e in store.entries()] == ["first"]


def test_a_document_without_rows_is_refused(store: Store) -> None:
    """Danger: a document that was tokenised only is stored as one without keys and values."""
    with pytest.raises(ValueError, match="no rows"):
        store.put(replace(make_cache(1), rows=None))
    assert store.get(make_key(1)) is None


def test_entries_describe_the_documents(store: Store) -> None:
    """Danger: a listing says of a document what is not so."""
    before = time.time()
    store.put(make_cache(1, tokens=20, namespace="books"), title="Größe \ud800 ✓", ttl=50)
    store.put(make_cache(2), title="\x1b[31m\n\0")
    one, two = store.entries()
    assert (one.key, two.key) == (digest(1, "books"), digest(2))
    assert (one.tokens, one.namespace, one.pinned) == (20, "books", False)
    assert one.fields == asdict(make_key(1, namespace="books"))
    assert one.title.startswith("Größe")
    assert two.title == "\x1b[31m\n\0"  # shown escaped, kept as it is
    assert before <= one.created <= time.time()
    assert one.expires == pytest.approx(before + 50, abs=5)
    assert two.expires is None
    assert store.entry(one.key) == one
    assert store.entry("0" * 64) is None
    assert sum(e.bytes for e in (one, two)) == store.stats().bytes


def test_namespaces_are_apart(store: Store) -> None:
    """Danger: what one namespace stored, another hits, lists or deletes."""
    for namespace in ("ann", "bob", "shared"):
        store.put(make_cache(1, namespace=namespace), title=namespace)
    store.delete(digest(1, "bob"))
    assert store.get(make_key(1, namespace="bob")) is None
    assert same(store.get(make_key(1, namespace="ann")), make_cache(1, namespace="ann"))
    assert [e.title for e in store.entries("ann")] == ["ann"]
    assert store.entries("bob") == []
    assert not store.delete(digest(1, "ann"), "bob")
    assert not store.delete(digest(1, "bob"), "bob")
    assert store.delete(digest(1, "ann"), "ann")
    assert [e.title for e in store.entries()] == ["shared"]


def test_contains_and_delete(store: Store) -> None:
    """Danger: a deleted document is still listed, counted or served."""
    store.put(make_cache(1))
    assert store.contains(iter([digest(1), digest(2)])) == {digest(1)}
    assert store.delete(digest(1))
    assert not store.delete(digest(1))
    assert store.contains([digest(1), digest(2)]) == set()
    assert store.get(make_key(1)) is None
    assert store.entries() == []
    assert (store.stats().entries, store.stats().bytes) == (0, 0)


def test_only_digests_name_documents(store: Store) -> None:
    """Danger D1: `delete("/abs/x")`, `pin(...)`, `entry(...)` touch files outside the store."""
    for name in ("/abs/x", "../x", "x", ""):
        for work in (
            store.delete,
            store.pin,
            store.entry,
            lambda n: store.contains([n]),
            lambda n: store.set_aside(n, ""),
        ):
            with pytest.raises(StoreError, match="64 hex digits"):
                work(name)


def test_time_to_live(store: Store, clock: Callable[[float], None]) -> None:
    """Danger: an expired document is served or listed, or keeps a new one from being stored."""
    store.put(make_cache(1), ttl=100)
    store.put(make_cache(2), ttl=300)
    store.put(make_cache(3))
    clock(99)
    assert store.get(make_key(1)) is not None
    clock(2)
    assert store.get(make_key(1)) is None
    assert store.entry(digest(1)) is None
    assert not store.pin(digest(1))
    assert stored(store, [1, 2, 3]) == {2, 3}
    assert {e.key for e in store.entries()} == {digest(2), digest(3)}
    assert store.gc() > 0
    assert store.stats().entries == 2
    clock(1000)
    assert store.get(make_key(2)) is None
    assert store.put(make_cache(2))  # over an expired one, before any gc
    assert same(store.get(make_key(2)), make_cache(2))
    assert store.get(make_key(3)) is not None


def test_a_pin_outlasts_the_time_to_live(store: Store, clock: Callable[[float], None]) -> None:
    """Danger: what a user wants kept is dropped."""
    store.put(make_cache(1), ttl=100)
    assert store.pin(digest(1))
    assert not store.pin("0" * 64)
    clock(200)
    store.gc()
    assert store.get(make_key(1)) is not None
    assert store.entry(digest(1)).pinned
    assert stored(store, [1]) == {1}
    assert store.pin(digest(1), False)
    assert store.get(make_key(1)) is None
    store.gc()
    assert store.stats().entries == 0


def test_a_pin_survives_repair_but_not_deletion(store: Store) -> None:
    """Danger D9: a pinned document is damaged and encoded again, and is no longer pinned."""
    store.put(make_cache(1))
    store.pin(digest(1))
    damage(store, 1)
    store.set_aside(digest(1), "a test says so")
    store.gc()
    assert store.get(make_key(1)) is None
    store.put(make_cache(1))
    assert store.entry(digest(1)).pinned
    store.delete(digest(1))
    store.put(make_cache(1))
    assert not store.entry(digest(1)).pinned


def test_set_aside_makes_room_for_a_new_one(store: Store) -> None:
    """Danger: a damaged document is served again, or blocks its own repair."""
    store.put(make_cache(1))
    assert store.get(make_key(1)) is not None
    damage(store, 1)
    store.set_aside(digest(1), "a test says so")
    store.set_aside("0" * 64, "not there")
    assert store.get(make_key(1)) is None
    assert stored(store, [1]) == set()
    assert store.put(make_cache(1))
    assert same(store.get(make_key(1)), make_cache(1))
    assert store.stats().damaged == 1


def test_verify_and_gc_of_a_sound_store_do_nothing(store: Store) -> None:
    """Danger: housekeeping costs documents."""
    for i in range(3):
        store.put(make_cache(i))
    assert store.verify() == []
    assert store.gc() == 0
    assert store.stats().entries == 3


def test_looking_changes_nothing(make: Maker) -> None:
    """Danger D8: a doctor counts hits, refreshes what would be evicted, or moves what it finds damaged."""
    store = make(budget=10**6)
    store.put(make_cache(1))
    store.put(make_cache(2))
    before = store.entries(), store.stats()
    for _ in range(3):
        assert same(store.get_many([make_key(1)], counted=False)[0], make_cache(1))
        assert store.get_many([make_key(5)], counted=False) == [None]
        store.contains([digest(1), digest(5)])
        store.entry(digest(1))
        store.verify()
    assert (store.entries(), store.stats()) == before


@pytest.mark.parametrize("namespace", ["", "\udcff", "a\nb", "x" * 200, "\0", "\x1b[31m"])
def test_bad_namespaces_are_a_users_error(store: Store, namespace: str) -> None:
    """Danger D2: `kvilt encode docs --namespace $'\\xff'` stores a document that stops every later command."""
    with pytest.raises(UserError, match="namespace"):
        store.put(make_cache(1, namespace=namespace))
    assert store.entries() == []


@pytest.mark.parametrize("ttl", [0, -1.0, float("nan"), float("inf")])
def test_bad_times_to_live_are_a_users_error(store: Store, ttl: float) -> None:
    """Danger: a document that is expired before it is stored, or whose header cannot be read."""
    with pytest.raises(UserError, match="ttl"):
        store.put(make_cache(1), ttl=ttl)


def test_limits_are_checked_when_writing(store: Store) -> None:
    """Danger D6: an id of 64 MB is stored, can never be read, and is set aside anew with every question."""
    with pytest.raises(UserError, match="title"):
        store.put(make_cache(1), title="x" * (1 << 20))
    with pytest.raises(UserError, match="header"):
        store.put(replace(make_cache(1), key=replace(make_key(1), compression="x" * (2 << 20))))
    assert store.entries() == []
    store.put(make_cache(1), title="é" * 2000)
    assert store.get(make_key(1)) is not None


def test_a_header_is_read_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: every request parses the header of every document again; or what was opened is kept for ever."""
    store.put(make_cache(1))
    one = store.get(make_key(1))
    assert store.get(make_key(1)) is one
    store.delete(digest(1))
    store.put(make_cache(1))
    again = store.get(make_key(1))
    assert again is not one
    assert same(again, make_cache(1))
    assert len(store._memo) <= REMEMBERED


def test_a_closed_store_opens_again(store: Store) -> None:
    """Danger: a server that closes its store at a reload cannot use it any more."""
    store.put(make_cache(1))
    store.close()
    store.close()
    store.put(make_cache(2))
    assert same(store.get(make_key(2)), make_cache(2))


def test_threads(make: Maker) -> None:
    """Danger: threads that put, get and delete in a store too small for all get wrong rows or exceed the budget."""
    store, wrong = make(budget=6 * unit()), []
    caches = [make_cache(i) for i in range(12)]

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(30):
                cache = chance.choice(caches)
                store.put(cache)
                one = store.get(chance.choice(caches).key)
                if one is not None and not same(one, caches[int(one.tokens[0]) // 1000]):
                    wrong.append("rows")
                if chance.random() < 0.1:
                    store.delete(cache.key.digest)
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert store.stats().bytes <= 6 * unit()
    assert {e.key for e in store.entries()} == {
        cache.key.digest for cache in caches if store.contains([cache.key.digest])
    }
    store.gc()
    assert store.stats().entries == len(store.entries())


def test_unknown_policies_and_sizes_are_refused(make: Maker) -> None:
    """Danger: a slip of the pen is a store with other rules."""
    with pytest.raises(SpecError, match="not a size"):
        make(budget="much")
    with pytest.raises(SpecError, match="Did you mean 'lru'"):
        make(policy="lrv")


def test_a_catalogue_is_optional() -> None:
    """Danger: a store in a bucket of a million documents reads all their headers before it serves the first."""
    blobs = MemoryBlobs()
    Store(blobs).put(make_cache(1), title="one")
    store = Store(blobs)
    store.last.describe = lambda key, blob: pytest.fail("a header was read in advance")
    assert stored(store, [1, 2]) == {1}
    assert store.stats().budget is None
    store = Store(blobs)
    assert same(store.get(make_key(1)), make_cache(1))
    assert store.put(make_cache(2))
    assert store.pin(digest(1))
    assert [(e.title, e.pinned) for e in store.entries()] == [("one", True), ("", False)]
    assert store.verify() == []
    store.gc()
    assert store.stats().entries == 2
    assert store.delete(digest(1))

"""What every store promises, on every store with every eviction policy."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from kvilt.stores.base import CacheStore
from store_kit import last_tier, make_cache, make_key, make_store, rows_of, same, unit

from kvilt.errors import SpecError

Maker = Callable[..., CacheStore]
pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_put_comes_back(store: CacheStore, dtype: torch.dtype) -> None:
    cache = replace(make_cache(1, dtype=dtype, rows=7, tokens=11), dropped=2, length=9)
    store.put(cache)
    for _ in range(2):
        found = store.get(cache.key)
        assert found is not None
        assert same(found, cache)
        assert found.layers.dtype == dtype
        assert found.nbytes == cache.nbytes


def test_rows_go_into_any_buffer(store: CacheStore) -> None:
    cache = make_cache(1, rows=6)
    store.put(cache)
    layers, wanted = store.get(cache.key).layers, cache.layers.fetch(1, "values")
    context = torch.zeros(2, 20, 4)
    part = context[:, 5:11]
    assert layers.fetch(1, "values", part) is part
    assert torch.equal(context[:, 5:11], wanted)
    assert context[:, :5].abs().sum() == context[:, 11:].abs().sum() == 0
    assert torch.equal(layers.fetch(1, "values", torch.zeros(2, 6, 4)), wanted)
    assert torch.equal(layers.fetch(1, "values", torch.zeros(2, 6, 4, dtype=torch.float64)), wanted.double())
    assert torch.equal(layers.fetch(1, "values", torch.zeros(6, 2, 4).transpose(0, 1)), wanted)
    assert torch.equal(layers.fetch(1, "values", torch.zeros(2, 4, 6).transpose(1, 2)), wanted)
    assert torch.equal(rows_of(cache)[1, 1], wanted)


def test_a_store_owns_its_rows(store: CacheStore) -> None:
    """Rows that are a view into a batch, or born in inference mode, are stored as values of their own."""
    with torch.inference_mode():
        cache = make_cache(1)
        batch = [torch.cat([k, k], 1) for k in cache.layers.keys]
        layers = replace(cache.layers, keys=tuple(b[:, :8] for b in batch))
        store.put(replace(cache, layers=layers))
        for b in batch:
            b.zero_()
    found = store.get(cache.key)
    assert same(found, cache)
    assert not found.layers.fetch(0, "keys").is_inference()


def test_hits_and_misses_are_counted(store: CacheStore) -> None:
    assert store.get(make_key(1)) is None
    store.put(make_cache(1))
    store.get(make_key(1))
    store.get(make_key(1))
    stats = store.stats()
    assert (stats.entries, stats.hits, stats.misses, stats.damaged) == (1, 2, 1, 0)
    assert stats.bytes >= make_cache(1).nbytes


def test_put_of_an_existing_key_changes_nothing(store: CacheStore) -> None:
    first, second = make_cache(1), replace(make_cache(2), key=make_key(1))
    store.put(first, title="first")
    store.put(second, title="second")
    assert same(store.get(first.key), first)
    assert [e.title for e in store.entries()] == ["first"]


def test_a_document_without_rows_is_refused(store: CacheStore) -> None:
    with pytest.raises(ValueError, match="no rows"):
        store.put(replace(make_cache(1), layers=None))
    assert store.get(make_key(1)) is None


def test_entries_describe_the_documents(store: CacheStore) -> None:
    before = time.time()
    store.put(make_cache(1, tokens=20), title="Größe \ud800 ✓", namespace="books", ttl=50)
    store.put(make_cache(2))
    entries = {e.key: e for e in store.entries()}
    assert set(entries) == {make_key(1).digest, make_key(2).digest}
    one = entries[make_key(1).digest]
    assert (one.tokens, one.namespace, one.pinned, one.fields) == (20, "books", False, asdict(make_key(1)))
    assert one.title.startswith("Größe")
    assert before <= one.created <= time.time()
    assert one.expires == pytest.approx(before + 50, abs=5)
    assert store.entry(one.key) == one
    assert store.entry("0" * 64) is None
    assert entries[make_key(2).digest].expires is None


def test_contains_and_delete(store: CacheStore) -> None:
    one, two = make_key(1).digest, make_key(2).digest
    store.put(make_cache(1))
    assert store.contains(iter([one, two])) == {one}
    assert store.delete(one)
    assert not store.delete(one)
    assert store.contains([one, two]) == set()
    assert store.get(make_key(1)) is None
    assert store.stats().bytes == 0


def test_time_to_live(store: CacheStore, clock: Callable[[float], None]) -> None:
    store.put(make_cache(1), ttl=100)
    store.put(make_cache(2), ttl=300)
    store.put(make_cache(3))
    clock(99)
    assert store.get(make_key(1)) is not None
    clock(2)
    keys = [make_key(i).digest for i in (1, 2, 3)]
    assert store.get(make_key(1)) is None
    assert store.entry(keys[0]) is None
    assert not store.pin(keys[0])
    assert store.contains(keys) == {e.key for e in store.entries()} == set(keys[1:])
    assert store.gc() > 0
    assert store.stats().entries == 2
    clock(1000)
    assert store.get(make_key(2)) is None
    store.put(make_cache(2))  # over an expired one, before any gc
    assert same(store.get(make_key(2)), make_cache(2))
    assert store.get(make_key(3)) is not None


def test_a_pin_outlasts_the_time_to_live(store: CacheStore, clock: Callable[[float], None]) -> None:
    key = make_key(1)
    store.put(make_cache(1), ttl=100)
    assert store.pin(key.digest)
    assert not store.pin("0" * 64)
    clock(200)
    store.gc()
    assert store.get(key) is not None
    assert store.entry(key.digest).pinned
    assert store.pin(key.digest, False)
    assert store.get(key) is None
    store.gc()
    assert store.stats().entries == 0


def test_set_aside_makes_room_for_a_new_one(store: CacheStore) -> None:
    key = make_key(1)
    store.put(make_cache(1))
    store.set_aside(key.digest, "a test says so")
    store.set_aside("0" * 64, "not there")
    assert store.get(key) is None
    assert store.contains([key.digest]) == set()
    store.put(make_cache(1))
    assert same(store.get(key), make_cache(1))
    assert store.stats().damaged >= 1


def test_verify_and_gc_of_a_sound_store_do_nothing(store: CacheStore) -> None:
    for i in range(3):
        store.put(make_cache(i))
    assert store.verify() == []
    assert store.gc() == 0
    assert store.stats().entries == 3


def test_claims_of_one_process_do_not_hinder_it(store: CacheStore) -> None:
    key = make_key(1).digest
    assert store.claim(key)
    assert store.claim(key)
    store.release(key)
    store.release(key)


def test_a_closed_store_opens_again(store: CacheStore) -> None:
    store.put(make_cache(1))
    store.close()
    store.close()
    store.put(make_cache(2))
    assert same(store.get(make_key(2)), make_cache(2))


def test_threads(make: Maker) -> None:
    """Four threads put, get, pin and delete in a store too small for all; whatever comes back is right."""
    store, wrong = make(budget=6 * unit(make)), []
    caches = [make_cache(i) for i in range(12)]

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(40):
                cache = chance.choice(caches)
                store.put(cache)
                found = store.get(chance.choice(caches).key)
                if found is not None and not same(found, caches[int(found.tokens[0]) // 1000]):
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
    assert last_tier(store).stats().bytes <= 6 * unit(make)
    assert last_tier(store).stats().entries == len(list(last_tier(store).entries()))


def test_unknown_policies_and_sizes_are_refused(make: Maker, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="not a size"):
        make(budget="much")
    with pytest.raises(SpecError, match="Did you mean 'lru'"):
        make_store("memory", tmp_path, "lrv")

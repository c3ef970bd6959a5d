"""Servers that fail: no wrong answer, no lost document, and no restart is needed when they are back."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import FAULTS, Proxy
from store_kit import bytes_of, damage, digest, make_cache, make_key, remote_store, same, soon, stored

from kvilt.errors import DamagedCache, StoreError, StoreUnavailable
from kvilt.rows.rows import whole
from kvilt.stores.memory import MemoryStore
from kvilt.stores.remote import parts
from kvilt.stores.store import Store
from kvilt.stores.tiered import TieredStore
from kvilt.types import DocumentCache

ROWS = 1500  # 190 kB: a head and a part
KINDS = ("moto", "redis")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def url(kind: str, request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(kind))


@pytest.fixture
def proxy(kind: str, url: str) -> Iterator[Proxy]:
    """Between the store and its server."""
    made = Proxy(int(url.split(":")[2].split("/")[0]), [f for f in FAULTS if kind == "moto" or f != "5xx"])
    yield made
    made.close()


@pytest.fixture
def far(kind: str, url: str, proxy: Proxy, tmp_path: Path) -> Iterator[Store]:
    """A store that reaches its server through the proxy."""
    made = remote_store(kind, url.replace(url.split(":")[2].split("/")[0], str(proxy.port)), tmp_path, timeout=1.0)
    yield made
    made.close()


@pytest.fixture
def near(kind: str, url: str, tmp_path: Path) -> Iterator[Store]:
    """The same store without a proxy."""
    made = remote_store(kind, url, tmp_path)
    yield made
    made.close()


def test_five_hundred_faults(far: Store, near: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: a byte that changed on the way is served or costs the stored document; one bad minute needs a restart."""
    monkeypatch.setattr(parts, "PAUSES", (0.01, 0.2))
    caches = [make_cache(seed, rows=ROWS) for seed in range(16)]
    for cache in caches:
        near.put(cache)
    proxy.every, wrong, right = 3, list[str](), list[int]()

    def work(seed: int) -> None:
        chance = random.Random(seed)
        while proxy.count < 500 and not wrong:
            try:
                ask(chance.sample(caches, 3))
                if chance.random() < 0.2:
                    far.put(make_cache(100 + chance.randrange(16), rows=ROWS))
            except StoreUnavailable:
                pass
            except Exception as error:
                wrong.append(repr(error))

    def ask(some: list[DocumentCache]) -> None:
        for cache, got in zip(some, far.get_many([cache.key for cache in some]), strict=True):
            try:
                if got is not None and not same(got, cache):
                    wrong.append(f"{cache.key.digest} differs")
                right.append(got is not None)
            except DamagedCache as error:  # as the engine does
                far.set_aside(error.key, error.reason)
            except StoreError:
                pass

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert proxy.count >= 500
    assert min(proxy.injected.values()) > 20, proxy.injected
    assert sum(right) > 100
    proxy.every = 0
    soon(lambda: all(far.get_many([cache.key for cache in caches])))
    assert all(same(far.get(cache.key), cache) for cache in caches)  # the same object, without a restart
    assert stored(near, range(16)) == set(range(16))
    assert near.verify() == []
    assert far.put(make_cache(200, rows=ROWS))


def test_a_server_that_goes_away_costs_latency_only(far: Store, near: Store, proxy: Proxy) -> None:
    """Danger: every request waits for a dead server, or an answer is not given because of it; or it is never asked again."""
    cache = make_cache(1, rows=ROWS)
    near.put(cache)
    assert far.get(cache.key) is not None
    proxy.away = True
    began = time.monotonic()
    assert far.get(cache.key) is None
    first = time.monotonic() - began
    assert first < 3
    for _ in range(20):
        assert far.get(cache.key) is None
    with pytest.raises(StoreUnavailable, match="does not answer"):
        far.put(make_cache(2))
    assert time.monotonic() - began - first < 10 * max(first, 0.5)
    proxy.away = False
    soon(lambda: same(far.get(cache.key), cache))
    assert far.put(make_cache(2))


def test_pauses_grow_and_end(far: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: a server that is coming back is hammered, or left alone for ever."""
    monkeypatch.setattr(parts, "PAUSES", (0.2, 0.5))
    link = far.last.blobs.link
    link._pause = 0.2
    proxy.away = True
    told = []
    for _ in range(3):
        link._until = 0.0
        with pytest.raises(StoreUnavailable, match="does not answer"):
            list(far.last.list())
        told.append(link._until - time.monotonic())
    assert told == pytest.approx([0.2, 0.4, 0.5], abs=0.1)
    proxy.away = False
    soon(lambda: far.get(make_key(1)) is None and link._pause == 0.2)


def test_damage_on_the_way_is_not_damage(far: Store, near: Store, proxy: Proxy) -> None:
    """Danger: one flipped bit in a cable deletes a sound document; or a damaged one stays because it might be sound."""
    near.put(make_cache(1, rows=ROWS))
    far.set_aside(digest(1), "a test says so")
    assert stored(near, [1]) == {1}
    damage(near, 1)
    with pytest.raises(DamagedCache):
        whole(far.get(make_key(1)).rows)
    far.set_aside(digest(1), "it is")
    assert stored(near, [1]) == set()
    assert far.put(make_cache(1, rows=ROWS))
    assert same(near.get(make_key(1)), make_cache(1, rows=ROWS))


def test_a_tier_that_is_away_is_passed_over(kind: str, far: Store, proxy: Proxy, tmp_path: Path) -> None:
    """Danger: a hot tier is one more thing that can stop every answer."""
    behind = MemoryStore()
    tiers = TieredStore(MemoryStore(), far, behind)
    tiers.put(make_cache(1))
    proxy.away = True
    began = time.monotonic()
    for _ in range(10):
        assert same(tiers.get(make_key(1)), make_cache(1))
    assert tiers.put(make_cache(2))
    behind.put(make_cache(3))
    assert same(tiers.get(make_key(3)), make_cache(3))
    assert stored(tiers, [1, 2, 3]) == {1, 2, 3}
    assert time.monotonic() - began < 8
    tiers.close()


def test_a_document_that_is_deleted_while_it_is_read_is_a_miss(far: Store, near: Store) -> None:
    """Danger: half a document of old bytes and half of new ones."""
    near.put(make_cache(1, rows=ROWS))
    (blob,) = far.last.get_many([digest(1)])
    near.delete(digest(1))
    with pytest.raises((OSError, EOFError)):
        bytes_of(blob)
    assert far.get(make_key(1)) is None

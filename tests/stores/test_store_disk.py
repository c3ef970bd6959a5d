"""Damage, a lost index, a full disk and a read-only folder: all real, on real files."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvilt.stores.disk import DiskStore, default_path
from kvilt.stores.memory import MemoryStore
from kvilt.stores.tiered import TieredStore
from store_kit import make_cache, make_key, same

from kvilt.errors import StoreUnavailable
from kvilt.stores import format as store_format


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    made = DiskStore(str(tmp_path / "store"))
    yield made
    made.close()


def file_of(store: DiskStore, seed: int) -> Path:
    key = make_key(seed).digest
    return store.path / key[:2] / f"{key}.safetensors"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_damaged_headers_are_set_aside(store: DiskStore, caplog: pytest.LogCaptureFixture) -> None:
    store.put(make_cache(1))
    flip(file_of(store, 1), 300)
    with caplog.at_level(logging.WARNING, "kvilt"):
        assert store.get(make_key(1)) is None
    assert "header does not match its digest" in caplog.text
    assert not file_of(store, 1).exists()
    (reason,) = (store.path / "aside").glob("*.reason")
    assert "header does not match" in reason.read_text()
    assert reason.with_suffix(".safetensors").exists()
    stats = store.stats()
    assert (stats.entries, stats.misses, stats.damaged, stats.bytes) == (0, 1, 1, 0)
    store.put(make_cache(1))
    assert same(store.get(make_key(1)), make_cache(1))


@pytest.mark.parametrize("where", ["header", "tokens", "offsets", "keys.0", "values.1", "short", "empty", "long"])
def test_verify_finds_every_damage(store: DiskStore, where: str) -> None:
    for seed in (1, 2):
        store.put(make_cache(seed))
    path = file_of(store, 1)
    if where in ("short", "empty", "long"):
        path.write_bytes({"short": path.read_bytes()[:-1], "empty": b"", "long": path.read_bytes() + b"\0"}[where])
    else:
        flip(path, 200 if where == "header" else store_format.read_header(path).spans[where].start + 5)
    ((key, reason),) = store.verify()
    assert key == make_key(1).digest
    assert reason
    assert store.verify() == []
    assert {e.key for e in store.entries()} == {make_key(2).digest}


def test_put_replaces_a_truncated_file(store: DiskStore) -> None:
    store.put(make_cache(1))
    os.truncate(file_of(store, 1), 4000)
    store.put(make_cache(1))
    assert same(store.get(make_key(1)), make_cache(1))
    assert store.stats().damaged == 1


def test_a_renamed_file_is_not_another_document(store: DiskStore) -> None:
    store.put(make_cache(1))
    file_of(store, 2).parent.mkdir(exist_ok=True)
    shutil.copy(file_of(store, 1), file_of(store, 2))
    assert store.get(make_key(2)) is None
    shutil.copy(file_of(store, 1), file_of(store, 2))
    assert [key for key, _ in store.verify()] == [make_key(2).digest]
    shutil.copy(file_of(store, 1), file_of(store, 2))
    store.gc()
    assert {e.key for e in store.entries()} == {make_key(1).digest}
    assert same(store.get(make_key(1)), make_cache(1))


def test_foreign_files_are_left_alone(store: DiskStore) -> None:
    store.put(make_cache(1))
    others = [store.path / "notes.txt", store.path / "model.safetensors", file_of(store, 1).with_name("x.safetensors")]
    for path in others:
        path.write_text("not ours")
    assert store.verify() == []
    store.gc()
    assert [p.read_text() for p in others] == ["not ours"] * 3


def test_damage_in_the_rows_falls_to_the_next_tier(tmp_path: Path) -> None:
    stores = [MemoryStore(), DiskStore(str(tmp_path / "a")), DiskStore(str(tmp_path / "b"))]
    tiered = TieredStore.of(*stores)
    tiered.put(make_cache(1))
    stores[0].delete(make_key(1).digest)
    flip(file_of(stores[1], 1), -3)
    assert same(tiered.get(make_key(1)), make_cache(1))
    assert [store.stats().damaged for store in stores] == [0, 1, 0]
    assert stores[1].verify() == []
    assert stores[1].contains([make_key(1).digest])  # repaired on the way up
    tiered.delete(make_key(1).digest)
    assert tiered.get(make_key(1)) is None
    tiered.close()


def test_promotion_keeps_time_to_live_and_pin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = MemoryStore(), DiskStore(str(tmp_path))
    slow.put(make_cache(1), title="one", namespace="books", ttl=100)
    slow.put(make_cache(2))
    slow.pin(make_key(2).digest)
    tiered = TieredStore.of(fast, slow)
    for seed in (1, 2):
        assert same(tiered.get(make_key(seed)), make_cache(seed))
    one, two = (fast.entry(make_key(seed).digest) for seed in (1, 2))
    assert (one.title, one.namespace, one.pinned, two.pinned, two.expires) == ("one", "books", False, True, None)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 101)
    assert tiered.get(make_key(1)) is None
    tiered.close()


@pytest.mark.parametrize("how", ["deleted", "emptied", "garbage", "torn", "older", "tables lost"])
def test_the_index_is_rebuilt(store: DiskStore, how: str) -> None:
    for seed in range(5):
        store.put(make_cache(seed), title=f"title {seed}", namespace="books", ttl=1000 if seed == 3 else None)
    store.pin(make_key(2).digest)
    before = {e.key: e for e in store.entries()}
    store.close()
    index = store.path / "index.sqlite"
    if how == "deleted":
        index.unlink()
    elif how == "emptied":
        os.truncate(index, 0)
    elif how == "garbage":
        index.write_bytes(os.urandom(9000))
    elif how == "torn":
        index.write_bytes(index.read_bytes()[:100] + os.urandom(index.stat().st_size - 100))
    else:
        with contextlib.closing(sqlite3.connect(index)) as db:
            db.executescript("PRAGMA user_version = 99" if how == "older" else "DROP TABLE entries; DROP TABLE totals")
    after = {e.key: e for e in store.entries()}
    assert after.keys() == before.keys()
    for key, entry in before.items():
        found = after[key]
        assert (found.title, found.namespace, found.bytes, found.tokens, found.fields, found.pinned, found.expires) == (
            *(entry.title, entry.namespace, entry.bytes, entry.tokens, entry.fields, entry.pinned, entry.expires),
        )
    assert store.stats().bytes == sum(e.bytes for e in after.values())


def test_the_index_may_vanish_while_open(store: DiskStore) -> None:
    store.put(make_cache(1))
    for path in store.path.glob("index.sqlite*"):
        path.unlink()
    store.put(make_cache(2))
    assert store.stats().entries == 2
    other = DiskStore(str(store.path))
    assert other.stats().entries == 2
    (store.path / "index.sqlite").write_bytes(os.urandom(20000))
    for path in store.path.glob("index.sqlite-*"):
        path.unlink()
    assert len(list(other.entries())) == len(list(store.entries())) == 2
    other.close()


def test_files_and_index_are_reconciled(store: DiskStore, tmp_path: Path) -> None:
    other = DiskStore(str(tmp_path / "other"))
    other.put(make_cache(7), title="adopted")
    store.put(make_cache(1))
    store.put(make_cache(2))
    file_of(store, 7).parent.mkdir(exist_ok=True)
    shutil.copy(file_of(other, 7), file_of(store, 7))
    assert same(store.get(make_key(7)), make_cache(7))  # served before it is known
    assert store.entry(make_key(7).digest).title == "adopted"
    file_of(store, 1).unlink()
    assert store.get(make_key(1)) is None
    assert {e.key for e in store.entries()} == {make_key(2).digest}
    store.gc()
    assert {e.key for e in store.entries()} == {make_key(2).digest, make_key(7).digest}
    assert store.stats().bytes == sum(file_of(store, seed).stat().st_size for seed in (2, 7))
    other.close()


def test_a_restart_keeps_uses_pins_and_times(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(make_cache(1), ttl=100)
    store.put(make_cache(2), ttl=100)
    store.pin(make_key(2).digest)
    for _ in range(3):
        store.get(make_key(1))
    store.close()
    again = DiskStore(str(store.path))
    assert again.entry(make_key(1).digest).hits == 3
    assert again.stats().hits == 3
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 101)
    assert again.get(make_key(1)) is None
    assert again.get(make_key(2)) is not None
    again.close()


def test_a_smaller_budget_and_another_policy_hold_after_gc(store: DiskStore) -> None:
    for seed in range(6):
        store.put(make_cache(seed))
    for seed in (0, 0, 1, 2, 3, 4, 5):
        store.get(make_key(seed))
    size = store.stats().bytes // 6
    store.close()
    smaller = DiskStore(str(store.path), budget=2 * size, policy="lfu")
    assert smaller.gc() == 4 * size
    assert smaller.contains(make_key(seed).digest for seed in range(6)) == {make_key(s).digest for s in (0, 5)}
    smaller.close()


def test_old_damaged_files_are_swept(store: DiskStore) -> None:
    store.put(make_cache(1))
    store.set_aside(make_key(1).digest, "a test says so")
    store.gc()
    kept = list((store.path / "aside").iterdir())
    assert len(kept) == 2
    for path in kept:
        os.utime(path, (time.time() - 90000,) * 2)
    assert store.gc() > 4000
    assert list((store.path / "aside").iterdir()) == []


def test_the_default_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "kvilt" / "store"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_path() == Path.home() / ".cache" / "kvilt" / "store"
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="cannot make"):
        DiskStore(str(tmp_path / "file" / "store"))

"""Odd files, links, locks and vanishing folders: what others may do to a store's folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from store_kit import digest, file_of, make_cache, make_key, same, stored, unit

from kvilt.errors import StoreUnavailable
from kvilt.rows.header import seal
from kvilt.stores.database import Database
from kvilt.stores.disk import DiskStore

pytestmark = pytest.mark.usefixtures("no_sync")


# ------------------------------------------------------------------------------------------------------- odd headers


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A header that says something else, under a digest that is right."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 8)
    new = len(text).to_bytes(8, "little") + text
    at = new.index(b'"header":"') + 10
    new = new[:at] + b"0" * 64 + new[at + 64 :]
    path.write_bytes(new[:at] + seal(new) + new[at + 64 :] + raw[8 + length :])


def meta(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["__metadata__"].update({name: value})


def fields(**values: object) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        known = json.loads(header["__metadata__"]["fields"])
        header["__metadata__"]["fields"] = json.dumps({**known, **values})

    return change


ODD = {
    "no tokens": lambda header: header.pop("tokens"),
    "no rows": lambda header: header.pop("rows"),
    "huge shape": lambda header: header["tokens"].update(shape=[10**30]),
    "huge empty shape": lambda header: header["tokens"].update(shape=[10**30, 0], data_offsets=[0, 0]),
    "float shape": lambda header: header["tokens"].update(shape=[1e30]),
    "negative shape": lambda header: header["tokens"].update(shape=[-8]),
    "offsets beyond the file": lambda header: header["tokens"].update(data_offsets=[0, 1 << 62]),
    "unknown dtype": lambda header: header["rows"].update(dtype="X9"),
    "a list as a tensor": lambda header: header.update(tokens=[1]),
    "list as title": meta("title", ["a"]),
    "half characters as title": meta("title", "\ud800"),
    "number as title": meta("title", 5),
    "null created": meta("created", None),
    "endless created": meta("created", "1e999"),
    "nan created": meta("created", "nan"),
    "endless expiry": meta("expires", "inf"),
    "list as length": meta("length", []),
    "unknown codec": meta("codec", "zzz"),
    "namespace of half characters": fields(namespace="\udcff"),
    "empty namespace": fields(namespace=""),
    "list as namespace": fields(namespace=["a"]),
    "list as fields": meta("fields", "[1]"),
    "fields that are no JSON": meta("fields", "{"),
    "fields nested deeply": meta("fields", "[" * 100_000),
    "another key": meta("key", "0" * 64),
    "no version": lambda header: header["__metadata__"].pop("version"),
}


@pytest.mark.parametrize("name", ODD)
def test_one_odd_header_never_stops_a_store(disk: DiskStore, name: str) -> None:
    """Danger D2: a file whose digest is right and whose header is odd ends every command in a traceback, for good."""
    for seed in (1, 2):
        disk.put(make_cache(seed))
    rewrite(file_of(disk.path, 1), ODD[name])
    disk.close()
    (disk.path / "catalogue.sqlite").unlink()
    fresh = DiskStore(str(disk.path))
    for store in (fresh, disk):
        assert digest(2) in {e.key for e in store.entries()}
        store.entry(digest(1))
        cache = store.get(make_key(1))
        assert cache is None or same(cache, make_cache(1))
        store.verify()
        store.gc()
        store.put(make_cache(1))
        assert same(store.get(make_key(1)), make_cache(1))
        assert stored(store, [1, 2]) == {1, 2}
        assert store.stats().entries == 2
        json.dumps([e.key + e.title + e.namespace for e in store.entries()]).encode()
    fresh.close()


# -------------------------------------------------------------------------------------------------------------- links


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder beside the store in which nothing may change."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "precious").write_text("precious")
    before = folder.stat().st_mtime_ns
    yield folder
    assert sorted(p.name for p in folder.iterdir()) == ["precious"]
    assert (folder / "precious").read_text() == "precious"
    assert folder.stat().st_mtime_ns == before


def use(store: DiskStore) -> None:
    """Everything that a store can be asked to do."""
    with contextlib.suppress(StoreUnavailable):
        store.put(make_cache(1))
    store.get(make_key(1))
    for work in (
        lambda: store.pin(digest(1)),
        lambda: store.pin(digest(1), False),
        lambda: store.set_aside(digest(1), "a test says so"),
        lambda: store.put(make_cache(1)),
        store.entries,
        store.stats,
        store.verify,
        store.gc,
        lambda: store.entry(digest(1)),
        lambda: store.delete(digest(1)),
        store.close,
    ):
        with contextlib.suppress(StoreUnavailable):
            work()


@pytest.mark.parametrize(
    "name",
    ["catalogue.sqlite", "catalogue.sqlite-journal", "catalogue.sqlite-writing", "SHARD", "FILE", "PIN", "aside"],
)
@pytest.mark.parametrize("target", ["precious", "absent", "."])
def test_links_inside_a_store_are_not_followed(tmp_path: Path, outside: Path, name: str, target: str) -> None:
    """Danger D4: `index.lock`, `aside` or a pin is a link, and a store truncates, creates or deletes outside."""
    store, key = DiskStore(str(tmp_path / "store")), digest(1)
    special = {"SHARD": key[:2], "FILE": f"{key[:2]}/{key}.safetensors", "PIN": f"{key[:2]}/{key}.pin"}
    path = store.path / special.get(name, name)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(outside / target)
    store.put(make_cache(2))
    use(store)
    assert same(store.get(make_key(2)), make_cache(2))
    assert digest(2) in {e.key for e in store.entries()}
    store.close()


@pytest.mark.parametrize("name", ["catalogue.sqlite", "SHARD", "FILE", "PIN", "aside", "TEMPORARY"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "socket"])
def test_special_files_do_not_hang(tmp_path: Path, name: str, kind: str) -> None:
    """Danger D4: a FIFO as a document or lock, and a store hangs for ever."""
    store, key = DiskStore(str(tmp_path / "s")), digest(1)
    special = {
        "SHARD": key[:2],
        "FILE": f"{key[:2]}/{key}.safetensors",
        "PIN": f"{key[:2]}/{key}.pin",
        "TEMPORARY": f"{key[:2]}/.{key[:16]}.0.tmp",
    }
    path = store.path / special.get(name, name)
    path.parent.mkdir(exist_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        import socket

        with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(path.parent):
            made.bind(path.name)
    store.put(make_cache(2))
    began = time.monotonic()
    use(store)
    assert time.monotonic() - began < 5
    assert same(store.get(make_key(2)), make_cache(2))
    store.close()


# -------------------------------------------------------------------------------------------------------------- locks

HOLD = """
import fcntl, os, sqlite3, sys, time
from pathlib import Path
root = Path(sys.argv[1])
db = sqlite3.connect(root / "catalogue.sqlite", isolation_level=None)
if sys.argv[2] != "flock":
    db.execute(sys.argv[2])
held = [open(path) for path in root.rglob("*") if path.is_file()] + [os.open(root, os.O_RDONLY)]
for file in held:
    fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["flock", "BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_nobodys_lock_stops_the_others(disk: DiskStore, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Danger D5: a stopped process holds a lock or a transaction: hits take a minute, or everything hangs."""
    monkeypatch.setattr(Database, "patience", 0.3)
    for seed in (1, 2):
        disk.put(make_cache(seed))
    disk.pin(digest(2))
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(disk.path), how], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        os.kill(holder.pid, signal.SIGSTOP)
        fresh = DiskStore(str(disk.path))
        for store in (disk, fresh):
            began = time.monotonic()
            for _ in range(20):
                assert same(store.get(make_key(1)), make_cache(1))
            assert time.monotonic() - began < 0.3
            assert stored(store, [1, 2, 3]) == {1, 2}
            assert {e.key for e in store.entries()} == {digest(1), digest(2)}
            assert store.entry(digest(2)).pinned
            assert time.monotonic() - began < 2
            store.last._grant = 0.0  # as if there were little room left: the catalogue must be asked
            if how != "flock":
                for seed in (3, 4, 5):
                    with pytest.raises(StoreUnavailable, match=r"another process holds .*catalogue.sqlite"):
                        store.put(make_cache(seed))
            assert time.monotonic() - began < 9
            store.close()
        assert time.monotonic() - began < 12
    finally:
        holder.kill()
        holder.communicate()
    assert disk.put(make_cache(6))


# --------------------------------------------------------------------------------------------------- vanishing folders


def test_a_store_whose_folder_is_deleted(disk: DiskStore) -> None:
    """Danger D7: a store that was deleted while it was open serves what is gone, or cannot be used any more."""
    disk.put(make_cache(1))
    disk.pin(digest(1))
    disk.get(make_key(1))
    shutil.rmtree(disk.path)
    assert disk.get(make_key(1)) is None
    assert stored(disk, [1]) == set()
    disk.close()
    assert not disk.path.exists()  # nothing that only looks makes it again
    assert disk.put(make_cache(1))
    assert same(disk.get(make_key(1)), make_cache(1))
    assert disk.stats().entries == len(disk.entries()) == 1


def test_the_budget_holds_for_four_writers_whose_folder_is_deleted(tmp_path: Path) -> None:
    """Danger D7: each of four writers goes on with a catalogue of its own: 344 kB in a store of 200."""
    root, budget = tmp_path / "store", 200_000
    worker = Path(__file__).with_name("store_worker.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, worker, "deleted", str(root), str(budget)], env=environment, check=True, timeout=120
    )
    held = sum(path.stat().st_size for path in root.rglob("*.safetensors"))
    assert 0 < held <= budget
    store = DiskStore(str(root), budget=budget)
    assert store.stats().bytes == held
    assert list(root.rglob("*.tmp")) == []
    store.close()


def test_a_passing_trouble_with_the_catalogue_passes(disk: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger D3: one moment without free descriptors, and a process keeps a catalogue of its own for good."""
    disk.put(make_cache(1))
    disk.close()
    real = sqlite3.connect

    def fail(*_: object, **__: object) -> None:
        error = sqlite3.OperationalError("unable to open database file")
        error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(sqlite3, "connect", lambda name, **k: fail() if name != ":memory:" else real(name, **k))
        assert disk.stats().entries == 1
        disk.last._grant = 0.0
        assert disk.put(make_cache(2))
    disk.last._retry = 0.0
    assert disk.stats().entries == 1  # the file does not know what was entered in memory, until the next gc
    assert stored(disk, [1, 2]) == {1, 2}
    disk.gc()
    assert disk.stats().entries == 2


# ------------------------------------------------------------------------------------------------------ entered later


def test_documents_that_were_stored_are_entered_before_anybody_asks(disk: DiskStore) -> None:
    """Danger D7: what waits to be entered is not listed, not counted, or lost when the store is closed."""
    for seed in range(1, 6):
        assert disk.put(make_cache(seed))
    assert len(disk.last._pending) == 4  # the first one asked how much room there is
    assert {e.key for e in disk.entries()} == {digest(seed) for seed in range(1, 6)}
    assert not disk.last._pending
    assert disk.put(make_cache(6))
    assert disk.pin(digest(6))
    assert disk.put(make_cache(7))
    disk.close()
    fresh = DiskStore(str(disk.path))
    assert fresh.stats().entries == 7
    assert fresh.entry(digest(6)).pinned


def test_nothing_is_entered_later_where_there_is_little_room(tmp_path: Path) -> None:
    """Danger D7: writers that enter later hold more than the budget together."""
    size = DiskStore(str(tmp_path / "one")).put(make_cache(1)) and sum(
        f.stat().st_size for f in (tmp_path / "one").rglob("*.safetensors")
    )
    store = DiskStore(str(tmp_path / "small"), budget=4 * size)
    for seed in range(1, 10):
        store.put(make_cache(seed))
        assert not store.last._pending
        assert sum(f.stat().st_size for f in (tmp_path / "small").rglob("*.safetensors")) <= 4 * size


def held_by(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*.safetensors"))


def test_what_is_entered_late_makes_room_late(tmp_path: Path) -> None:
    """Danger D7: a writer that was given room long ago stores beyond the budget what others have filled meanwhile."""
    budget = 100 * unit()
    idle, busy = (DiskStore(str(tmp_path), budget=budget) for _ in range(2))
    for seed in range(4):
        idle.put(make_cache(seed))
    assert idle.last._pending
    for seed in range(100, 220):
        busy.put(make_cache(seed))
    for seed in range(4, 7):
        idle.put(make_cache(seed))
    idle.close()
    busy.close()
    assert held_by(tmp_path) <= budget
    store = DiskStore(str(tmp_path), budget=budget)
    assert store.stats().bytes == held_by(tmp_path)
    store.close()


def test_what_a_killed_writer_had_not_entered_counts(tmp_path: Path) -> None:
    """Danger D7: every writer that is killed leaves documents that no budget counts."""
    budget = 40 * unit()
    for turn in range(12):
        store = DiskStore(str(tmp_path), budget=budget)
        for seed in range(4 * turn, 4 * turn + 4):
            store.put(make_cache(seed))
        store.last._pending.clear()  # kill -9
        store._uses.clear()
    assert held_by(tmp_path) <= budget + 2 * unit()
    store = DiskStore(str(tmp_path), budget=budget)
    store.put(make_cache(1000))
    assert held_by(tmp_path) <= budget
    assert store.stats().bytes == held_by(tmp_path)
    assert store.entry(digest(1000)) is not None
    store.close()


def test_what_is_pending_is_entered_soon(disk: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger D7: a server that stores a document and then waits keeps it from the others' accounts."""
    monkeypatch.setattr("kvilt.stores.store.FLUSH_SECONDS", 0.01)
    disk.put(make_cache(1))
    disk.put(make_cache(2))
    for _ in range(200):
        if not disk.last._pending:
            break
        time.sleep(0.02)
    assert not disk.last._pending
    with contextlib.closing(sqlite3.connect(disk.path / "catalogue.sqlite", timeout=5)) as db:
        assert db.execute("SELECT COUNT(*) FROM entries").fetchone() == (2,)

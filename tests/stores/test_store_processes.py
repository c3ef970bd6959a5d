"""Several processes on one store, and processes that die or fork: real ones."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from store_kit import KINDS, digest, file_of, make_cache, make_key, same, unit

from kvilt.stores.disk import DiskStore

WORKER = Path(__file__).with_name("store_worker.py")
SOURCE = Path(__file__).parents[2] / "src"


def start(*arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{WORKER.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output


def test_four_processes_write_the_same_documents(tmp_path: Path) -> None:
    """Danger: two writers of one key leave two blobs, half of one, or a catalogue that counts it twice."""
    assert finish(start("fill", tmp_path, 1, 2, 3, 4)) == "15\n"
    store = DiskStore(str(tmp_path))
    assert store.verify() == []
    assert store.stats().entries == 15
    assert store.stats().bytes == 15 * unit(rows=200)
    assert store.stats().hits == 60
    assert all(same(store.get(make_key(i)), make_cache(i, rows=200)) for i in range(15))
    assert store.gc() == 0
    store.close()


def test_kill_at_any_time(tmp_path: Path) -> None:
    """Danger: kill -9 leaves half a document that is served, a leak, or a store over its budget."""
    finish(start("killed", tmp_path, 10))
    store = DiskStore(str(tmp_path), budget="6MB")
    leftovers = list(tmp_path.rglob("*.tmp"))
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors")) <= 6_000_000
    assert store.verify() == []
    assert not (tmp_path / "aside").exists()
    assert (store.gc() > 0) >= any(path.stat().st_size for path in leftovers if path.exists())
    assert [p for p in tmp_path.rglob("*.tmp") if p.stat().st_size] == []
    files = {p.stem: p.stat().st_size for p in tmp_path.rglob("*.safetensors")}
    assert files
    assert {e.key: e.bytes for e in store.entries()} == files
    assert store.stats().bytes == sum(files.values()) <= 6_000_000
    for seed in range(40):
        cache = store.get(make_key(seed))
        assert cache is None or same(cache, make_cache(seed, rows=2000))
    store.put(make_cache(50, rows=2000))
    store.close()


def test_only_what_dead_writers_left_goes(tmp_path: Path) -> None:
    """Danger: housekeeping deletes what another process is writing just now."""
    store = DiskStore(str(tmp_path))
    store.put(make_cache(1))
    shard = file_of(tmp_path, 1).parent
    dead, living, new = shard / ".a.1.tmp", shard / ".a.2.tmp", shard / ".a.3.tmp"
    dead.write_bytes(b"12345")
    new.touch()
    import fcntl

    with living.open("wb") as file:
        file.write(b"1234")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert store.gc() == 5
        assert living.exists()
        assert new.exists()
        os.utime(new, (time.time() - 100,) * 2)
    assert store.gc() == 4
    assert sorted(p.name for p in shard.iterdir()) == [f"{digest(1)}.safetensors"]
    store.close()


@pytest.mark.parametrize("kind", KINDS)
def test_forked_children_go_on(tmp_path: Path, kind: str) -> None:
    """Danger H1: a child forked while other threads use the store hangs for ever, or damages its parent's catalogue."""
    assert finish(start("forked", kind, tmp_path)) == f"{[0] * 10}\n"
    if kind != "memory":
        store = DiskStore(str(tmp_path))
        assert store.verify() == []
        assert {e.key for e in store.entries()} >= {digest(seed) for seed in (*range(3), *range(100, 110))}
        store.close()

"""Several processes on one disk store, and processes that die: real ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kvilt.stores.disk import DiskStore
from kvilt.stores.process import Owner
from store_kit import make_cache, make_key, same

from kvilt.stores import index as store_index

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


def test_two_processes_write_the_same_documents(tmp_path: Path) -> None:
    processes = [start("fill", tmp_path, 0, 20, shuffle) for shuffle in (1, 2)]
    made = [int(finish(process)) for process in processes]
    store = DiskStore(str(tmp_path))
    assert sum(made) == 20  # nothing was encoded twice
    assert store.verify() == []
    assert store.stats().entries == 20
    assert all(same(store.get(make_key(i)), make_cache(i, rows=200)) for i in range(20))
    assert store.gc() == 0
    store.close()


def test_kill_at_any_time(tmp_path: Path) -> None:
    finish(start("killed", tmp_path, 10))
    store = DiskStore(str(tmp_path), budget="6MB")
    leftovers = list(tmp_path.rglob("*.tmp"))
    assert store.verify() == []
    assert not (tmp_path / "aside").exists()
    assert (store.gc() > 0) >= bool(leftovers)
    assert list(tmp_path.rglob("*.tmp")) == []
    files = {p.stem: p.stat().st_size for p in tmp_path.rglob("*.safetensors")}
    assert files
    assert {e.key: e.bytes for e in store.entries()} == files
    assert store.stats().bytes == sum(files.values()) <= 6_000_000
    for seed in range(40):
        found = store.get(make_key(seed))
        assert found is None or same(found, make_cache(seed, rows=2000))
        store.put(make_cache(seed, rows=2000))
    store.close()


def test_claims_of_the_living_count_and_of_the_dead_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = start("claim", tmp_path, 1, 2)
    assert other.stdout.readline() == "True\n"
    store, one, two = DiskStore(str(tmp_path)), make_key(1).digest, make_key(2).digest
    assert not store.claim(one)
    store.release(one)  # not ours: nothing happens
    assert not store.claim(one)
    assert store.claim(make_key(3).digest)
    with monkeypatch.context() as patch:
        patch.setattr(store_index, "CLAIM_SECONDS", 0.0)
        assert store.claim(one)  # held too long to believe in
    assert not store.claim(two)
    other.kill()
    other.communicate()
    assert store.claim(two)
    store.close()


def test_owners() -> None:
    me = Owner.current()
    assert me.alive()
    assert Owner.tag_alive(me.tag)
    assert not Owner(me.host, me.pid, "1").alive()  # a number used again
    assert not Owner.tag_alive(f"{me.tag.split('-')[0]}-{me.pid}-1")
    assert Owner("elsewhere", 1, "1").alive()
    assert Owner.tag_alive("not one of ours")
    assert re.fullmatch(r"[0-9a-f]{12}-\d+-\d+", me.tag)


def test_only_stale_temporary_files_go(tmp_path: Path) -> None:
    store = DiskStore(str(tmp_path))
    store.put(make_cache(1))
    shard, me = store._folder.file(make_key(1).digest).parent, Owner.current()
    living, elsewhere = shard / f".a.{me.tag}.0.tmp", shard / ".a.0123456789ab-1-1.0.tmp"
    dead, old = shard / f".a.{me.tag[:-1]}x.0.tmp", shard / ".a.0123456789ab-2-2.0.tmp"
    for path in (living, elsewhere, dead, old):
        path.write_bytes(b"12345")
    os.utime(old, (time.time() - 7200,) * 2)
    assert store.gc() == 10
    assert living.exists()
    assert elsewhere.exists()
    store.close()


def test_a_forked_child_opens_its_own_index(tmp_path: Path) -> None:
    assert finish(start("forked", tmp_path)) == "2\n"
    store = DiskStore(str(tmp_path))
    assert store.stats().hits >= 1  # written at the end, without being closed
    store.close()

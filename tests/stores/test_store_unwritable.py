"""A full disk, a limit on file size and a read-only folder: real ones."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvilt.stores.disk import DiskStore
from store_kit import make_cache, make_key, same

from kvilt.errors import StoreUnavailable


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    made = DiskStore(str(tmp_path / "store"))
    yield made
    made.close()


def temporaries(path: Path) -> list[Path]:
    return list(path.rglob("*.tmp"))


def put_many(store: DiskStore, seeds: range) -> None:
    for seed in seeds:
        store.put(make_cache(seed, rows=500))


@contextlib.contextmanager
def mounted(path: Path, options: str) -> Iterator[bool]:
    """A small file system of its own, where this user may mount one."""
    path.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    try:
        done = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        done = False
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", "-l", str(path)], check=True)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Files may not grow beyond this (the signal for it is ignored by Python, so that writing fails with EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_limit_on_file_size(store: DiskStore) -> None:
    store.put(make_cache(1))
    with file_size_limit(200_000), pytest.raises(StoreUnavailable, match=r"cannot write .*too large.*ulimit"):
        store.put(make_cache(2, rows=9000))
    assert temporaries(store.path) == []
    assert store.get(make_key(2)) is None
    assert same(store.get(make_key(1)), make_cache(1))
    store.put(make_cache(2))
    assert store.verify() == []


def test_a_full_disk(tmp_path: Path) -> None:
    """On a file system of 1 MB; where none can be mounted, a limit on file size stands in for it."""
    with mounted(tmp_path / "small", "size=1m") as real, contextlib.ExitStack() as stack:
        store = DiskStore(str(tmp_path / "small" / "store"))
        store.put(make_cache(0, rows=500))
        if not real:
            stack.enter_context(file_size_limit(60_000))
        with pytest.raises(StoreUnavailable, match=r"cannot write to the store at .*small/store"):
            put_many(store, range(1, 30))
        assert temporaries(store.path) == []
        found = [seed for seed in range(30) if store.contains([make_key(seed).digest])]
        assert found
        assert all(same(store.get(make_key(seed)), make_cache(seed, rows=500)) for seed in found)
        assert store.verify() == []
        store.close()
        fresh = DiskStore(str(store.path))  # its index may not even find room to open
        assert same(fresh.get(make_key(0)), make_cache(0, rows=500))
        assert len(list(fresh.entries())) >= len(found) - 1
        assert fresh.delete(make_key(0).digest)
        fresh.close()


def check_read_only(path: Path) -> None:
    store = DiskStore(str(path))
    assert same(store.get(make_key(1)), make_cache(1))
    assert store.get(make_key(5)) is None
    assert store.contains([make_key(1).digest, make_key(5).digest]) == {make_key(1).digest}
    assert {e.title for e in store.entries()} == {"title 1", "title 2"}
    assert store.stats().entries == 2
    assert store.stats().hits == 1
    assert store.claim(make_key(5).digest)
    store.release(make_key(5).digest)
    with pytest.raises(StoreUnavailable, match="cannot write to the store"):
        store.put(make_cache(5))
    with pytest.raises(StoreUnavailable, match="cannot delete"):
        store.delete(make_key(1).digest)
    with pytest.raises(StoreUnavailable, match="cannot pin"):
        store.pin(make_key(1).digest)
    store.put(make_cache(1))  # is there
    store.set_aside(make_key(2).digest, "a test says so")
    assert store.get(make_key(2)) is None
    assert same(store.get(make_key(1)), make_cache(1))
    store.close()


def fill_two(path: Path) -> None:
    store = DiskStore(str(path))
    for seed in (1, 2):
        store.put(make_cache(seed), title=f"title {seed}")
    store.close()


@contextlib.contextmanager
def forbidden(path: Path) -> Iterator[None]:
    """Nobody may write here; root, whom permissions do not stop, becomes nobody meanwhile."""
    root = os.geteuid() == 0
    folders = [path, *(p for p in path.rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for folder in folders:
            folder.chmod(0o755)


def test_a_folder_without_write_permission() -> None:
    with tempfile.TemporaryDirectory() as name:  # not tmp_path: others may not enter that
        Path(name).chmod(0o755)
        fill_two(Path(name) / "store")
        with forbidden(Path(name) / "store"):
            check_read_only(Path(name) / "store")
        with forbidden(Path(name)), pytest.raises(StoreUnavailable, match="cannot make the store"):
            DiskStore(f"{name}/new")


def test_a_read_only_file_system(tmp_path: Path) -> None:
    """A mounted one; where that is not allowed, permissions stand in for it."""
    with mounted(tmp_path / "disk", "size=4m") as real:
        store = tmp_path / "disk" / "store"
        fill_two(store)
        if real:
            subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
            check_read_only(store)
        else:
            test_a_folder_without_write_permission()

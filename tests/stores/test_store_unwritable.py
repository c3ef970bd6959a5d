"""A full disk, a limit on file size and a read-only folder."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_kit import digest, make_cache, make_key, same, stored

from kvilt.errors import StoreUnavailable
from kvilt.stores.disk import DiskStore


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Files may not grow beyond this (the signal for it is ignored by Python, so that writing fails with EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_limit_on_file_size(disk: DiskStore) -> None:
    """Danger: a write that fails leaves half a file, or stops what can still be served."""
    disk.put(make_cache(1))
    with file_size_limit(200_000), pytest.raises(StoreUnavailable, match=r"cannot write .*too large.*ulimit"):
        disk.put(make_cache(2, rows=9000))
    assert list(disk.path.rglob("*.tmp")) == []
    assert disk.get(make_key(2)) is None
    assert (disk.stats().entries, len(disk.entries())) == (1, 1)
    assert same(disk.get(make_key(1)), make_cache(1))
    disk.put(make_cache(2))
    assert disk.verify() == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk(disk: DiskStore, monkeypatch: pytest.MonkeyPatch, code: int, after: int) -> None:
    """Danger: a full disk loses documents, leaves temporary files, or counts what was never stored."""
    disk.put(make_cache(1))
    real, calls = os.write, [0]

    def full(fd: int, data: bytes) -> int:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(code, os.strerror(code))
        return real(fd, data)

    with monkeypatch.context() as broken:
        broken.setattr(os, "write", full)
        with pytest.raises(StoreUnavailable, match=r"cannot write to the store at .*disk"):
            disk.put(make_cache(2))
        assert same(disk.get(make_key(1)), make_cache(1))
    assert list(disk.path.rglob("*.tmp")) == []
    assert stored(disk, [1, 2]) == {1}
    assert disk.stats().entries == 1
    assert disk.put(make_cache(2))
    assert disk.verify() == []


def test_a_file_system_without_hard_links(disk: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: nothing can be stored on exFAT or a network share."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    assert disk.put(make_cache(1))
    assert not disk.put(make_cache(1))
    assert same(disk.get(make_key(1)), make_cache(1))
    assert list(disk.path.rglob("*.tmp")) == []


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


@pytest.mark.parametrize("catalogue", [True, False])
def test_a_read_only_folder(catalogue: bool) -> None:
    """Danger: a corpus on a read-only disk cannot be served, or what is damaged in it is tried again and again."""
    with tempfile.TemporaryDirectory() as name:  # not tmp_path: others may not enter that
        Path(name).chmod(0o755)
        path = Path(name) / "store"
        store = DiskStore(str(path))
        for seed in (1, 2):
            store.put(make_cache(seed), title=f"title {seed}", ttl=1000)
        store.pin(digest(2))
        store.close()
        if not catalogue:
            (path / "catalogue.sqlite").unlink()
        with forbidden(path):
            _check_read_only(path)
        with forbidden(Path(name)), pytest.raises(StoreUnavailable, match="cannot make the store"):
            DiskStore(f"{name}/new")


def _check_read_only(path: Path) -> None:
    store = DiskStore(str(path))
    assert same(store.get(make_key(1)), make_cache(1))
    assert store.get(make_key(5)) is None
    assert stored(store, [1, 2, 5]) == {1, 2}
    assert [(e.title, e.pinned) for e in store.entries()] == [("title 1", False), ("title 2", True)]
    assert store.stats().entries == 2
    for work in (
        lambda: store.put(make_cache(5)),
        lambda: store.delete(digest(1)),
        lambda: store.pin(digest(1)),
        lambda: store.pin(digest(2), False),
    ):
        with pytest.raises(StoreUnavailable):
            work()
    assert not store.put(make_cache(1))  # is there
    store.set_aside(digest(2), "a test says so")
    assert store.get(make_key(2)) is None
    assert stored(store, [1, 2]) == {1}
    assert same(store.get(make_key(1)), make_cache(1))
    store.close()

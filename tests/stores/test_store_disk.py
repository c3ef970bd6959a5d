"""Damage, other versions, a lost catalogue and hand-made changes: all real, on real files."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from store_kit import bytes_of, digest, file_of, flip, make_cache, make_key, same, stored, unit

from kvilt.errors import OtherVersion, StoreUnavailable
from kvilt.rows.rows import whole
from kvilt.stores import folder as files
from kvilt.stores.disk import DiskStore, default_path
from kvilt.stores.memory import MemoryStore
from kvilt.stores.tiered import TieredStore

pytestmark = pytest.mark.usefixtures("no_sync")


def test_damaged_headers_are_set_aside(disk: DiskStore, caplog: pytest.LogCaptureFixture) -> None:
    """Danger: a damaged file is served, or deleted without a trace."""
    disk.put(make_cache(1))
    flip(file_of(disk.path, 1), 300)
    with caplog.at_level(logging.WARNING, "kvilt"):
        assert disk.get(make_key(1)) is None
    assert "header does not match its digest" in caplog.text
    assert not file_of(disk.path, 1).exists()
    (reason,) = (disk.path / "aside").glob("*.reason")
    assert "header does not match" in reason.read_text()
    assert reason.with_suffix(".safetensors").exists()
    stats = disk.stats()
    assert (stats.entries, stats.misses, stats.damaged, stats.bytes) == (0, 1, 1, 0)
    disk.put(make_cache(1))
    assert same(disk.get(make_key(1)), make_cache(1))


@pytest.mark.parametrize("where", ["header", "tokens", "rows", "short", "empty", "long"])
def test_verify_tells_every_damage(disk: DiskStore, where: str) -> None:
    """Danger: damage stays unknown until an answer needs the document."""
    for seed in (1, 2):
        disk.put(make_cache(seed))
    path = file_of(disk.path, 1)
    if where in ("short", "empty", "long"):
        path.write_bytes({"short": path.read_bytes()[:-1], "empty": b"", "long": path.read_bytes() + b"\0"}[where])
    else:
        size = path.stat().st_size
        flip(path, {"header": 200, "tokens": size - 1024 - 64 - 2 * 4 * 32 - 128, "rows": size - 5}[where])
    ((key, reason),) = disk.verify()
    assert key == digest(1)
    assert reason
    assert disk.verify() == []
    assert stored(disk, [1, 2]) == {2}


def test_a_damaged_file_is_repaired_by_put(disk: DiskStore) -> None:
    """Danger: a truncated file keeps its place for ever."""
    disk.put(make_cache(1))
    os.truncate(file_of(disk.path, 1), 4000)
    disk.put(make_cache(1))
    assert same(disk.get(make_key(1)), make_cache(1))
    assert disk.stats().damaged == 1


def test_a_rewritten_file_is_opened_anew(disk: DiskStore) -> None:
    """Danger: what was opened before is served after the file changed, also where its size and times are as before."""
    disk.put(make_cache(1))
    path = file_of(disk.path, 1)
    assert same(disk.get(make_key(1)), make_cache(1))
    before = path.stat()
    flip(path, 300)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert disk.get(make_key(1)) is None


def test_a_renamed_file_is_not_another_document(disk: DiskStore) -> None:
    """Danger: rows of one document are served for another."""
    disk.put(make_cache(1))
    for work in (lambda: disk.get(make_key(2)), disk.verify, disk.gc):
        file_of(disk.path, 2).parent.mkdir(exist_ok=True)
        shutil.copy(file_of(disk.path, 1), file_of(disk.path, 2))
        work()
        assert not file_of(disk.path, 2).exists()
    assert {e.key for e in disk.entries()} == {digest(1)}
    assert same(disk.get(make_key(1)), make_cache(1))


def test_foreign_files_are_left_alone(disk: DiskStore) -> None:
    """Danger: a user's own files in the folder are deleted or moved."""
    disk.put(make_cache(1))
    near = file_of(disk.path, 1).with_name
    others = [disk.path / "notes.txt", disk.path / "model.safetensors", near("x.safetensors"), near(".x.tmp.txt")]
    for path in others:
        path.write_text("not ours")
    assert disk.verify() == []
    disk.gc()
    assert [p.read_text() for p in others] == ["not ours"] * len(others)
    assert len(disk.entries()) == 1


def other_version(path: Path) -> None:
    """A file of a version that this Kvilt does not read."""
    data = path.read_bytes()
    assert b'"version":"2"' in data
    path.write_bytes(data.replace(b'"version":"2"', b'"version":"9"'))


def test_another_version_is_a_miss_and_left_alone(disk: DiskStore) -> None:
    """Danger D3: an older Kvilt moves the files of a newer one to `aside/`, and deletes them a day later."""
    for seed in (1, 2):
        disk.put(make_cache(seed))
    other_version(file_of(disk.path, 1))
    (disk.path / "catalogue.sqlite").unlink()
    data = file_of(disk.path, 1).read_bytes()
    for _ in range(2):
        assert disk.get(make_key(1)) is None
        assert disk.verify() == []
        disk.gc()
        assert not disk.put(make_cache(1))
    assert [e.key for e in DiskStore(str(disk.path)).entries()] == [digest(2)]
    assert file_of(disk.path, 1).read_bytes() == data
    assert disk.stats().damaged == 0
    assert disk.delete(digest(1))


@pytest.mark.parametrize("when", ["open", "read", "rows"])
def test_a_passing_error_is_a_miss(disk: DiskStore, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Danger D3: one EIO or ESTALE of a network disk, and a sound document is set aside."""
    disk.put(make_cache(1))
    cache = disk.get(make_key(1)) if when == "rows" else None

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as broken:
        broken.setattr(os, "fstat" if when == "open" else "preadv", fail)
        if when == "rows":
            with pytest.raises(OSError, match=r"[Ss]tale"):
                whole(cache.rows)
        else:
            assert disk.get(make_key(1)) is None
        assert not (disk.path / "aside").exists()
    assert same(disk.get(make_key(1)), make_cache(1))
    assert disk.stats().damaged == 0


def test_promotion_keeps_time_to_live_and_pin(tmp_path: Path, clock: Callable[[float], None]) -> None:
    """Danger: a copy in memory outlives its document, or a pinned one is lost with it."""
    fast, slow = MemoryStore(), DiskStore(str(tmp_path))
    slow.put(make_cache(1), title="one", ttl=100)
    slow.put(make_cache(2), ttl=100)
    slow.pin(digest(2))
    tiered = TieredStore(fast, slow)
    for seed in (1, 2):
        assert same(tiered.get(make_key(seed)), make_cache(seed))
    assert fast.entry(digest(1)).title == "one"
    clock(101)
    assert tiered.get(make_key(1)) is None
    assert same(tiered.get(make_key(2)), make_cache(2))
    tiered.close()


def test_memory_is_freed_with_its_tier(tmp_path: Path) -> None:
    """Danger: what the memory tier evicted stays in memory because the store remembers it."""
    tiered = TieredStore(MemoryStore(2 * unit()), DiskStore(str(tmp_path)))
    for seed in range(6):
        tiered.put(make_cache(seed))
        tiered.get(make_key(seed))
    assert len(tiered._memo) <= 2
    assert all(same(tiered.get(make_key(seed)), make_cache(seed)) for seed in range(6))
    tiered.close()


def test_uses_in_memory_reach_the_disk(tmp_path: Path) -> None:
    """Danger: what is popular in memory is evicted from the disk as unused."""
    tiered = TieredStore(memory="1GB", path=str(tmp_path), budget=3 * unit())
    for seed in range(3):
        tiered.put(make_cache(seed))
    tiered.get(make_key(0))
    tiered.put(make_cache(3))
    assert stored(tiered, range(4)) == {0, 2, 3}
    tiered.close()


def lose(catalogue: Path, how: str) -> None:
    if how == "deleted":
        catalogue.unlink()
    elif how == "emptied":
        os.truncate(catalogue, 0)
    elif how == "garbage":
        catalogue.write_bytes(os.urandom(9000))
    elif how == "torn":
        catalogue.write_bytes(catalogue.read_bytes()[:100] + os.urandom(catalogue.stat().st_size - 100))
    else:
        script = {
            "tables lost": "DROP TABLE entries; DROP TABLE totals",
            "foreign": "PRAGMA user_version = 0",
            "rows broken": "UPDATE entries SET fields = 'x'",
            "newer": "PRAGMA user_version = 99",
        }[how]
        with contextlib.closing(sqlite3.connect(catalogue)) as db:
            db.executescript(script)


LOSSES = ["deleted", "emptied", "garbage", "torn", "tables lost", "foreign", "rows broken", "newer"]


@pytest.mark.parametrize("how", LOSSES)
@pytest.mark.parametrize("while_open", [False, True])
def test_the_catalogue_is_rebuilt(disk: DiskStore, how: str, while_open: bool) -> None:
    """Danger: a lost or damaged catalogue costs documents, pins or times to live."""
    for seed in range(5):
        disk.put(make_cache(seed, namespace="books"), title=f"title {seed}", ttl=1000 if seed == 3 else None)
    disk.pin(digest(2, "books"))
    before = disk.entries()
    if not while_open:
        disk.close()
    lose(disk.path / "catalogue.sqlite", how)
    after = disk.entries()
    assert after == before
    assert disk.stats().bytes == sum(e.bytes for e in after)
    disk.put(make_cache(7))
    assert disk.stats().entries == 6
    if how == "newer":
        with contextlib.closing(sqlite3.connect(disk.path / "catalogue.sqlite")) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (99,)  # a newer Kvilt's is left alone


def test_files_and_catalogue_are_reconciled(disk: DiskStore, tmp_path: Path) -> None:
    """Danger: files that people copy or delete are not served, or served although they are gone."""
    other = DiskStore(str(tmp_path / "other"))
    other.put(make_cache(7), title="adopted")
    disk.put(make_cache(1))
    disk.put(make_cache(2))
    file_of(disk.path, 7).parent.mkdir(exist_ok=True)
    shutil.copy(file_of(other.path, 7), file_of(disk.path, 7))
    assert same(disk.get(make_key(7)), make_cache(7))
    assert disk.entry(digest(7)).title == "adopted"
    file_of(disk.path, 1).unlink()
    assert disk.get(make_key(1)) is None
    assert {e.key for e in disk.entries()} == {digest(2), digest(7)}
    disk.gc()
    assert {e.key for e in disk.entries()} == {digest(2), digest(7)}
    assert disk.stats().bytes == sum(file_of(disk.path, seed).stat().st_size for seed in (2, 7))
    other.close()


def test_a_restart_keeps_uses(disk: DiskStore) -> None:
    """Danger: every restart forgets what is popular."""
    disk.put(make_cache(1))
    for _ in range(3):
        disk.get(make_key(1))
    disk.close()
    again = DiskStore(str(disk.path))
    assert again.entry(digest(1)).hits == 3
    assert again.stats().hits == 3
    again.close()


def test_uses_are_written_soon(disk: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: a server that only reads never writes what is popular, and another process evicts it."""
    monkeypatch.setattr("kvilt.stores.store.FLUSH_SECONDS", 0.01)
    disk.put(make_cache(1))
    disk.get(make_key(1))
    for _ in range(200):
        with contextlib.closing(sqlite3.connect(disk.path / "catalogue.sqlite", timeout=5)) as db:
            if db.execute("SELECT hits FROM entries").fetchone() == (1,):
                return
        time.sleep(0.02)
    pytest.fail("the use was never written")


def test_set_aside_files_are_kept_for_a_day(disk: DiskStore) -> None:
    """Danger: the only copy that could be looked at is deleted at once, or never."""
    disk.put(make_cache(1))
    os.utime(file_of(disk.path, 1), (0, 0))  # an old document
    disk.set_aside(digest(1), "a test says so")
    disk.gc()
    kept = list((disk.path / "aside").iterdir())
    assert len(kept) == 2
    for path in kept:
        os.utime(path, (time.time() - 90000,) * 2)
    assert disk.gc() > 4000
    assert list((disk.path / "aside").iterdir()) == []


def test_an_open_document_survives_its_file(disk: DiskStore) -> None:
    """Danger: an eviction breaks the answer that is just being computed."""
    disk.put(make_cache(1))
    cache = disk.get(make_key(1))
    disk.delete(digest(1))
    assert same(cache, make_cache(1))


def test_at_the_open_file_limit(
    disk: DiskStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Danger: a thousand documents in use, and 116 warnings with wrong advice; or files read that others replaced."""
    for seed in range(30):
        disk.put(make_cache(seed))
    files.too_many_open.cache_clear()
    limit = (len(files._held) + 10) * 4 // 3
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, 0))
    with caplog.at_level(logging.WARNING, "kvilt"):
        caches = [disk.get(make_key(seed)) for seed in range(30)]
    assert all(same(cache, make_cache(seed)) for seed, cache in enumerate(caches))
    assert caplog.text.count("ulimit -n") == len(caplog.records) == 1
    last = disk.blobs.get_many([digest(29)])[0]
    assert last._fd is None
    flip(file_of(disk.path, 29), 5000)
    with pytest.raises(OSError, match="replaced"):
        bytes_of(last)
    held = len(files._held)
    del caches
    disk.close()
    assert len(files._held) < held


OUTLIVES = """
import ctypes, pathlib, sys, types
early = sys.modules["early"] = types.ModuleType("early")  # modules are emptied from the last to the first
from kvilt.stores import folder
early.blob = folder.FileBlob(pathlib.Path(sys.argv[1]), sys.argv[2])
for kept in early, folder:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))  # as a C extension does that never lets go
"""


def test_documents_that_outlive_the_modules_end_in_silence(tmp_path: Path) -> None:
    """Danger: a hundred tracebacks behind the answer, because Python's end takes a module's names before the last objects."""
    (tmp_path / "document").write_bytes(b"rows")
    ended = subprocess.run([sys.executable, "-c", OUTLIVES, tmp_path, "document"], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_no_file_can_be_opened_any_more(disk: DiskStore, caplog: pytest.LogCaptureFixture) -> None:
    """Danger: one warning per document, and advice that does not help."""
    for seed in range(3):
        disk.put(make_cache(seed))
    files.too_many_open.cache_clear()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(fd) for fd in os.listdir("/proc/self/fd")) + 1, hard))
    spare = [os.open("/dev/null", os.O_RDONLY) for _ in ()]
    try:
        with contextlib.suppress(OSError):
            while True:
                spare.append(os.open("/dev/null", os.O_RDONLY))
        caches = [disk.get(make_key(seed)) for seed in range(3)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in spare:
            os.close(fd)
    assert caches == [None] * 3
    assert caplog.text.count("ulimit -n") == 1
    assert same(disk.get(make_key(1)), make_cache(1))


def test_the_default_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: documents are stored where nobody looks for them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "kvilt" / "store"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_path() == Path.home() / ".cache" / "kvilt" / "store"
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="cannot make"):
        DiskStore(str(tmp_path / "file" / "store"))


def test_nothing_here_imports_torch() -> None:
    """Danger: `kvilt cache ls` takes seconds because something imports torch."""
    code = "import sys, kvilt.stores.tiered, kvilt.registry; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_version_is_not_damage() -> None:
    """Danger: who catches damage catches other versions, too."""
    from kvilt.errors import DamagedCache

    assert not issubclass(OtherVersion, DamagedCache)

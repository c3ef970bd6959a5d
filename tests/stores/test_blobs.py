"""The small contract that every blob store meets: memory, disk, tiers of them, and a catalogue over them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from store_kit import bytes_of, remote_store

from kvilt.errors import StoreError
from kvilt.stores.blobs import BlobStore, MemoryBlobs
from kvilt.stores.catalogue import Catalogue
from kvilt.stores.entry import Entry
from kvilt.stores.folder import DiskBlobs
from kvilt.stores.tiered import TieredBlobs

KEYS = [f"{i:02x}" * 32 for i in range(8)]
KINDS = ("memory", "disk", "tiered", "three tiers", "catalogue", *servers.REMOTE)
pytestmark = pytest.mark.usefixtures("no_sync")


def make_blobs(kind: str, path: Path) -> BlobStore:
    memory, disk = MemoryBlobs(), DiskBlobs(path / "one")
    tiers = {"memory": [memory], "disk": [disk], "tiered": [memory, disk]}.get(kind)
    if kind == "catalogue":
        return Catalogue(disk, None, path / "one" / "c.sqlite", describe=lambda k, b: Entry(k, b.size, 1))
    tiers = tiers or [memory, disk, DiskBlobs(path / "two")]
    return TieredBlobs(tiers) if len(tiers) > 1 else tiers[0]


def blobs_on(kind: str, urls: dict[str, str], path: Path) -> BlobStore:
    return remote_store(kind, urls[kind], path).last.blobs


@pytest.fixture(params=KINDS)
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlobStore]:
    urls = servers.needed(request.param, request)
    if urls is None:
        made = make_blobs(request.param, tmp_path)
    elif request.param == "remote tiers":
        made = TieredBlobs([MemoryBlobs(), *(blobs_on(kind, urls, tmp_path) for kind in ("redis", "moto"))])
    else:
        made = blobs_on(request.param, urls, tmp_path)
    yield made
    made.close()


def put(blobs: BlobStore, key: str, *parts: bytes) -> bool:
    return blobs.put(key, [memoryview(part) for part in parts])


def test_bytes_come_back(blobs: BlobStore) -> None:
    """Danger: parts are lost, joined in another order, or served under another key."""
    assert put(blobs, KEYS[1], b"", b"abc", b"", b"defgh")
    assert put(blobs, KEYS[2], b"xyz")
    assert put(blobs, KEYS[3])
    for _ in range(2):
        none, one, two, empty = blobs.get_many([KEYS[0], KEYS[1], KEYS[2], KEYS[3]])
        assert none is None
        assert [bytes_of(blob) for blob in (one, two, empty)] == [b"abcdefgh", b"xyz", b""]
        assert one.size == 8
    assert sorted(blobs.list()) == [(KEYS[1], 8), (KEYS[2], 3), (KEYS[3], 0)]
    assert blobs.contains(iter(KEYS)) == set(KEYS[1:4])


def test_reads_fill_any_pieces(blobs: BlobStore) -> None:
    """Danger: a read over more buffers than one system call takes, or past the end, leaves some of them unfilled."""
    data = os.urandom(5000)
    put(blobs, KEYS[0], data[:100], data[100:])
    (blob,) = blobs.get_many([KEYS[0]])
    into = bytearray(4900)
    view = memoryview(into)
    blob.read(50, [view[i : i + 2] for i in range(0, 4900, 2)])
    assert into == data[50:4950]
    blob.read(5000, [])
    with pytest.raises(EOFError):
        blob.read(4999, [view[:2]])
    blob.close()


def test_the_first_writer_wins(blobs: BlobStore) -> None:
    """Danger: a second `put` changes what others read just now."""
    assert put(blobs, KEYS[0], b"first")
    (before,) = blobs.get_many([KEYS[0]])
    assert not put(blobs, KEYS[0], b"second")
    (after,) = blobs.get_many([KEYS[0]])
    assert bytes_of(after) == b"first"
    assert after.identity == before.identity
    assert blobs.delete(KEYS[0])
    assert not blobs.delete(KEYS[0])
    assert bytes_of(before) == b"first"  # whoever opened it reads it to the end
    assert put(blobs, KEYS[0], b"third")
    (new,) = blobs.get_many([KEYS[0]])
    assert new.identity != before.identity
    assert bytes_of(new) == b"third"


def test_sixteen_threads_write_one_key(blobs: BlobStore) -> None:
    """Danger: two writers both believe that they were first, or leave half a blob or a temporary file."""
    made: list[bool] = []
    data = os.urandom(100_000)
    threads = [threading.Thread(target=lambda: made.append(put(blobs, KEYS[0], data))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * 15 + [True]
    assert list(blobs.list()) == [(KEYS[0], 100_000)]
    assert bytes_of(blobs.get_many([KEYS[0]])[0]) == data
    assert blobs.sweep() == 0


ODD_KEYS = [
    "",
    "a" * 63,
    "A" * 64,
    "g" * 64,
    "/etc/passwd",
    "../" + "a" * 61,
    "a" * 64 + "\n",
    "a" * 65,
    "aa/" + "a" * 61,
]


@pytest.mark.parametrize("key", [*ODD_KEYS, None, b"a" * 64])
def test_only_keys_are_keys(blobs: BlobStore, key: str) -> None:
    """Danger D1: a key that is a path deletes, creates or renames files outside the store."""
    for work in (
        lambda: blobs.get_many([key]),
        lambda: blobs.get_many([KEYS[0], key]),
        lambda: blobs.put(key, [memoryview(b"x")]),
        lambda: blobs.delete(key),
        lambda: blobs.contains([key]),
        lambda: blobs.set_aside(key, "because"),
    ):
        with pytest.raises(StoreError, match="64 hex digits"):
            work()
    assert list(blobs.list()) == []


def test_set_aside_is_out_of_service(blobs: BlobStore) -> None:
    """Danger: a damaged blob is served by one of several tiers, or keeps its place taken."""
    put(blobs, KEYS[0], b"damaged")
    assert blobs.set_aside(KEYS[0], "a test says so")
    assert not blobs.set_aside(KEYS[0], "again")
    assert blobs.get_many([KEYS[0]]) == [None]
    assert put(blobs, KEYS[0], b"sound")
    assert bytes_of(blobs.get_many([KEYS[0]])[0]) == b"sound"


def test_a_tier_that_lost_a_blob_gets_it_back(tmp_path: Path) -> None:
    """Danger: what the fast tier evicted is read from the slow one for ever."""
    fast, middle, slow = MemoryBlobs(), DiskBlobs(tmp_path / "a"), DiskBlobs(tmp_path / "b")
    tiers = TieredBlobs([fast, middle, slow])
    put(slow, KEYS[0], b"abc")
    assert bytes_of(tiers.get_many([KEYS[0]])[0]) == b"abc"
    assert list(fast.list()) == list(middle.list()) == [(KEYS[0], 3)]


def test_what_the_last_tier_lost_is_gone(tmp_path: Path) -> None:
    """Danger D7: memory goes on answering for a document that the disk evicted, so that it is never stored again."""
    fast, slow = MemoryBlobs(), DiskBlobs(tmp_path)
    tiers = TieredBlobs([fast, slow])
    put(tiers, KEYS[0], b"abc")
    slow.delete(KEYS[0])
    assert tiers.get_many([KEYS[0]]) == [None]
    assert tiers.contains([KEYS[0]]) == set()
    assert put(tiers, KEYS[0], b"abc")
    assert slow.contains([KEYS[0]])

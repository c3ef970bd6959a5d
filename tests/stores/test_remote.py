"""Object stores, Redis and tiers of them: what servers can do, reading ahead, and what is said when something is wrong."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import servers
from store_kit import bytes_of, digest, make_cache, make_key, remote_store, same, soon, stored

from kvilt import Document, Engine
from kvilt.errors import MissingExtra, SpecError, StoreUnavailable
from kvilt.registry import build
from kvilt.rows.file import check_file
from kvilt.rows.rows import whole
from kvilt.stores.blobs import Blobs, MemoryBlob, MemoryBlobs
from kvilt.stores.disk import DiskStore
from kvilt.stores.remote import object as objects
from kvilt.stores.remote.object import ENDPOINTS, ObjectBlobs, ObjectStore
from kvilt.stores.remote.parts import AHEAD, HEAD, Part, RemoteBlobs
from kvilt.stores.remote.redis import RedisStore
from kvilt.stores.store import Store
from kvilt.stores.tiered import TieredBlobs, TieredStore

ROWS = 4000  # 512 kB: a head and, of 64 kB each, six parts


@pytest.fixture
def opened() -> Iterator[Callable[[Store], Store]]:
    """Closes stores when the test ends."""
    made: list[Store] = []

    def note(store: Store) -> Store:
        made.append(store)
        return store

    yield note
    for store in made:
        store.close()


@pytest.mark.parametrize(("kind", "ranges", "creates"), [("moto", True, True), ("rclone", False, False)])
def test_what_a_server_can_do_is_tried_once(
    kind: str,
    ranges: bool,
    creates: bool,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Danger: a server that ignores conditions or ranges gets damaged or loses documents; or every start asks again."""
    url = request.getfixturevalue(kind)
    ENDPOINTS.clear()
    store = remote_store(kind, url, tmp_path)
    assert store.put(make_cache(1, rows=ROWS))
    assert same(store.get(make_key(1)), make_cache(1, rows=ROWS))
    (can,) = ENDPOINTS.values()
    assert (can.ranges, can.creates) == (ranges, creates)
    assert [meta["path"][3:67] for page in store.last.blobs.client.list() for meta in page] == [digest(1)]
    monkeypatch.setattr(ObjectBlobs, "_probe", lambda *_: pytest.fail("asked again"))
    assert remote_store(kind, url, tmp_path / "other").put(make_cache(1))
    assert len(ENDPOINTS) == 1


def test_documents_are_fetched_together_ahead_of_the_pass(
    tmp_path: Path, moto: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: one request after another, so that a prompt of 14 documents waits 14 times; or a prompt fills the memory."""
    monkeypatch.setattr(objects, "PART", 64 << 10)
    store = remote_store("moto", moto, tmp_path)
    caches = [make_cache(seed, rows=ROWS) for seed in range(8)]
    for cache in caches:
        store.put(cache)
    asked: list[Part] = []
    fetch = ObjectBlobs.fetch
    monkeypatch.setattr(ObjectBlobs, "fetch", lambda self, part: (asked.append(part), fetch(self, part))[1])
    got = store.get_many([cache.key for cache in caches])
    assert asked == []  # a header is all that is needed until rows are read
    whole(got[0].rows, slice(0, 1))
    time.sleep(0.5)
    assert {part.start for part in asked[:8]} == {HEAD}  # the lowest layers of all documents
    assert len({part.blob for part in asked[:8]}) == 8
    assert len(asked) <= AHEAD + 6
    assert all(same(one, cache) for one, cache in zip(got, caches, strict=True))
    assert all(part.blob.key == digest(0) for part in asked if asked.count(part) > 1)  # the first was read twice
    assert all(blob.group._parts == {} for blob in store.last.blobs.live.values())


def test_requests_run_side_by_side(tmp_path: Path, moto: str) -> None:
    """Danger: opening a prompt's documents takes a round trip for each."""
    proxy = servers.Proxy(int(moto.rsplit(":", 1)[1]), ["delay"])
    store = remote_store("moto", f"http://127.0.0.1:{proxy.port}", tmp_path)
    for seed in range(12):
        store.put(make_cache(seed))
    proxy.every = 1  # 50 ms for each request
    began = time.monotonic()
    assert all(store.get_many([make_key(seed) for seed in range(12)]))
    assert stored(store, [3]) == {3}
    assert time.monotonic() - began < 0.6
    assert proxy.count >= 12
    proxy.close()


def test_what_was_seen_lately_is_not_asked_for(tmp_path: Path, moto: str) -> None:
    """Danger: every answer from memory waits for a bucket; or a document that is gone is believed in for ever."""
    store, other = (remote_store("moto", moto, tmp_path, fresh=fresh) for fresh in (0.3, 0.0))
    store.put(make_cache(1))
    tiers = TieredBlobs([MemoryBlobs(), store.last.blobs])
    assert tiers.get_many([digest(1)])[0] is not None
    store.last.blobs.api = None  # nothing may ask
    assert tiers.get_many([digest(1)])[0] is not None
    store.last.blobs.api = other.last.blobs.api
    other.delete(digest(1))
    time.sleep(0.35)
    assert tiers.get_many([digest(1)]) == [None]
    store.put(make_cache(1))
    store.delete(digest(1))
    assert tiers.get_many([digest(1)]) == [None]


def test_presigned_reads_need_no_credentials(tmp_path: Path, moto: str) -> None:
    """Danger: a worker that only reads documents must hold the keys of the whole bucket."""
    store = remote_store("moto", moto, tmp_path)
    store.put(make_cache(1))
    (url,) = store.sign([digest(1)], seconds=60)
    assert servers.SECRET not in url
    with urllib.request.urlopen(url) as answer:
        check_file(MemoryBlob(answer.read()), digest(1))
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=2-5"})) as answer:
        assert answer.read() == bytes_of(store.last.get_many([digest(1)])[0])[2:6]
    with pytest.raises(StoreUnavailable, match="cannot do that"):
        remote_store("object", "", tmp_path).sign([digest(1)])


def test_a_folder_and_a_bucket_hold_the_same_files(tmp_path: Path) -> None:
    """Danger: a collection that was encoded on a disk must be encoded again for a bucket."""
    with_client, disk = ObjectStore(f"file://{tmp_path}"), DiskStore(str(tmp_path))
    with_client.put(make_cache(1))
    disk.put(make_cache(2))
    assert same(disk.get(make_key(1)), make_cache(1))
    assert same(with_client.get(make_key(2)), make_cache(2))
    assert {e.key for e in with_client.entries()} == {digest(1), digest(2)}
    with_client.close()
    disk.close()


def test_a_folder_is_served_by_any_web_server(tmp_path: Path) -> None:
    """Danger: reading what somebody publishes needs an account with a cloud."""
    disk, handler = DiskStore(str(tmp_path)), partial(Quiet, directory=str(tmp_path))
    disk.put(make_cache(1, rows=ROWS))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store = ObjectStore(f"http://127.0.0.1:{server.server_port}")
        assert same(store.get(make_key(1)), make_cache(1, rows=ROWS))
        assert store.contains([digest(1), digest(2)]) == {digest(1)}
        assert store.get(make_key(2)) is None
        with pytest.raises(StoreUnavailable, match="cannot write http"):
            store.put(make_cache(2))
        server.shutdown()
    disk.close()


class Quiet(SimpleHTTPRequestHandler):
    """A plain web server: it knows no ranges."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_a_catalogue_remembers_a_bucket(tmp_path: Path, moto: str) -> None:
    """Danger: every listing of a large bucket reads all its headers again; or the local file limits the bucket."""
    path = str(tmp_path / "there" / "catalogue.sqlite")
    store = remote_store("moto", moto, tmp_path, catalogue=path)
    for seed in range(5):
        store.put(make_cache(seed), title=str(seed))
    store.close()
    again = remote_store("moto", moto, tmp_path, catalogue=path)
    again.last.describe = lambda key, blob: pytest.fail("a header was read")
    assert [entry.title for entry in again.entries()] == list("01234")
    assert again.stats().budget is None
    again.close()
    other = remote_store("moto", moto, tmp_path)
    other.put(make_cache(9), title="9")
    other.delete(digest(0))
    third = remote_store("moto", moto, tmp_path, catalogue=path)
    third.gc()
    assert (third.stats().entries, [entry.title for entry in third.entries()]) == (5, list("12349"))
    third.close()


def test_tiers_are_written_as_one_specification(tmp_path: Path, moto: str, redis: str) -> None:
    """Danger: memory before Redis before a bucket answers otherwise than memory alone, or encodes what it has."""
    questions = ["Where was Ada Lorn born?"] * 2
    documents = [Document("Ada Lorn was born in Tavik."), Document("Tavik lies in the north of Orland.")]
    spec = f"tiered:memory:budget=200MB|redis:url={redis},prefix=spec|object:url=s3://kvilt/spec,endpoint={moto}"
    told = []
    for store in ("memory", spec, spec, f"object:url=s3://kvilt/spec,endpoint={moto}"):
        engine = Engine.load("builtin", store=store)
        answers = [engine.answer(question, documents, max_new_tokens=6) for question in questions]
        told.append(([a.text for a in answers], [a.usage.hits for a in answers]))
        if store == spec:
            assert len({len(list(each.last.list())) for each in engine.store.stores}) == 1
        engine.store.close()
    texts, hits = zip(*told, strict=True)
    assert len({json.dumps(text) for text in texts}) == 1
    assert list(hits) == [[0, 2], [0, 2], [2, 2], [2, 2]]


def test_novel_questions_find_what_was_stored(tmp_path: Path, moto: str) -> None:
    """Danger: each new mix of known documents is encoded and stored anew, so that hits fall and the bucket grows."""
    bucket = f"object:url=s3://kvilt/novel,endpoint={moto}"
    documents, chance = (
        [Document(f"Ada {number} was born in Tavik {number}.") for number in range(40)],
        random.Random(0),
    )
    first = Engine.load("builtin", store=bucket)
    first.encode(documents)
    before = first.store.stats()
    engine = Engine.load("builtin", store=f"tiered:memory:budget={before.bytes // 10}|{bucket}")
    memory, behind = engine.store.stores
    for _ in range(20):
        usage = engine.answer("Where?", chance.sample(documents, 14), max_new_tokens=1).usage
        assert (usage.hits, usage.misses) == (14, 0)
        assert memory.stats().bytes <= before.bytes // 10
    assert len(list(behind.last.list())) == before.entries
    for store in (first.store, engine.store):
        store.close()


def test_one_thread_fills_the_tiers() -> None:
    """Danger: sixteen requests for one document fetch it sixteen times."""
    read = []

    class Slow(MemoryBlobs):
        def get_many(self, keys: list[str]) -> Blobs:
            return [blob and Counted(blob.memory) for blob in super().get_many(keys)]

    class Counted(MemoryBlob):
        def read(self, offset: int, into: list[memoryview]) -> None:
            read.append(offset)
            time.sleep(0.05)
            super().read(offset, into)

    slow = Slow()
    slow.put(digest(1), [memoryview(b"x" * 100)])
    tiers, got = TieredBlobs([MemoryBlobs(), slow]), list[bytes]()
    threads = [threading.Thread(target=lambda: got.append(bytes_of(tiers.get_many([digest(1)])[0]))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [b"x" * 100] * 16
    assert len(read) == 1


def test_redis_keeps_parts_for_a_while(redis: str, opened: Callable[[Store], Store]) -> None:
    """Danger: a value too large for the server, a cache that grows for ever, or leftovers of a writer that was killed."""
    from redis import Redis

    client = Redis.from_url(redis)
    store = opened(RedisStore(redis, ttl=50, prefix="parts"))
    store.put(make_cache(1, rows=200_000))  # 25.6 MB
    (name,) = client.scan_iter("parts:*")
    assert 49_000 < client.pttl(name) <= 50_000
    assert max(len(value) for value in client.hvals(name)) <= 8 << 20
    assert client.hlen(name) == 3 + 4
    assert same(store.get(make_key(1)), make_cache(1, rows=200_000))
    blobs = store.last.blobs
    client_of, blobs._client = blobs._client, Dies(blobs._client)
    with pytest.raises(KeyboardInterrupt):
        store.put(make_cache(2))
    blobs._client = client_of
    assert store.get(make_key(2)) is None
    assert [e.key for e in store.entries()] == [digest(1)]
    assert all(0 < client.ttl(each) <= 600 for each in client.scan_iter("parts:*"))
    assert store.put(make_cache(2))
    client.close()


@pytest.mark.parametrize("reply", [[b"a"], 7, None, True])
def test_redis_replies_of_another_type(reply: object, redis: str, opened: Callable[[Store], Store]) -> None:
    """Danger: a byte that changed on the way makes the reply a list or a number, and the program ends with a TypeError."""
    store = opened(RedisStore(redis, prefix="types"))
    store.put(make_cache(1, rows=ROWS))
    blobs = store.last.blobs
    client, blobs._client = blobs._client, Replies(blobs._client, reply)
    with pytest.raises((StoreUnavailable, EOFError)):
        blobs.fetch(Part(blobs.get_many([digest(1)])[0], HEAD, HEAD + 1))
    blobs._client = client
    soon(lambda: same(store.get(make_key(1)), make_cache(1, rows=ROWS)))


class Replies:
    """A client whose reply to a read of a part is another one."""

    def __init__(self, client: object, reply: object) -> None:
        self._client, self._reply = client, reply

    def __getattr__(self, name: str) -> object:
        return getattr(self._client, name)

    def hget(self, *_: str) -> object:
        return self._reply


class Dies:
    """A client whose process is killed before a document gets its name."""

    def __init__(self, client: object) -> None:
        self._client = client

    def __getattr__(self, name: str) -> object:
        return getattr(self._client, name)

    def renamenx(self, *_: str) -> None:
        raise KeyboardInterrupt

    def unlink(self, *_: str) -> None:
        """It cannot tidy up any more."""


# What is wrong is said in one line.


def refused(work: Callable[[], object], *words: str) -> str:
    """The line of a StoreUnavailable, which tells no secrets."""
    with pytest.raises(StoreUnavailable) as error:
        work()
    text = str(error.value)
    assert all(word in text for word in words), text
    assert "\n" not in text
    assert servers.SECRET not in text
    assert servers.ACCESS not in text
    assert error.value.__suppress_context__  # nor does a traceback
    return text


def test_a_missing_bucket(moto: str) -> None:
    """Danger: an hour of encoding, and a traceback of Rust."""
    store = ObjectStore("s3://nowhere/x", moto)
    refused(lambda: store.put(make_cache(1)), "s3://nowhere/x", "bucket does not exist", "create it")
    refused(lambda: store.entries(), "bucket does not exist")


def test_wrong_credentials(rclone: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Danger: a log with the credentials, or a document that is encoded again and again for no reason that is told."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody-else")
    store = ObjectStore("s3://kvilt/x", rclone)
    with caplog.at_level(logging.DEBUG):
        for work in (lambda: store.put(make_cache(1)), store.entries, lambda: store.contains([digest(1)])):
            assert "somebody-else" not in refused(work, "access is refused", "check the credentials")
        assert store.get(make_key(1)) is None
    assert "access is refused" in caplog.text
    assert "somebody-else" not in caplog.text
    assert servers.SECRET not in caplog.text


def test_a_clock_that_is_wrong(credentials: None) -> None:
    """Danger: "403 Forbidden" for a clock, and somebody changes the passwords."""

    class Strict(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<?xml version='1.0'?><Error><Code>RequestTimeTooSkewed</Code><Message>too large</Message></Error>"
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_PUT = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Strict) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store = ObjectStore("s3://kvilt/x", f"http://127.0.0.1:{server.server_port}")
        refused(store.entries, "clock", "set the clock")
        server.shutdown()


def test_documents_of_another_version_are_left_alone(tmp_path: Path, moto: str) -> None:
    """Danger: an older Kvilt deletes what a newer one wrote into the bucket."""
    store = remote_store("moto", moto, tmp_path)
    store.put(make_cache(1))
    data = bytes_of(store.last.get_many([digest(1)])[0]).replace(b'"version":"2"', b'"version":"9"', 1)
    store.last.blobs.delete(digest(1))
    assert store.last.blobs.put(digest(1), [memoryview(data)])
    assert store.get(make_key(1)) is None
    assert not store.put(make_cache(1))
    assert store.verify() == []
    store.set_aside(digest(1), "a test says so")
    store.gc()
    assert bytes_of(store.last.get_many([digest(1)])[0]) == data
    assert store.entries() == []


def test_a_full_redis(credentials: None, opened: Callable[[Store], Store], caplog: pytest.LogCaptureFixture) -> None:
    """Danger: a server that does not evict stops every answer once it is full, or keeps halves of documents."""
    with servers.redis("--maxmemory", "10mb", "--maxmemory-policy", "noeviction") as url:
        store, behind = opened(RedisStore(url)), Store(MemoryBlobs())
        refused(lambda: store.put(make_cache(1, rows=200_000)), "it is full", "allkeys-lfu", "maxmemory")
        assert "evicts by noeviction" in caplog.text
        assert store.entries() == []
        tiers = TieredStore(store, behind)
        assert tiers.put(make_cache(1, rows=200_000))
        assert same(tiers.get(make_key(1)), make_cache(1, rows=200_000))
        soon(lambda: takes(store))  # Redis frees memory a little later


def takes(store: Store) -> bool:
    try:
        return store.put(make_cache(2))
    except StoreUnavailable:
        return False


def test_a_redis_that_evicts(credentials: None, opened: Callable[[Store], Store]) -> None:
    """Danger: a document that was half evicted is served, or blocks the whole one."""
    with servers.redis("--maxmemory", "12mb", "--maxmemory-policy", "allkeys-lru") as url:
        store = opened(RedisStore(url))
        for seed in range(30):
            with contextlib.suppress(StoreUnavailable):  # so small a server may evict what is just being written
                store.put(make_cache(seed, rows=8000))
        there = stored(store, range(30))
        assert 0 < len(there) < 30
        for seed in range(30):
            got = store.get(make_key(seed))
            assert got is None or same(got, make_cache(seed, rows=8000))


def test_passwords(credentials: None, opened: Callable[[Store], Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: a password in a specification, and so in every log and report; or one that cannot be given at all."""
    with servers.redis("--requirepass", servers.SECRET) as url:
        refused(lambda: opened(RedisStore(url)).put(make_cache(1)), "password is refused", "REDISCLI_AUTH")
        monkeypatch.setenv("REDISCLI_AUTH", servers.SECRET)
        assert opened(RedisStore(url)).put(make_cache(1))
        monkeypatch.delenv("REDISCLI_AUTH")
        monkeypatch.setenv("REDIS_URL", url.replace("//", f"//:{servers.SECRET}@"))
        store = opened(RedisStore())
        assert store.put(make_cache(2))
        assert servers.SECRET not in store.last.blobs.link.where
    for spec in (f"redis:url=redis://:{servers.SECRET}@host", f"object:url=s3://me:{servers.SECRET}@bucket"):
        with pytest.raises(SpecError, match="no password") as error:
            build("store", spec)
        assert servers.SECRET not in str(error.value)


@pytest.mark.parametrize("spec", ["object:url=nowhere", "object:url=ftp://x/y", "redis:url=http://x", "redis:ttl=0"])
def test_bad_specifications(spec: str) -> None:
    """Danger: a slip of the pen is a traceback."""
    with pytest.raises(SpecError):
        build("store", spec)


@pytest.mark.parametrize(("package", "spec"), [("obstore", "object:url=memory:///"), ("redis", "redis")])
def test_missing_packages_are_named(package: str, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: "No module named obstore", and nobody knows the extra."""
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=r"kvilt\["):
        build("store", spec)


def test_blobs_in_use_are_the_same_blob(tmp_path: Path) -> None:
    """Danger: what is remembered of a document is read from a blob for which nothing is fetched ahead."""
    store = remote_store("object", "", tmp_path)
    store.put(make_cache(1))
    one, two = (store.get(make_key(1)) for _ in range(2))
    assert one is two
    blobs: RemoteBlobs = store.last.blobs
    assert list(blobs.live) == [digest(1)]
    store.close()
    del one, two
    assert list(blobs.live) == []

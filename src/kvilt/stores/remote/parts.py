"""Documents on another machine: opened by their first bytes, then read in parts, ahead of whoever needs them."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from kvilt.errors import DamagedCache, OtherVersion, SpecError, StoreError, StoreUnavailable
from kvilt.stores.blobs import Blobs, BlobStore, MemoryBlob, check_key

log = logging.getLogger("kvilt")

HEAD = 128 << 10  # bytes that opening a document brings: the header and the small tensors of most
PART = 8 << 20  # bytes of a request: large enough for the bandwidth, small enough to begin soon
AHEAD = 32  # parts that are on their way or wait to be read
PAUSES = 0.1, 30.0  # seconds for which a server that failed is left alone, the first time and at most


class Opened(NamedTuple):
    """What opening a document brings."""

    size: int
    identity: Hashable
    head: memoryview  # its first bytes


class Part(NamedTuple):
    """Some bytes of a document, which one request brings."""

    blob: RemoteBlob
    start: int
    end: int


class RemoteBlob:
    """A document on another machine. Where it is deleted while it is read, reading fails, and it is encoded again."""

    remote = True  # its rows are checked whenever they are read

    def __init__(self, store: RemoteBlobs, key: str, opened: Opened) -> None:
        self.store, self.key, self.opened = store, key, opened
        self.size, self.identity, self._head = opened
        self.group: Group

    def parts(self, start: int) -> list[Part]:
        """All parts behind the head, from the one that holds `start` on."""
        head, step = len(self._head), self.store.step
        starts = range(start - (start - head) % step, self.size, step)
        return [Part(self, at, min(at + step, self.size)) for at in starts]

    def read(self, offset: int, into: Sequence[memoryview]) -> None:
        """Fill all of `into` from `offset` on; reading beyond the head has the whole group fetched ahead."""
        part, data = Part(self, 0, len(self._head)), self._head
        for view in into:
            while view:
                if not part.start <= offset < part.end:
                    part, data = self._part(offset)
                count = min(len(view), part.end - offset)
                view[:count] = data[offset - part.start :][:count]
                view, offset = view[count:], offset + count
                if offset == part.end:
                    self.group.done(part)

    def _part(self, offset: int) -> tuple[Part, memoryview]:
        if offset >= self.size:
            raise EOFError(f"it ends after {self.size} bytes")
        if offset < len(self._head):
            return Part(self, 0, len(self._head)), self._head
        part = self.parts(offset)[0]
        data = self.group.take(part)
        if len(data) != part.end - part.start:
            raise OSError(f"{len(data)} bytes came instead of {part.end - part.start}")
        return part, data

    def close(self) -> None:
        """Nothing to do: connections are the store's."""


class Group:
    """Documents that were asked for together: the parts with the lowest layers of all come first, then the next ones."""

    def __init__(self, blobs: Sequence[RemoteBlob]) -> None:
        self._blobs = [weakref.ref(blob) for blob in blobs]
        self._wanted: dict[Part, None] = {}  # in order
        self._parts: dict[Part, Future[memoryview]] = {}  # on their way, or not read yet
        self._lock = threading.Lock()

    def take(self, part: Part) -> memoryview:
        """A part's bytes, waited for; some of the next ones are fetched meanwhile. Raises OSError, EOFError."""
        with self._lock:
            blobs = [blob for at in self._blobs if (blob := at()) is not None]
            self._blobs.clear()  # all parts are wanted once
            parts = [each for blob in blobs for each in blob.parts(len(blob.opened.head))]
            self._wanted |= dict.fromkeys(sorted(parts, key=lambda each: each.start / each.blob.size))
            future = self._parts.get(part) or self._fetch(part)
            while self._wanted and len(self._parts) < AHEAD:
                self._fetch(next(iter(self._wanted)))
        try:
            return future.result()
        except BaseException:
            self.done(part)  # the next one who wants it asks again
            raise

    def done(self, part: Part) -> None:
        """A part was read to its end."""
        self._parts.pop(part, None)

    def _fetch(self, part: Part) -> Future[memoryview]:
        self._wanted.pop(part, None)
        if part not in self._parts:
            self._parts[part] = part.blob.store.pool.submit(part.blob.store.fetch, part)
        return self._parts[part]


class Away(StoreUnavailable, OSError):
    """A server does not answer, or refuses: for who writes the store is unavailable, for who reads it is an OSError."""


class Link:
    """The way to a server. While it is away nobody waits for it: it is asked again later, each time twice as late."""

    def __init__(self, where: str, advice: Mapping[str, Sequence[str]]) -> None:
        self.where, self._advice = where, advice  # what is told, and what it is known by
        self._pause, self._until, self.resting = PAUSES[0], 0.0, False

    @contextlib.contextmanager
    def asked(self, what: str) -> Iterator[None]:
        """Failures become Away in words of our own: what servers and URLs say may hold credentials."""
        left = self._until - time.monotonic()
        self.resting = left > 0
        if self.resting:
            raise Away(f"{what} {self.where}: it does not answer, and is asked again in {left:.1f} s.")
        try:
            yield
        except (StoreError, EOFError):
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            told = next((what for what, marks in self._advice.items() if any(mark in text for mark in marks)), None)
            if told is None and time.monotonic() > self._until:
                self._until = time.monotonic() + self._pause
                self._pause = min(2 * self._pause, PAUSES[1])
            raise Away(f"{what} {self.where}: {told or 'it does not answer, or not soundly.'}") from None
        self._pause = PAUSES[0]


class RemoteBlobs(BlobStore):
    """What blob stores on other machines have in common."""

    step = PART  # bytes of a part

    def __init__(self, link: Link, connections: int) -> None:
        self.link, self.pool = link, ThreadPoolExecutor(connections, "kvilt-remote")
        self.live: weakref.WeakValueDictionary[str, RemoteBlob] = weakref.WeakValueDictionary()  # those in use

    @abstractmethod
    def open_many(self, keys: Sequence[str]) -> list[Opened | None]:
        """Open documents, all of them at once; None for what is not there. Raises StoreUnavailable."""

    @abstractmethod
    def fetch(self, part: Part) -> memoryview:
        """The bytes of a part. Raises StoreUnavailable, and EOFError where they are missing."""

    def get_many(self, keys: Sequence[str]) -> Blobs:
        unique = list(dict.fromkeys(check_key(key) for key in keys))
        try:
            found = zip(unique, self.open_many(unique), strict=True)
        except StoreUnavailable as error:
            log.log(logging.DEBUG if self.link.resting else logging.WARNING, "not read: %s", error)
            return [None for _ in keys]
        blobs = {key: self._blob(key, opened) for key, opened in found if opened is not None}
        group = Group([*blobs.values()])
        for blob in blobs.values():
            blob.group = group
        return [blobs.get(key) for key in keys]

    def set_aside(self, key: str, reason: str) -> bool:
        """Delete it, if it reads the same and damaged twice over: bytes change on the way, too."""
        from kvilt.rows.file import check_file

        try:
            one, two = self._anew(key), self._anew(key)
            if one is None or two is None:
                return False
            if one == two:
                check_file(MemoryBlob(one), key)
            log.warning("stored document %s was damaged on its way only: %s", key[:16], reason)
        except DamagedCache:
            return self.delete(key)
        except (OtherVersion, OSError, EOFError) as error:
            log.info("stored document %s is left alone: %s", key[:16], error)
        return False

    def _anew(self, key: str) -> bytes | None:
        """All bytes of a document, fetched now."""
        self.live.pop(check_key(key), None)
        (blob,) = self.get_many([key])
        if blob is None:
            return None
        blob.read(0, [memoryview(data := bytearray(blob.size))])
        return bytes(data)

    def _blob(self, key: str, opened: Opened) -> RemoteBlob:
        """The blob that is in use already, if it is the same: who remembers it reads what was fetched ahead for it."""
        live = self.live.get(key)
        if live is None or live.identity != opened.identity:
            live = self.live[key] = RemoteBlob(self, key, opened)
        return live


def check_url(url: str) -> str:
    """The URL itself, if it holds no password. Raises SpecError, which does not repeat it."""
    if "@" in url.partition("://")[2].partition("/")[0]:
        raise SpecError("a store's url must hold no password, because logs and reports show it: use the environment.")
    return url

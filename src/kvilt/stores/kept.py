"""Blobs under a catalogue: a blob store that keeps to its budget and quotas."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Container, Iterable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from kvilt.errors import DamagedCache, OtherVersion, StoreUnavailable, UserError
from kvilt.rows.header import read_header
from kvilt.stores.blobs import Blob, Blobs, BlobStore, MemoryBlob, check_key
from kvilt.stores.catalogue import Catalogue, Entry, Limit, Pins

log = logging.getLogger("kvilt")

MAX_NAMESPACE = 128  # characters
Describe = Callable[[str, Blob], Entry]


def check_namespace(name: str) -> str:
    """The namespace itself, if it can be one. Raises UserError."""
    if not (0 < len(name) <= MAX_NAMESPACE and name.isprintable()):
        raise UserError(f"namespace {name!r:.80} must be 1 to {MAX_NAMESPACE} printable characters.")
    return name


def describe(key: str, blob: Blob) -> Entry:
    """A stored document as its own header tells it. Raises DamagedCache, OtherVersion, OSError."""
    header = read_header(key, blob)
    title = header.title.encode("utf-8", "replace").decode()
    times = (header.created, header.expires or 0.0)
    if not (0 <= header.tokens <= blob.size and all(map(math.isfinite, times))):
        raise DamagedCache(key, "its header is malformed")
    try:
        namespace = check_namespace(header.namespace)
    except UserError as error:
        raise DamagedCache(key, str(error)) from error
    created, fields = header.created, dict(header.fields)
    return Entry(key, blob.size, header.tokens, title, namespace, created, created, 0, False, header.expires, fields)


def look(blobs: BlobStore, describe: Describe, key: str) -> Entry | None:
    """What a stored document says of itself; None if it is gone, unreadable now or another version's.

    Raises DamagedCache."""
    (blob,) = blobs.get_many([key])
    if blob is None:
        return None
    try:
        return describe(key, blob)
    except OtherVersion as error:
        log.debug("%s", error)
    except OSError as error:
        log.warning("cannot read stored document %s: %s", key[:16], error)
    finally:
        blob.close()
    return None


def survey(blobs: BlobStore, describe: Describe, known: Container[str], note: Callable[[str], None]) -> Iterator[Entry]:
    """Every stored document that is not `known`, as it tells itself; damaged ones are set aside and noted."""
    for key, _ in blobs.list():
        if key in known:
            continue
        try:
            entry = look(blobs, describe, key)
        except DamagedCache as error:
            entry = None
            with contextlib.suppress(StoreUnavailable):
                if blobs.set_aside(key, error.reason):
                    log.warning("%s; it was set aside", error)
                    note("damaged")
        if entry is not None:
            yield entry


class Kept(BlobStore):
    """Blobs of a store with budget, quotas per namespace, eviction policy, pins, time to live and counts of uses."""

    def __init__(
        self,
        blobs: BlobStore,
        path: Path | None = None,
        policy: str = "lru",
        budget: int | Limit | None = None,
        quota: int | None = None,
        pins: Pins | None = None,
        describe: Describe = describe,
    ) -> None:
        self.blobs, self.describe = blobs, describe
        self.memo: MutableMapping[str, Any] = {}  # what the store remembers of opened blobs
        limit: Limit = budget if callable(budget) else lambda held: budget
        self.catalogue = Catalogue(path, functools.partial(survey, blobs, describe), policy, limit, quota, pins)

    def get_many(self, keys: Sequence[str]) -> Blobs:
        return self.blobs.get_many(keys)

    def contains(self, keys: Iterable[str]) -> set[str]:
        return self.blobs.contains(keys)

    def list(self) -> Iterator[tuple[str, int]]:
        return self.blobs.list()

    def put(self, key: str, data: Sequence[memoryview]) -> bool:
        if self.contains([check_key(key)]):
            return False
        entry = self.describe(key, MemoryBlob(data))
        self.catalogue.reserve(entry, self._drop)  # first: a process that dies now leaves too little room, not too much
        try:
            made = self.blobs.put(key, data)
        except BaseException:
            with contextlib.suppress(StoreUnavailable):
                self.catalogue.remove({key} - self.contains([key]))
            raise
        try:
            self.catalogue.settle(entry, self._drop)
        except StoreUnavailable:
            if made:
                self._drop(key)
            raise
        return made

    def delete(self, key: str) -> bool:
        there = self._drop(key)
        self.catalogue.pins.discard(key)
        self._forget(key)
        return there

    def set_aside(self, key: str, reason: str) -> bool:
        there = self.blobs.set_aside(key, reason)
        self.memo.pop(key, None)
        self._forget(key)
        if there:
            self.catalogue.note("damaged")
        return there

    def gc(self) -> int:
        """Drop what is expired, left behind or over a limit, and bring the catalogue up to date; bytes freed."""
        freed = self.blobs.sweep()
        rows, there = self.catalogue.rows(), {key for key, _ in self.list()}
        self.catalogue.remove(rows.keys() - there)
        self.catalogue.adopt()
        rows, expired = self.catalogue.rows(), self.catalogue.expired()
        freed += sum(rows[key].bytes for key in expired if self._drop(key))
        self.catalogue.remove(expired)
        return freed + self.catalogue.shrink(self._drop)

    def close(self) -> None:
        self.catalogue.close()
        self.blobs.close()

    def _drop(self, key: str) -> bool:
        self.memo.pop(key, None)
        return self.blobs.delete(key)

    def _forget(self, key: str) -> None:
        """The row of a blob that is gone counts for nothing but room, so it may stay until the next `gc`."""
        try:
            self.catalogue.remove([key])
        except StoreUnavailable as error:
            log.info("not noted: %s", error)

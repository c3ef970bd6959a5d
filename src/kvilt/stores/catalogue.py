"""Blobs within a budget and quotas, and what is known of them: uses, pins, time to live, totals.

Nothing in a catalogue is precious: it is built anew from the headers of the blobs whenever it is missing or damaged.
Uses are gathered in memory and written a little later, so that answering never waits for it."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from kvilt.errors import DamagedCache, OtherVersion, SpecError, StoreUnavailable, did_you_mean
from kvilt.stores import tables
from kvilt.stores.blobs import Blob, Blobs, BlobStore, MemoryBlob, MemoryBlobs
from kvilt.stores.database import MOMENT, Database
from kvilt.stores.entry import Describe, Entry, StoreStats, describe
from kvilt.stores.sizes import show_size

T = TypeVar("T")
log = logging.getLogger("kvilt")

PENDING = 256  # documents that wait to be entered
WRITERS = 16  # processes that may write at once without holding more than the budget together
SHARE = 0.5  # of the disk's free space, its own documents counted as free, for a budget of 0
BATCH = 256  # documents whose headers are read at a time
POLICIES = {  # scores in SQL: the lowest goes first, among equals the one unused for longest
    "lru": "0",
    "lfu": "hits",
    # GDSF: frequency x cost / size over a clock that rises; the cost of losing a document is encoding its tokens again
    "greedy-dual": "(SELECT value FROM counters WHERE name = 'clock') + (hits + 1.0) * tokens / MAX(bytes, 1)",
}


class Catalogue(Database, BlobStore):
    """A blob store that keeps to limits, and remembers what users want of each blob and how often it was used."""

    version = 1

    def __init__(
        self,
        blobs: BlobStore,
        pins: BlobStore | None = None,
        path: Path | None = None,
        policy: str = "lru",
        budget: int | None = None,
        quota: int | None = None,
        describe: Describe = describe,
    ) -> None:
        super().__init__(path)
        self.blobs, self.describe = blobs, describe
        self.pins = pins or MemoryBlobs()  # an empty blob for each: they outlive the catalogue, and a damaged document
        self.memo: MutableMapping[str, Any] = {}  # what the store remembers of blobs it opened
        self._budget, self._quota, self._policy = budget, quota, policy
        self._enters = path is not None or budget or quota  # where nothing is limited, nothing needs to be known
        if policy not in POLICIES:
            hint = did_you_mean(policy, POLICIES)
            raise SpecError(f"unknown eviction policy {policy!r}.{hint} Known: {', '.join(POLICIES)}.")
        self.next: Entry | None = None  # what will be put next, if it is known: then it need not tell itself
        self._damaged, self._pending = 0, dict[str, Entry]()  # stored, and entered with the next transaction
        self._grant = 0.0  # bytes that may be stored before the catalogue is asked again
        self._complete = path is None  # whether it knows what processes that were killed have stored

    def get_many(self, keys: Sequence[str]) -> Blobs:
        return self.blobs.get_many(keys)

    def contains(self, keys: Iterable[str]) -> set[str]:
        return self.blobs.contains(keys)

    def list(self) -> Iterator[tuple[str, int]]:
        return self.blobs.list()

    def put(self, key: str, data: Sequence[memoryview]) -> bool:
        """Where there is much room a document is stored at once and entered with the next ones, in one transaction."""
        if self.blobs.contains([key]):
            return False
        told = self.next if self.next and self.next.key == key else None  # else it is copied from another tier, for use
        entry = told or replace(self.describe(key, MemoryBlob(b"".join(data))), used=time.time())
        entry = replace(entry, pinned=bool(self.pins.contains([key])))  # a pin outlives repairs
        if asked := self.asks(entry.bytes):
            if not self._complete:
                self.adopt()
            self.write(lambda db: self._make_room(db, entry))
        if made := self.blobs.put(key, data):
            self._grant -= entry.bytes
            self._pending[key] = entry
            if asked:
                self._enter_pending()
        return made

    def write(self, work: Callable[[sqlite3.Connection], T], patience: float | None = None) -> T:
        """Do `work` alone, after what is pending was entered. Raises StoreUnavailable."""
        pending = dict(self._pending)

        def both(db: sqlite3.Connection) -> T:
            there = pending if self.path is None else self.blobs.contains(pending)  # a folder may have been deleted
            self._insert(db, [pending[key] for key in there])
            made = work(db)
            if pending and not self._quota:  # others may have taken the room meanwhile
                self._evict(db, 0, "")
            return made

        made = super().write(both, patience)
        for key in pending:
            self._pending.pop(key, None)
        return made

    def asks(self, size: int) -> bool:
        """Whether so many bytes need room to be made, or must be entered at once."""
        return size > self._grant or len(self._pending) >= PENDING

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do `work`, which changes nothing, after what is pending was entered. Raises StoreUnavailable."""
        self._enter_pending()
        return super().read(work)

    def delete(self, key: str) -> bool:
        there = self._drop(key)
        self.pins.delete(key)
        self.forget([key])
        return there

    def set_aside(self, key: str, reason: str) -> bool:
        there = self.blobs.set_aside(key, reason)
        self.memo.pop(key, None)
        self.forget([key])
        self._damaged += there
        return there

    def close(self) -> None:
        self.disconnect()
        self.blobs.close()

    def record(self, uses: Sequence[tuple[str, float]], misses: int, patience: float | None) -> None:
        """Count uses (key and time) and misses. Raises StoreUnavailable."""

        def work(db: sqlite3.Connection) -> None:
            for name, number in (("hits", len(uses)), ("misses", misses), ("damaged", self._damaged)):
                tables.set_counter(db, name, tables.counter(db, name) + number)
            for key, moment in uses:
                db.execute("UPDATE entries SET hits = hits + 1, used = MAX(used, ?) WHERE key = ?", (moment, key))
                self._score(db, "key = ?", key)
            self._damaged = 0

        gone = self.path is not None and not os.path.isdir(self.path.parent)  # nor is it made again for this
        if not gone and (uses or misses or self._damaged or self._pending):
            self.write(work, patience)

    def rows(self, condition: str = "TRUE", *values: object) -> dict[str, Entry]:
        """Documents by key, all or those of an SQL condition. Raises StoreUnavailable."""
        return self.read(lambda db: tables.entries(db, condition, *values))

    def look(self, key: str) -> Entry | None:
        """A document as it tells itself; None if it is gone, unreadable now or another version's. Raises DamagedCache."""
        made = self._told(key, self.blobs.get_many([key])[0])
        return made and replace(made, pinned=bool(self.pins.contains([key])))

    def _told(self, key: str, blob: Blob | None) -> Entry | None:
        try:
            return None if blob is None else self.describe(key, blob)
        except (OtherVersion, OSError) as error:
            log.info("stored document %s is left alone: %s", key[:16], error)
            return None

    def stats(self) -> StoreStats:
        """Totals since the catalogue was built. Raises StoreUnavailable."""
        names = ("hits", "misses", "evictions", "damaged")
        entries, held, *counts = self.read(lambda db: [*tables.held(db, ""), *(tables.counter(db, n) for n in names)])
        if not self._enters:
            entries, held = len(sizes := [size for _, size in self.blobs.list()]), sum(sizes)
        return StoreStats(entries, held, self._limit(held), *counts)

    def pin(self, key: str, pinned: bool) -> None:
        """Keep a document from eviction and expiry, or no longer. Raises StoreUnavailable."""

        def work(db: sqlite3.Connection) -> bool:
            db.execute("UPDATE entries SET pinned = ? WHERE key = ?", (pinned, key))
            return self.pins.put(key, []) if pinned else self.pins.delete(key)

        self.write(work)

    def gc(self) -> int:
        """Drop what is expired, left behind or over a limit, and enter what is not entered; bytes freed."""
        freed = self.blobs.sweep()
        self.adopt()
        over = self.rows("expires <= ? AND NOT pinned", time.time())
        freed += sum(row.bytes for key, row in over.items() if self._drop(key))
        self.forget(over)
        return freed + self.write(self._shrink)

    def adopt(self) -> None:
        """Enter what is stored but not entered, and forget what is gone. Raises StoreUnavailable."""
        with contextlib.closing(sqlite3.connect("")) as gone:  # a file, where they are many
            gone.execute("CREATE TABLE keys (key PRIMARY KEY) WITHOUT ROWID")
            self.read(lambda db: gone.executemany("INSERT INTO keys VALUES (?)", db.execute("SELECT key FROM entries")))
            listed = (key for key, _ in self.blobs.list())  # after that: others enter what they store
            found = self._survey(k for k in listed if not gone.execute("DELETE FROM keys WHERE key = ?", (k,)).rowcount)
            while batch := [*itertools.islice(found, BATCH)]:
                self.write(partial(self._insert, entries=batch))
            self.forget(key for (key,) in gone.execute("SELECT key FROM keys"))
        self._complete = True

    def build(self, db: sqlite3.Connection) -> None:
        for statement in tables.SCHEMA.strip().split("\n\n"):
            db.execute(statement)
        db.executemany("INSERT INTO counters VALUES (?, ?)", [("clock", 0.0), ("policy", self._policy)])
        if self._enters:
            self._insert(db, self._survey(key for key, _ in self.blobs.list()))

    def _enter_pending(self) -> None:
        if self._pending:
            with contextlib.suppress(StoreUnavailable):  # then with the next ones
                self.write(lambda _: None, MOMENT)

    def _drop(self, key: str) -> bool:
        self.memo.pop(key, None)
        return self.blobs.delete(key)

    def forget(self, keys: Iterable[str]) -> None:
        """Rows of blobs that are gone do no harm but take room, so they may stay until the next `gc`."""

        def work(db: sqlite3.Connection) -> None:  # no cursor leaves a transaction: a fork must not meet it in use
            db.executemany("DELETE FROM entries WHERE key = ?", [(key,) for key in keys])

        with contextlib.suppress(StoreUnavailable):
            self.write(work)

    def _survey(self, keys: Iterable[str]) -> Iterator[Entry]:
        """Documents as they tell themselves; damaged ones are set aside."""
        pinned, left = {key for key, _ in self.pins.list()}, iter(keys)
        while batch := [*itertools.islice(left, BATCH)]:
            for key, blob in zip(batch, self.blobs.get_many(batch), strict=True):
                try:
                    if entry := self._told(key, blob):
                        yield replace(entry, pinned=True) if key in pinned else entry
                except DamagedCache as error:
                    with contextlib.suppress(StoreUnavailable):
                        log.warning("%s; it is set aside", error)
                        self._damaged += self.blobs.set_aside(key, error.reason)

    def _limit(self, held: int) -> int | None:
        if self._budget == 0 and self.path is not None:
            return int(SHARE * (shutil.disk_usage(self.path.parent).free + held))
        return self._budget

    def _make_room(self, db: sqlite3.Connection, entry: Entry) -> None:
        self._evict(db, entry.bytes, entry.namespace)
        limit = self._limit(held := tables.held(db, "")[1])
        room = float("inf") if limit is None else (limit - held) / WRITERS
        self._grant = entry.bytes + (0.0 if self._quota else room)

    def _shrink(self, db: sqlite3.Connection) -> int:
        names = db.execute("SELECT namespace FROM totals WHERE bytes > 0 AND namespace != ''").fetchall()
        return sum(self._evict(db, 0, name) for (name,) in names)

    def _score(self, db: sqlite3.Connection, condition: str = "TRUE", *values: object) -> None:
        db.execute(f"UPDATE entries SET score = {POLICIES[self._policy]} WHERE {condition}", values)

    def _insert(self, db: sqlite3.Connection, entries: Iterable[Entry]) -> None:
        for entry in entries:
            row = {**vars(entry), "fields": json.dumps(entry.fields), "score": 0.0}
            db.execute(f"INSERT OR IGNORE INTO entries VALUES ({', '.join('?' * len(row))})", (*row.values(),))
            if self._policy != "lru":  # whose score is 0 always
                self._score(db, "key = ?", entry.key)

    def _evict(self, db: sqlite3.Connection, size: int, namespace: str) -> int:
        """Make room for `size` more bytes; bytes freed. Nothing is evicted for what cannot fit."""
        if tables.counter(db, "policy") != self._policy:  # the store was last written with another
            self._score(db)
            tables.set_counter(db, "policy", self._policy)
        chosen: dict[str, tuple[int, float]] = {}  # bytes, score
        limits = ("quota", self._quota, namespace), ("budget", self._limit(tables.held(db, "")[1]), "")
        for name, limit, scope in limits:
            if limit is None:
                continue
            excess = tables.held(db, scope)[1] + size - limit - sum(held for held, _ in chosen.values())
            for key, held, score in tables.ranked(db, scope) if excess > 0 and size <= limit else ():
                if key not in chosen:
                    chosen[key], excess = (held, score), excess - held
                if excess <= 0:
                    break
            if excess > 0 and size:
                why = "it is larger than that" if size > limit else "the rest is pinned"
                what = f"a document of {show_size(size)} does not fit the store's {name} of {show_size(limit)}: {why}"
                raise StoreUnavailable(f"{what}. Raise the {name}, or unpin documents.")
        for key, (_, score) in chosen.items():
            self._drop(key)
            db.execute("DELETE FROM entries WHERE key = ?", (key,))
            tables.set_counter(db, "clock", max(tables.counter(db, "clock"), score))  # greedy-dual: old fame fades
        tables.set_counter(db, "evictions", tables.counter(db, "evictions") + len(chosen))
        return sum(held for held, _ in chosen.values())

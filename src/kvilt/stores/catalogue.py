"""What is known of stored documents beside their bytes: uses, pins, time to live, budgets, quotas.

Nothing in it is precious: it is built anew from the headers of the blobs whenever it is missing or damaged. Uses are
gathered in memory and written a little later, so that answering never waits for it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sqlite3
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kvilt.errors import StoreUnavailable
from kvilt.stores.database import Damage, Database
from kvilt.stores.policy import make_policy
from kvilt.stores.sizes import show_size

FLUSH_SECONDS = 2.0
_SCHEMA = (
    "CREATE TABLE entries (key TEXT PRIMARY KEY, bytes INTEGER, tokens INTEGER, title TEXT, namespace TEXT, "
    "created REAL, used REAL, hits INTEGER, pinned INTEGER, expires REAL, fields TEXT, score REAL)",
    "CREATE INDEX by_score ON entries (pinned, score, used)",
    "CREATE INDEX by_namespace ON entries (namespace, pinned, score, used)",
    "CREATE INDEX by_expiry ON entries (expires) WHERE expires IS NOT NULL",
    "CREATE TABLE totals (namespace TEXT PRIMARY KEY, entries INTEGER, bytes INTEGER)",  # '' is the whole store
    "CREATE TRIGGER added AFTER INSERT ON entries BEGIN "
    "INSERT INTO totals VALUES (NEW.namespace, 1, NEW.bytes), ('', 1, NEW.bytes) "
    "ON CONFLICT DO UPDATE SET entries = entries + 1, bytes = bytes + excluded.bytes; END",
    "CREATE TRIGGER removed AFTER DELETE ON entries BEGIN UPDATE totals SET entries = entries - 1, "
    "bytes = bytes - OLD.bytes WHERE namespace IN (OLD.namespace, ''); END",
    "CREATE TABLE counters (name TEXT PRIMARY KEY, value REAL)",
    "CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT)",
    "INSERT INTO totals VALUES ('', 0, 0)",
)


@dataclass(frozen=True)
class Entry:
    """One stored document. Times are seconds since the epoch."""

    key: str  # digest
    bytes: int
    tokens: int
    title: str = ""
    namespace: str = "shared"
    created: float = 0.0
    used: float = 0.0
    hits: int = 0
    pinned: bool = False
    expires: float | None = None
    fields: dict[str, str] = field(default_factory=dict)  # the key's identity in clear

    def alive(self, now: float) -> bool:
        """Whether it may be served; a pin outlasts the time to live."""
        return self.expires is None or self.expires > now or self.pinned


@dataclass(frozen=True)
class StoreStats:
    """Totals of a store."""

    entries: int
    bytes: int
    budget: int | None = None
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    damaged: int = 0


class Pins(Protocol):
    """The keys that users want kept: a set, or what outlives this process."""

    def __contains__(self, key: object, /) -> bool: ...
    def add(self, key: str, /) -> None:
        """Pin a key."""

    def discard(self, key: str, /) -> None:
        """Unpin a key."""


Scan = Callable[[Container[str], Callable[[str], None]], Iterable[Entry]]  # documents not known yet; notes damage
Remove = Callable[[str], object]  # deletes a blob
Limit = Callable[[int], int | None]  # bytes a store may hold, given the bytes it holds
_COLUMNS = tuple(Entry.__dataclass_fields__)


class Catalogue(Database):
    """The catalogue of one blob store, in a SQLite file or (without `path`) in memory."""

    version = 1

    def __init__(
        self, path: Path | None, scan: Scan, policy: str, budget: Limit, quota: int | None, pins: Pins | None = None
    ) -> None:
        super().__init__(path)
        self.pins: Pins = set() if pins is None else pins
        self._scan, self._budget, self._quota = scan, budget, quota
        self._policy, self._score = policy, make_policy(policy)
        self._rescored = False
        self._events: deque[tuple[str, str, float]] = deque()
        self._due = False

    def note(self, what: str, key: str = "") -> None:
        """Count one of "hits" (of `key`), "misses" or "damaged", without waiting for anything."""
        self._after_fork()
        self._events.append((what, key, time.time()))
        if not self._due:
            self._due, timer = True, threading.Timer(FLUSH_SECONDS, self.flush, [0.0])
            timer.daemon = True
            with contextlib.suppress(RuntimeError):  # no new threads while the interpreter ends; `close` writes then
                timer.start()

    def flush(self, patience: float | None = None) -> None:
        """Write what was noted, if nobody else writes for longer than `patience`; else it is kept for the next time."""
        self._due = False
        if self._events:
            with contextlib.suppress(StoreUnavailable):
                self.write(self._flush, patience)

    def reserve(self, entry: Entry, remove: Remove) -> None:
        """Enter a document that is about to be stored, after making room for it. Raises StoreUnavailable."""

        def work(db: sqlite3.Connection) -> None:
            self._rescore(db)
            db.execute("DELETE FROM entries WHERE key = ?", (entry.key,))  # of a blob that vanished
            self._make_room(db, entry.bytes, entry.namespace, remove)
            self._insert(db, [entry])

        self.flush()
        self.write(work)

    def settle(self, entry: Entry, remove: Remove) -> None:
        """Make sure that a document stored just now is entered still, whatever other processes did meanwhile."""
        if self.row(entry.key) is None:
            self.reserve(entry, remove)

    def adopt(self) -> None:
        """Enter documents that are stored but not entered."""
        known = self.rows()
        unknown = list(self._scan(known, self.note))
        self.write(lambda db: self._insert(db, unknown))

    def shrink(self, remove: Remove) -> int:
        """Bring the store and every namespace within their limits; bytes freed."""

        def work(db: sqlite3.Connection) -> int:
            self._rescore(db)
            names = [name for (name,) in db.execute("SELECT namespace FROM totals WHERE bytes > 0 AND namespace != ''")]
            return sum(self._make_room(db, 0, name, remove) for name in names)

        self.flush()
        return self.write(work)

    def remove(self, keys: Iterable[str]) -> None:
        """Forget documents."""
        gone = [(key,) for key in keys]
        if gone:
            self.write(lambda db: db.executemany("DELETE FROM entries WHERE key = ?", gone))

    def pin(self, key: str, pinned: bool) -> None:
        """Keep a document from eviction and expiry, or no longer; outlives the document's repair."""

        def work(db: sqlite3.Connection) -> None:
            db.execute("UPDATE entries SET pinned = ? WHERE key = ?", (pinned, key))
            (self.pins.add if pinned else self.pins.discard)(key)

        self.write(work)

    def rows(self) -> dict[str, Entry]:
        """All documents by key."""
        self.flush(0.0)
        return self.read(lambda db: {row[0]: _entry(row) for row in db.execute("SELECT * FROM entries")})

    def row(self, key: str) -> Entry | None:
        """One document."""
        self.flush(0.0)
        row = self.read(lambda db: db.execute("SELECT * FROM entries WHERE key = ?", (key,)).fetchone())
        return None if row is None else _entry(row)

    def expired(self) -> set[str]:
        """Documents whose time has passed and that are not pinned."""
        query, now = "SELECT key FROM entries INDEXED BY by_expiry WHERE expires <= ? AND NOT pinned", time.time()
        return self.read(lambda db: {key for (key,) in db.execute(query, (now,))})

    def stats(self) -> StoreStats:
        """Totals since the catalogue was built."""
        self.flush(0.0)
        names = ("hits", "misses", "evictions", "damaged")
        count = self.read(lambda db: dict(db.execute("SELECT name, value FROM counters")))
        entries, held = self.read(lambda db: _held(db, ""))
        return StoreStats(entries, held, self._budget(held), *(int(count.get(name, 0)) for name in names))

    def close(self) -> None:
        """Write what is pending and close the file; the next use opens it again."""
        self.flush()
        super().close()

    def build(self, db: sqlite3.Connection) -> None:
        for statement in _SCHEMA:
            db.execute(statement)
        self._insert(db, self._scan((), self.note))

    def prepare(self, db: sqlite3.Connection) -> None:
        db.create_function("score", 4, self._score, deterministic=True)

    def _after_fork(self) -> None:
        if self._pid != os.getpid():
            self._events.clear()  # the parent writes them
            self._due = False
        super()._after_fork()

    def _flush(self, db: sqlite3.Connection) -> None:
        events = [self._events.popleft() for _ in range(len(self._events))]
        try:
            for name, number in Counter(what for what, _, _ in events).items():
                _count(db, name, number)
            last = {key: moment for _, key, moment in events}
            clock = _clock(db)
            hits = Counter(key for what, key, _ in events if what == "hits")
            db.executemany(
                "UPDATE entries SET hits = hits + ?1, used = MAX(used, ?2), "
                "score = score(hits + ?1, tokens, bytes, ?3) WHERE key = ?4",
                [(number, last[key], clock, key) for key, number in sorted(hits.items(), key=lambda h: last[h[0]])],
            )
        except BaseException:
            self._events.extendleft(reversed(events))
            raise

    def _rescore(self, db: sqlite3.Connection) -> None:
        """Every score is of the policy in use, also where the store was last written with another."""
        if not self._rescored:
            stored = db.execute("SELECT value FROM settings WHERE name = 'policy'").fetchone()
            if stored != (self._policy,):
                db.execute("UPDATE entries SET score = score(hits, tokens, bytes, 0.0)")
                db.execute("INSERT OR REPLACE INTO settings VALUES ('policy', ?)", (self._policy,))
            self._rescored = True

    def _insert(self, db: sqlite3.Connection, entries: Iterable[Entry]) -> None:
        clock = _clock(db)
        for entry in entries:
            values = {**vars(entry), "fields": json.dumps(entry.fields), "pinned": entry.key in self.pins}
            score = self._score(entry.hits, entry.tokens, entry.bytes, clock)
            row = (*(values[name] for name in _COLUMNS), score)
            db.execute("INSERT OR IGNORE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def _make_room(self, db: sqlite3.Connection, size: int, namespace: str, remove: Remove) -> int:
        """Evict until `size` more bytes fit; bytes freed. Nothing is evicted for what cannot fit."""
        chosen: dict[str, tuple[int, float]] = {}  # bytes, score
        budget = self._budget(_held(db, "")[1])
        for name, limit, scope in (("quota", self._quota, namespace), ("budget", budget, "")):
            if limit is None:
                continue
            excess = _held(db, scope)[1] + size - limit - sum(held for held, _ in chosen.values())
            if excess > 0 and size <= limit:
                for key, held, score in _ranked(db, scope):
                    if key not in chosen:
                        chosen[key], excess = (held, score), excess - held
                    if excess <= 0:
                        break
            if excess > 0 and size:
                raise StoreUnavailable(_no_room(name, limit, size))
        for key in chosen:
            remove(key)
        if chosen:
            db.executemany("DELETE FROM entries WHERE key = ?", [(key,) for key in chosen])
            _count(db, "evictions", len(chosen))
            clock = max(_clock(db), *(score for _, score in chosen.values()))
            db.execute("INSERT OR REPLACE INTO counters VALUES ('clock', ?)", (clock,))
        return sum(held for held, _ in chosen.values())


def _ranked(db: sqlite3.Connection, namespace: str) -> Iterator[tuple[str, int, float]]:
    """Who may be evicted: the expired first, then by score and last use."""
    among, scope = ("namespace = ? AND", (namespace,)) if namespace else ("", ())
    select, now = "SELECT key, bytes, score FROM entries", time.time()
    expired = db.execute(f"{select} INDEXED BY by_expiry WHERE {among} pinned = 0 AND expires <= ?", (*scope, now))
    return itertools.chain(expired, db.execute(f"{select} WHERE {among} pinned = 0 ORDER BY score, used", scope))


def _held(db: sqlite3.Connection, namespace: str) -> tuple[int, int]:
    """Documents and bytes of a namespace, of the whole store for ''."""
    row = db.execute("SELECT entries, bytes FROM totals WHERE namespace = ?", (namespace,)).fetchone()
    return row or (0, 0)


def _clock(db: sqlite3.Connection) -> float:
    """The highest score evicted so far, so that old fame fades under greedy-dual."""
    row = db.execute("SELECT value FROM counters WHERE name = 'clock'").fetchone()
    return 0.0 if row is None else float(row[0])


def _count(db: sqlite3.Connection, name: str, number: int) -> None:
    query = "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value"
    db.execute(query, (name, number))


def _entry(row: tuple[Any, ...]) -> Entry:
    values = dict(zip(_COLUMNS, row, strict=False))
    try:
        return Entry(**{**values, "pinned": bool(values["pinned"]), "fields": json.loads(values["fields"])})
    except (ValueError, TypeError) as error:
        raise Damage(f"an entry is malformed: {error}") from error


def _no_room(name: str, limit: int, size: int) -> str:
    why = "it is larger than that" if size > limit else "the rest is pinned"
    return (
        f"a document of {show_size(size)} does not fit the store's {name} of {show_size(limit)}: {why}. "
        f"Raise the {name}, or unpin documents."
    )

"""The index of a disk store: who is there, who was used when, who is being encoded.

Nothing in it is precious. A deleted, damaged or older index is rebuilt from the files; where none can be written (a
read-only or full disk) one is built in memory. Uses are gathered and written together, without syncing the disk.
"""

from __future__ import annotations

import itertools
import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from kvilt.errors import StoreUnavailable
from kvilt.stores.base import Entry
from kvilt.stores.database import Database
from kvilt.stores.policy import Limits, Policy, Standing
from kvilt.stores.process import Owner

T = TypeVar("T")
log = logging.getLogger("kvilt")

VERSION = 1
CLAIM_SECONDS = 600.0
FLUSH_SECONDS = 2.0
FLUSH_USES = 256
_COLUMNS = tuple(Entry.__dataclass_fields__)  # of the table `entries`, which has its score behind them
_SCHEMA = (
    "CREATE TABLE entries (key TEXT PRIMARY KEY, bytes INTEGER, tokens INTEGER, title TEXT, namespace TEXT, "
    "created REAL, used REAL, hits INTEGER, pinned INTEGER, expires REAL, fields TEXT, score REAL)",
    "CREATE INDEX by_score ON entries (score, used)",
    "CREATE INDEX by_namespace ON entries (namespace, score, used)",
    "CREATE INDEX by_expiry ON entries (expires) WHERE expires IS NOT NULL",
    "CREATE TABLE totals (namespace TEXT PRIMARY KEY, bytes INTEGER)",
    "CREATE TRIGGER added AFTER INSERT ON entries BEGIN INSERT INTO totals VALUES (NEW.namespace, NEW.bytes) "
    "ON CONFLICT (namespace) DO UPDATE SET bytes = bytes + NEW.bytes; END",
    "CREATE TRIGGER removed AFTER DELETE ON entries BEGIN "
    "UPDATE totals SET bytes = bytes - OLD.bytes WHERE namespace = OLD.namespace; END",
    "CREATE TABLE claims (key TEXT PRIMARY KEY, host TEXT, pid INTEGER, start TEXT, taken REAL)",
    "CREATE TABLE counters (name TEXT PRIMARY KEY, value REAL)",
    "CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT)",
)


class Index:
    """The index of one store folder; `scan` lists the folder's documents and notes damaged ones.

    What is written here repeats what the files say, so a failed write is logged and passed over; gathered uses wait.
    Reading, and `claim`, raise StoreUnavailable.
    """

    def __init__(self, path: Path, policy: Policy, scan: Callable[[Callable[[str], None]], Iterable[Entry]]) -> None:
        self._policy = policy
        self._scan = scan
        self._database = Database(path, VERSION, self._build, self._prepare)
        self._uses: dict[str, tuple[int, float]] = {}
        self._counts: dict[str, int] = {}
        self._flushed = time.monotonic()

    def touch(self, key: str) -> None:
        """Note a use; written later."""
        with self._database.lock:
            self._uses[key] = (self._uses.get(key, (0, 0.0))[0] + 1, time.time())
            self._flush_if_due()

    def count(self, name: str) -> None:
        """Raise a counter; written later."""
        with self._database.lock:
            self.note(name)
            self._flush_if_due()

    def note(self, name: str) -> None:
        """Raise a counter without touching the database."""
        self._counts[name] = self._counts.get(name, 0) + 1

    def flush(self) -> None:
        """Write gathered uses and counters."""
        with self._database.lock:
            self._flushed = time.monotonic()
            if (self._counts or self._uses) and self._note(self._flush):
                self._uses.clear()
                self._counts.clear()

    def insert(self, entries: Iterable[Entry]) -> None:
        """Add documents that are not there yet."""
        self._note(lambda db: self._insert(db, entries))

    def remove(self, keys: Iterable[str]) -> None:
        """Forget documents."""
        self._note(lambda db: _delete(db, keys))

    def entries(self) -> list[Entry]:
        """All documents, oldest first."""
        self.flush()
        return self._read(lambda db: [_entry(row) for row in db.execute("SELECT * FROM entries ORDER BY created, key")])

    def entry(self, key: str) -> Entry | None:
        """One document."""
        row = self._read(lambda db: db.execute("SELECT * FROM entries WHERE key = ?", (key,)).fetchone())
        return None if row is None else _entry(row)

    def expired(self, now: float) -> set[str]:
        """Documents whose time has passed and that are not pinned."""
        query = "SELECT key FROM entries WHERE expires IS NOT NULL AND expires <= ? AND NOT pinned"
        return self._read(lambda db: {key for (key,) in db.execute(query, (now,))})

    def set_pinned(self, key: str, pinned: bool) -> None:
        """Mark a document as pinned or not."""
        self._note(lambda db: db.execute("UPDATE entries SET pinned = ? WHERE key = ?", (pinned, key)))

    def held(self) -> int:
        """Bytes of all documents."""
        return self._read(lambda db: _held(db, None))

    def namespaces(self) -> list[str]:
        """All namespaces in use."""
        return self._read(lambda db: [name for (name,) in db.execute("SELECT namespace FROM totals WHERE bytes > 0")])

    def counters(self) -> dict[str, int]:
        """Totals since the index was built, `entries` among them."""
        self.flush()
        query = "SELECT name, value FROM counters UNION SELECT 'entries', COUNT(*) FROM entries"
        return self._read(lambda db: {name: int(value) for name, value in db.execute(query)})

    def victims(self, limits: Limits, size: int, namespace: str, keep: Callable[[str], bool]) -> list[Standing]:
        """Whom to evict for `size` more bytes; those that `keep` names never."""
        self.flush()

        def choose(db: sqlite3.Connection) -> list[Standing]:
            def ranked(scope: str | None) -> Iterator[Standing]:
                return (standing for standing in _ranked(db, scope) if not keep(standing.key))

            return limits.victims(size, namespace, lambda scope: _held(db, scope), ranked)

        return self._read(choose)

    def evicted(self, victims: list[Standing]) -> None:
        """Forget evicted documents and let the clock reach the highest of their scores."""

        def forget(db: sqlite3.Connection) -> None:
            _delete(db, (v.key for v in victims))
            _raise_counter(db, "evictions", len(victims))
            clock = max(_clock(db), *(v.score for v in victims))
            db.execute("INSERT OR REPLACE INTO counters VALUES ('clock', ?)", (clock,))

        if victims:
            self._note(forget)

    def claim(self, key: str) -> bool:
        """Take the right to encode `key`, unless another live process took it less than ten minutes ago."""
        me, now = Owner.current(), time.time()

        def take(db: sqlite3.Connection) -> bool:
            row = db.execute("SELECT host, pid, start, taken FROM claims WHERE key = ?", (key,)).fetchone()
            if row is not None and now - row[3] < CLAIM_SECONDS:
                owner = Owner(*row[:3])
                if owner != me and owner.alive():
                    return False
            db.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?, ?)", (key, me.host, me.pid, me.start, now))
            return True

        return self._database.run(take, write=True)

    def release(self, key: str) -> None:
        """Give up this process's claim."""
        me = Owner.current()
        query = "DELETE FROM claims WHERE key = ? AND host = ? AND pid = ? AND start = ?"
        self._note(lambda db: db.execute(query, (key, me.host, me.pid, me.start)))

    def drop_claims(self) -> None:
        """Forget claims that are too old to count."""
        self._note(lambda db: db.execute("DELETE FROM claims WHERE taken < ?", (time.time() - CLAIM_SECONDS,)))

    def close(self) -> None:
        """Write what is pending and close the database; the next call opens it again."""
        with self._database.lock:
            self.flush()
            self._database.close()

    def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return self._database.run(work)

    def _note(self, work: Callable[[sqlite3.Connection], object]) -> bool:
        try:
            self._database.run(work, write=True)
        except StoreUnavailable as error:
            log.info("not noted: %s", error)
            return False
        return True

    def _build(self, db: sqlite3.Connection) -> None:
        for statement in _SCHEMA:
            db.execute(statement)
        self._insert(db, self._scan(self.note))

    def _prepare(self, db: sqlite3.Connection) -> None:
        """Every score is of the policy in use, also when the store was last used with another."""
        db.create_function("score", 4, self._policy.score, deterministic=True)
        stored = db.execute("SELECT value FROM settings WHERE name = 'policy'").fetchone()
        if stored is None or stored[0] != self._policy.name:
            db.execute("BEGIN IMMEDIATE")
            db.execute("UPDATE entries SET score = score(hits, tokens, bytes, 0.0)")
            db.execute("INSERT OR REPLACE INTO settings VALUES ('policy', ?)", (self._policy.name,))
            db.execute("COMMIT")

    def _insert(self, db: sqlite3.Connection, entries: Iterable[Entry]) -> None:
        clock = _clock(db)
        rows = ((*_row(e), self._policy.score(e.hits, e.tokens, e.bytes, clock)) for e in entries)
        db.executemany("INSERT OR IGNORE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def _flush_if_due(self) -> None:
        if len(self._uses) >= FLUSH_USES or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def _flush(self, db: sqlite3.Connection) -> None:
        for name, number in self._counts.items():
            _raise_counter(db, name, number)
        update = (
            "UPDATE entries SET hits = hits + ?1, used = MAX(used, ?2), score = score(hits + ?1, tokens, bytes, ?3) "
            "WHERE key = ?4"
        )
        clock = _clock(db)
        db.executemany(update, [(number, used, clock, key) for key, (number, used) in self._uses.items()])


def _clock(db: sqlite3.Connection) -> float:
    row = db.execute("SELECT value FROM counters WHERE name = 'clock'").fetchone()
    return 0.0 if row is None else float(row[0])


def _raise_counter(db: sqlite3.Connection, name: str, number: int) -> None:
    query = "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value"
    db.execute(query, (name, number))


def _delete(db: sqlite3.Connection, keys: Iterable[str]) -> None:
    db.executemany("DELETE FROM entries WHERE key = ?", ((key,) for key in keys))


def _held(db: sqlite3.Connection, namespace: str | None) -> int:
    query = "SELECT COALESCE(SUM(bytes), 0) FROM totals WHERE ?1 IS NULL OR namespace = ?1"
    return int(db.execute(query, (namespace,)).fetchone()[0])


def _ranked(db: sqlite3.Connection, namespace: str | None) -> Iterator[Standing]:
    """Who may be evicted: the expired first, then by score and last use."""
    among, now = ("namespace = ? AND", (namespace,)) if namespace else ("", ()), (time.time(),)
    select = f"SELECT key, bytes, score FROM entries WHERE {among[0]} pinned = 0 AND "
    expired = db.execute(f"{select} expires <= ?", (*among[1], *now))
    living = db.execute(f"{select} (expires IS NULL OR expires > ?) ORDER BY score, used", (*among[1], *now))
    return (Standing(*row) for row in itertools.chain(expired, living))


def _row(entry: Entry) -> tuple[object, ...]:
    values = {**vars(entry), "fields": json.dumps(entry.fields)}
    return tuple(values[name] for name in _COLUMNS)


def _entry(row: tuple[Any, ...]) -> Entry:
    values = dict(zip(_COLUMNS, row, strict=False))
    return Entry(**{**values, "pinned": bool(values["pinned"]), "fields": json.loads(values["fields"])})

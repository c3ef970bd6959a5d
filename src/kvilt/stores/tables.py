"""The tables of a catalogue, and questions to them."""

from __future__ import annotations

import itertools
import json
import sqlite3
import time
from collections.abc import Iterator
from typing import Any

from kvilt.stores.entry import Entry

COLUMNS = tuple(Entry.__dataclass_fields__)
SCHEMA = f"""
CREATE TABLE entries ({", ".join(COLUMNS)}, score, PRIMARY KEY (key))

CREATE INDEX by_score ON entries (pinned, score, used)

CREATE INDEX by_namespace ON entries (namespace, pinned, score, used)

CREATE INDEX by_expiry ON entries (expires) WHERE expires IS NOT NULL

CREATE TABLE counters (name PRIMARY KEY, value)

CREATE TABLE totals (namespace PRIMARY KEY, entries, bytes)

CREATE TRIGGER added AFTER INSERT ON entries BEGIN
INSERT INTO totals VALUES (NEW.namespace, 1, NEW.bytes), ('', 1, NEW.bytes)
ON CONFLICT DO UPDATE SET entries = entries + 1, bytes = bytes + excluded.bytes; END

CREATE TRIGGER removed AFTER DELETE ON entries BEGIN
UPDATE totals SET entries = entries - 1, bytes = bytes - OLD.bytes WHERE namespace IN (OLD.namespace, ''); END
"""  # of the totals '' is the whole store's


def ranked(db: sqlite3.Connection, namespace: str) -> Iterator[tuple[str, int, float]]:
    """Who may be evicted: the expired first, then by score and last use."""
    among, scope = ("namespace = ? AND", (namespace,)) if namespace else ("", ())
    select, now = "SELECT key, bytes, score FROM entries", time.time()
    expired = db.execute(f"{select} INDEXED BY by_expiry WHERE {among} pinned = 0 AND expires <= ?", (*scope, now))
    rest = db.execute(f"{select} WHERE {among} pinned = 0 ORDER BY score, used", scope)
    yield from itertools.chain(expired, rest)


def held(db: sqlite3.Connection, namespace: str) -> tuple[int, int]:
    """Documents and bytes of a namespace, of the whole store for ''."""
    query = "SELECT entries, bytes FROM totals WHERE namespace = ?"
    return db.execute(query, (namespace,)).fetchone() or (0, 0)


def counter(db: sqlite3.Connection, name: str) -> Any:
    """One of the numbers that the catalogue keeps; 0 before it was set."""
    row = db.execute("SELECT value FROM counters WHERE name = ?", (name,)).fetchone()
    return row[0] if row else 0


def set_counter(db: sqlite3.Connection, name: str, value: object) -> None:
    """Set one of the numbers that the catalogue keeps."""
    db.execute("INSERT OR REPLACE INTO counters VALUES (?, ?)", (name, value))


def entries(db: sqlite3.Connection, condition: str = "TRUE", *values: object) -> dict[str, Entry]:
    """Documents by key, all or those of an SQL condition. Raises sqlite3.DatabaseError for a row that is none."""
    try:
        query = f"SELECT {', '.join(COLUMNS)} FROM entries WHERE {condition}"
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in db.execute(query, values)]
        made = [Entry(**{**r, "pinned": bool(r["pinned"]), "fields": json.loads(r["fields"])}) for r in rows]
    except (ValueError, TypeError) as error:
        raise sqlite3.DatabaseError(f"an entry is malformed: {error}") from error
    return {entry.key: entry for entry in made}

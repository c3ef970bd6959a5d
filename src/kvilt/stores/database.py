"""A SQLite file that may vanish, be damaged or be unwritable at any time, because it can be built anew.

Opening, building and discarding happen under a file lock, so that processes never undo each other's work.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from kvilt.errors import StoreUnavailable

T = TypeVar("T")
log = logging.getLogger("kvilt")

_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_FORMAT}
_inherited: list[sqlite3.Connection] = []  # a forked child must neither use nor close its parent's connections


class Database:
    """One connection, shared by threads. `build` fills an empty database, `prepare` readies every connection."""

    def __init__(
        self,
        path: Path,
        version: int,
        build: Callable[[sqlite3.Connection], None],
        prepare: Callable[[sqlite3.Connection], None],
    ) -> None:
        self._path = path
        self._version = version
        self._build = build
        self._prepare = prepare
        self._db: sqlite3.Connection | None = None
        self._opened: tuple[int, int] = (0, 0)  # process, inode; inode 0 is memory
        self.lock = threading.RLock()

    def run(self, work: Callable[[sqlite3.Connection], T], write: bool = False) -> T:
        """Do `work` in one transaction, over a rebuilt database if this one is damaged. Raises StoreUnavailable."""
        with self.lock:
            try:
                return self._transact(work, write)
            except (sqlite3.DatabaseError, ValueError, TypeError) as error:
                if not _is_damage(error):
                    raise StoreUnavailable(f"the index {self._path} cannot be used: {error}.") from error
                log.warning("the index %s is damaged (%s); rebuilding it from the files", self._path, error)
                self._discard()
            try:
                return self._transact(work, write)
            except sqlite3.DatabaseError as error:
                raise StoreUnavailable(f"the index {self._path} cannot be used: {error}.") from error

    def close(self) -> None:
        """Close the connection; the next `run` opens it again."""
        with self.lock:
            if self._db is not None:
                if self._opened[0] == os.getpid():
                    self._db.close()
                else:
                    _inherited.append(self._db)
            self._db = None

    def _transact(self, work: Callable[[sqlite3.Connection], T], write: bool) -> T:
        db = self._connection()
        db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
        try:
            result = work(db)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        return result

    def _connection(self) -> sqlite3.Connection:
        inode = self._opened[1] and _inode(self._path)
        if self._db is None or self._opened != (os.getpid(), inode):
            self.close()
            self._db = self._open()
        return self._db

    def _open(self) -> sqlite3.Connection:
        try:
            with _locked(self._path.with_suffix(".lock")):
                db = self._open_file()
                self._opened = (os.getpid(), _inode(self._path))
                return db
        except (sqlite3.DatabaseError, OSError) as error:
            log.info("the index %s cannot be written (%s); using one in memory", self._path, error)
        self._opened = (os.getpid(), 0)
        db = _connect(":memory:")
        self._create(db)
        self._prepare(db)
        return db

    def _open_file(self) -> sqlite3.Connection:
        try:
            return self._open_version()
        except (sqlite3.DatabaseError, ValueError, TypeError) as error:
            if not _is_damage(error):
                raise
            log.warning("the index %s cannot be read (%s); rebuilding it from the files", self._path, error)
            self._unlink()
            return self._open_version()

    def _open_version(self) -> sqlite3.Connection:
        if not self._path.exists():
            self._unlink()  # a journal without its database
        db = _connect(str(self._path))
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")  # no sync per commit; losing the last ones loses nothing
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0 and db.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()[0] == 0:
                log.info("building the index %s from the files", self._path)
                self._create(db)
            elif version != self._version:
                raise ValueError(f"its version is {version}, not {self._version}")
            self._prepare(db)
        except BaseException:
            db.close()
            raise
        return db

    def _create(self, db: sqlite3.Connection) -> None:
        """All or nothing: a process that dies here leaves an empty database."""
        db.execute("BEGIN IMMEDIATE")
        self._build(db)
        db.execute(f"PRAGMA user_version = {self._version}")
        db.execute("COMMIT")

    def _discard(self) -> None:
        inode = self._opened[1]
        self.close()
        with contextlib.suppress(OSError), _locked(self._path.with_suffix(".lock")):
            if inode and _inode(self._path) == inode:  # otherwise somebody else was faster
                self._unlink()

    def _unlink(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self._path}{suffix}").unlink(missing_ok=True)


def _connect(path: str) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)


def _is_damage(error: Exception) -> bool:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in _DAMAGE


def _inode(path: Path) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return -1


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

"""A SQLite database that may vanish, be damaged or be locked at any time, because it can be built anew.

Nobody waits long for another process: who reads a moment, who writes a few seconds, and then they are told.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import stat
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, TypeVar

from kvilt.errors import StoreUnavailable

T = TypeVar("T")
log = logging.getLogger("kvilt")

PATIENCE, MOMENT = 5.0, 0.1  # seconds that writing and reading wait for other processes
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_FORMAT}


class Damage(sqlite3.DatabaseError):
    """What is written there is not what we write."""

    sqlite_errorcode = sqlite3.SQLITE_CORRUPT


class Database(ABC):
    """One connection, shared by threads, to a file or (`path` None, or a file that cannot be used) to memory."""

    version: ClassVar[int]
    _inherited: ClassVar[list[sqlite3.Connection | None]] = []  # a forked child neither uses nor closes its parent's

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._db: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None  # device and inode of what is open; None: memory
        self._patience = PATIENCE
        self._pid = os.getpid()
        self._lock = threading.RLock()  # never held while waiting for another process

    @abstractmethod
    def build(self, db: sqlite3.Connection) -> None:
        """Fill an empty database."""

    def write(self, work: Callable[[sqlite3.Connection], T], patience: float = PATIENCE) -> T:
        """Do `work` alone. Raises StoreUnavailable when another process does not let us."""
        return self._run(work, "BEGIN EXCLUSIVE", patience)  # so that COMMIT cannot fail for somebody who reads

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do `work`, which changes nothing. Raises StoreUnavailable when another process does not let us."""
        return self._run(work, "BEGIN", MOMENT)

    def disconnect(self) -> None:
        """Close the connection; the next use opens it again."""
        self.after_fork()
        with self._lock:
            if self._db is not None:
                self._db.close()
            self._db = None

    def after_fork(self) -> bool:
        """Whether this is a child: a thread of the parent may have held the lock, or been in the middle of a statement."""
        forked = self._pid != os.getpid()
        if forked:
            self._inherited.append(self._db)
            self._pid, self._lock, self._db = os.getpid(), threading.RLock(), None
        return forked

    def _run(self, work: Callable[[sqlite3.Connection], T], begin: str, patience: float) -> T:
        until = time.monotonic() + min(patience, self._patience)
        while True:
            try:
                result = self._attempt(work, begin)
            except sqlite3.Error as busy:
                if time.monotonic() >= until:
                    self._patience = 0.0  # until it is free again, everybody else is told at once
                    what = f"another process holds {self.path} and does not let go"
                    raise StoreUnavailable(f"{what}: end it, or wait until it is done.") from busy
                time.sleep(0.005)
            else:
                self._patience = PATIENCE
                return result

    def _attempt(self, work: Callable[[sqlite3.Connection], T], begin: str, again: bool = False) -> T:
        """Do `work` in a transaction, over a database built anew if this one is damaged. Raises sqlite3.Error if busy."""
        self.after_fork()
        with self._lock:
            try:
                with _transaction(self._connection(), begin) as db:
                    return work(db)
            except sqlite3.Error as error:
                if _code(error) in _BUSY:
                    raise
                self.disconnect()
                if again or self.path is None or self._file is None or _code(error) not in _DAMAGE:
                    raise StoreUnavailable(f"the catalogue {self.path} cannot be used: {error}.") from error
                log.warning("the catalogue %s is damaged (%s); it is built anew", self.path, error)
                with contextlib.suppress(OSError):
                    self.path.unlink()
            return self._attempt(work, begin, again=True)

    def _connection(self) -> sqlite3.Connection:
        if self.path is not None and self._file is not None and self._file != _inode(self.path):
            self.disconnect()  # it was deleted
        self._db = self._db or self._open()
        return self._db

    def _open(self) -> sqlite3.Connection:
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                for name in (self.path, f"{self.path}-journal"):  # SQLite would follow a link, and write where it leads
                    if os.path.lexists(name) and not stat.S_ISREG(os.lstat(name).st_mode):
                        raise OSError(f"{name} is not a regular file")
                self._file = _inode(self.path)
                db = self._ready(str(self.path))
                self._file = _inode(self.path)
                return db
            except (sqlite3.Error, OSError) as error:
                if _code(error) in _BUSY | _DAMAGE:
                    raise
                log.info("the catalogue %s cannot be used (%s); this process keeps one in memory", self.path, error)
        self._file = None
        return self._ready(":memory:")

    def _ready(self, name: str) -> sqlite3.Connection:
        db = sqlite3.connect(name, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA synchronous = OFF")  # what a power failure damages is built anew
            if _version(db) > self.version:
                raise OSError("it is a newer Kvilt's")
            if _version(db) != self.version:
                with _transaction(db, "BEGIN EXCLUSIVE"):
                    if _version(db) != self.version:  # nobody was faster
                        if db.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()[0]:
                            raise Damage(f"its version is {_version(db)}, not {self.version}")
                        self.build(db)
                        db.execute(f"PRAGMA user_version = {self.version}")
        except BaseException:
            db.close()
            raise
        return db


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection, begin: str) -> Iterator[sqlite3.Connection]:
    db.execute(begin)
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _code(error: Exception) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CANTOPEN) & 0xFF


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_dev, state.st_ino

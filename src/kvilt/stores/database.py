"""A SQLite database that may vanish, be damaged or be locked at any time, because it can be built anew.

Nobody waits long for another process: who reads a moment, who writes a few seconds, and then they are told.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import sqlite3
import stat
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, TypeVar

from kvilt.errors import StoreUnavailable

T = TypeVar("T")
log = logging.getLogger("kvilt")

RETRY = 600.0  # seconds after which a file that could not be used is tried again
MOMENT = 0.2  # seconds that reading waits for other processes
_NAMES = "", "-writing", "-journal"
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_FORMAT}


class Database(ABC):
    """One connection, shared by threads, to a file or (`path` None, or a file that cannot be used) to memory."""

    version: ClassVar[int]
    patience: ClassVar[float] = 5.0  # seconds that writing waits for other processes
    _inherited: ClassVar[list[sqlite3.Connection | None]] = []  # a forked child neither uses nor closes its parent's

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._db: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None  # device and inode of what is open; None: memory
        self._mark: str | None = None  # the name of a file that is there while the database is written; None: memory
        self._retry = 0.0
        self._stuck = False
        self._pid = os.getpid()
        self._lock = threading.RLock()
        _locks.add(self._lock)
        _guard_forks()

    @abstractmethod
    def build(self, db: sqlite3.Connection) -> None:
        """Fill an empty database."""

    def write(self, work: Callable[[sqlite3.Connection], T], patience: float | None = None) -> T:
        """Do `work` alone. Raises StoreUnavailable when another process does not let us."""
        patience = self.patience if patience is None else patience
        made = self._run(work, True, 0.0 if self._stuck else patience)
        self._stuck = False
        return made

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do `work`, which changes nothing. Raises StoreUnavailable when another process does not let us."""
        return self._run(work, False, MOMENT)

    def disconnect(self) -> None:
        """Close the connection; the next use opens it again."""
        self._after_fork()
        with self._lock:
            if self._db is not None:
                self._db.close()
            self._db = None

    def _after_fork(self) -> None:
        """A child may not use the connection to a file that it inherited."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._inherited.append(self._db)
            self._db = self._db if self._file is None else None

    def _run(self, work: Callable[[sqlite3.Connection], T], write: bool, patience: float) -> T:
        until = time.monotonic() + patience
        while True:
            try:
                return self._attempt(work, write)
            except sqlite3.Error as busy:
                if time.monotonic() >= until:
                    self._stuck |= patience >= self.patience  # who waited for nothing tells all others at once
                    what = f"another process holds {self.path} and does not let go: end it, or wait for it."
                    raise StoreUnavailable(what) from busy
            time.sleep(random.uniform(0.0, 0.005))

    def _attempt(self, work: Callable[[sqlite3.Connection], T], write: bool, again: bool = False) -> T:
        """Do `work` in a transaction, over a database built anew if this one is damaged. Raises sqlite3.Error if busy."""
        self._after_fork()
        with self._lock:
            try:
                with self._transaction(self._connection(), write) as db:
                    return work(db)
            except (sqlite3.Error, OSError) as error:
                if _code(error) in _BUSY:
                    raise
                self.disconnect()
                if again or self._mark is None or _code(error) not in _DAMAGE:
                    raise StoreUnavailable(f"the catalogue {self.path} cannot be used: {error}.") from error
                log.warning("the catalogue %s is damaged (%s); it is built anew", self.path, error)
                for name in _NAMES:
                    with contextlib.suppress(OSError):
                        os.unlink(f"{self.path}{name}")
            return self._attempt(work, write, again=True)

    @contextlib.contextmanager
    def _transaction(self, db: sqlite3.Connection, write: bool) -> Iterator[sqlite3.Connection]:
        """Alone in it, if one writes. A writer that dies leaves its mark, and the database is built anew.

        A journal would do that sooner, but its name is that of the file, and so it spoils a new file of the same name."""
        mark = self._mark
        try:
            if write:
                db.execute("PRAGMA locking_mode = EXCLUSIVE")  # the lock is held until the mark is gone
            db.execute("BEGIN EXCLUSIVE" if write else "BEGIN")
            _version(db)  # takes the lock for reading
            if mark and os.path.lexists(mark):
                raise sqlite3.DatabaseError("a process died while it wrote")
            with contextlib.ExitStack() as stack:
                if mark and write:
                    os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
                    stack.callback(lambda: Path(mark).unlink(missing_ok=True))
                yield db
                db.execute("COMMIT")
        finally:
            with contextlib.suppress(sqlite3.Error):
                if db.in_transaction:
                    db.execute("ROLLBACK")
                if write:
                    db.execute("PRAGMA locking_mode = NORMAL")
                    _version(db)  # lets go of the lock

    def _connection(self) -> sqlite3.Connection:
        deleted = self.path is not None and self._file is not None and self._file != _inode(self.path)
        if deleted or (self.path is not None and self._file is None and time.monotonic() > self._retry):
            self.disconnect()
        self._db = self._db or self._open()
        return self._db

    def _open(self) -> sqlite3.Connection:
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                for name in (f"{self.path}{name}" for name in _NAMES):  # SQLite would follow a link, and write there
                    if os.path.lexists(name) and not stat.S_ISREG(os.lstat(name).st_mode):
                        raise OSError(f"{name} is not a regular file")
                self._mark = f"{self.path}{_NAMES[1]}"
                db = self._ready(str(self.path))
                self._file = _inode(self.path)
                return db
            except (sqlite3.Error, OSError) as error:
                if _code(error) in _BUSY | _DAMAGE:
                    raise
                log.info("the catalogue %s cannot be used (%s); this process keeps one in memory", self.path, error)
        self._file, self._mark, self._retry = None, None, time.monotonic() + RETRY
        return self._ready(":memory:")

    def _ready(self, name: str) -> sqlite3.Connection:
        db = sqlite3.connect(name, timeout=0.02, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA synchronous = OFF")  # what a power failure damages is built anew
            db.execute("PRAGMA journal_mode = MEMORY")
            db.execute("PRAGMA cache_size = -32768")  # kB, where there is so much to hold
            if _version(db) > self.version:
                raise OSError("it is a newer Kvilt's")
            if _version(db) != self.version:
                with self._transaction(db, write=True):
                    if _version(db) != self.version:  # nobody was faster
                        self.build(db)
                        db.execute(f"PRAGMA user_version = {self.version}")
        except BaseException:
            db.close()
            raise
        return db


_locks: weakref.WeakSet[threading.RLock] = weakref.WeakSet()


@functools.cache
def _guard_forks() -> None:
    """No fork in the middle of a transaction: SQLite in the child would take it for one of its own, for ever."""
    held: list[threading.RLock] = []

    def before() -> None:
        held[:] = _locks
        for lock in held:
            lock.acquire()

    def after() -> None:
        for lock in held:
            lock.release()

    os.register_at_fork(before=before, after_in_parent=after, after_in_child=after)


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _code(error: Exception) -> int:
    unusable = isinstance(error, OSError) and not isinstance(error, FileExistsError)
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CANTOPEN if unusable else sqlite3.SQLITE_CORRUPT) & 0xFF


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_dev, state.st_ino

"""A SQLite database that may vanish, be damaged or be locked at any time, because it can be built anew.

Whoever reads never waits for another process; whoever writes waits a few seconds, and then says so.
"""

from __future__ import annotations

import contextlib
import fcntl
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

PATIENCE = 5.0  # seconds that a write waits for other processes
RETRY = 60.0  # seconds after which a file that could not be used is tried again
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_FORMAT}
_FILES = ("", "-wal", "-shm", "-journal")


class Damage(sqlite3.DatabaseError):
    """What is written there is not what we write."""

    sqlite_errorcode = sqlite3.SQLITE_CORRUPT


class _Busy(sqlite3.OperationalError):
    """Another process is writing."""

    sqlite_errorcode = sqlite3.SQLITE_BUSY


class Database(ABC):
    """One connection, shared by threads, to a file or (`path` None, or a file that cannot be used) to memory."""

    version: ClassVar[int]
    _inherited: ClassVar[list[sqlite3.Connection]] = []  # a forked child neither uses nor closes its parent's

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None  # device and inode of the open file; None is memory
        self._retry = 0.0
        self._patience = PATIENCE
        self._pid = os.getpid()
        self._lock = threading.RLock()  # never held while waiting for another process

    @abstractmethod
    def build(self, db: sqlite3.Connection) -> None:
        """Fill an empty database."""

    @abstractmethod
    def prepare(self, db: sqlite3.Connection) -> None:
        """Ready a connection."""

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do `work` on what was last written, without waiting for other processes. Raises StoreUnavailable."""
        try:
            return self._run(work, "BEGIN")
        except _Busy as busy:
            raise StoreUnavailable(f"{self._path} is locked by another process.") from busy

    def write(self, work: Callable[[sqlite3.Connection], T], patience: float | None = None) -> T:
        """Do `work` alone, after waiting at most so many seconds. Raises StoreUnavailable."""
        until = time.monotonic() + (self._patience if patience is None else patience)
        while True:
            try:
                result = self._run(work, "BEGIN IMMEDIATE")
            except _Busy as busy:
                if time.monotonic() >= until:
                    self._patience = 0.0  # until it is free again, every next write says so at once
                    what = f"another process has been writing to {self._path} for {PATIENCE:.0f} seconds"
                    raise StoreUnavailable(f"{what}: end it, or wait until it is done.") from busy
                time.sleep(0.01)
            else:
                self._patience = PATIENCE
                return result

    def close(self) -> None:
        """Close the connection; the next use opens it again."""
        self._after_fork()
        with self._lock:
            if self._db is not None:
                self._db.close()
            self._db = None

    def _after_fork(self) -> None:
        """In a child: another thread of the parent may have held the lock, or been in the middle of a statement."""
        if self._pid != os.getpid():
            self._pid, self._lock = os.getpid(), threading.RLock()
            if self._db is not None:
                self._inherited.append(self._db)
            self._db = None

    def _run(self, work: Callable[[sqlite3.Connection], T], begin: str) -> T:
        self._after_fork()
        with self._lock:
            try:
                return self._transact(work, begin)
            except sqlite3.Error as error:
                if _code(error) not in _DAMAGE:
                    raise self._passing(error) from error
                log.warning("the catalogue %s is damaged (%s); it is built anew", self._path, error)
                self._discard()
            try:
                return self._transact(work, begin)
            except sqlite3.Error as error:
                raise self._passing(error) from error

    def _passing(self, error: sqlite3.Error) -> Exception:
        if _code(error) in _BUSY:
            return _Busy()
        self.close()
        return StoreUnavailable(f"the catalogue {self._path} cannot be used: {error}.")

    def _transact(self, work: Callable[[sqlite3.Connection], T], begin: str) -> T:
        db = self._connection()
        db.execute(begin)
        try:
            result = work(db)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        return result

    def _connection(self) -> sqlite3.Connection:
        if self._db is not None and self._path is not None:
            vanished = self._file is not None and self._file != _inode(self._path)
            if vanished or (self._file is None and time.monotonic() > self._retry):
                self.close()
        if self._db is None:
            self._db = self._open()
        return self._db

    def _open(self) -> sqlite3.Connection:
        if self._path is not None:
            try:
                return self._open_file(self._path)
            except (sqlite3.Error, OSError) as error:
                if _code(error) in _BUSY | _DAMAGE:
                    raise
                log.info("the catalogue %s cannot be used (%s); this process keeps one in memory", self._path, error)
        self._file, self._retry = None, time.monotonic() + RETRY
        return self._ready(_connect(":memory:"))

    def _open_file(self, path: Path) -> sqlite3.Connection:
        for suffix in _FILES:  # SQLite would follow a link, and write to whatever it leads to
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISREG(os.lstat(f"{path}{suffix}").st_mode):
                    raise OSError(f"{path.name}{suffix} is not a regular file")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._alone(path.parent):
                if not path.exists():
                    self._unlink(path)  # a journal without its database would be played back into the new one
                    path.touch(exist_ok=False)
        db = _connect(str(path))
        self._file = _inode(path)
        return self._ready(db)

    def _ready(self, db: sqlite3.Connection) -> sqlite3.Connection:
        try:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > self.version:
                raise OSError(f"it is a newer Kvilt's: version {version}, not {self.version}")
            if version < self.version and db.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()[0]:
                raise Damage(f"its version is {version}, not {self.version}")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")  # no sync per commit; losing the last ones loses nothing
            self.prepare(db)
            if version == 0:
                db.execute("BEGIN IMMEDIATE")
                if db.execute("PRAGMA user_version").fetchone()[0] == 0:  # nobody was faster
                    self.build(db)
                    db.execute(f"PRAGMA user_version = {self.version}")
                db.execute("COMMIT")
        except BaseException:
            db.close()
            raise
        return db

    def _discard(self) -> None:
        file = self._file
        self.close()
        if self._path is not None and file is not None:
            with contextlib.suppress(OSError), self._alone(self._path.parent):
                if _inode(self._path) == file:  # otherwise somebody else was faster
                    self._unlink(self._path)

    @staticmethod
    @contextlib.contextmanager
    def _alone(folder: Path) -> Iterator[None]:
        """Of all processes this one makes or discards the file."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise _Busy from error
            yield
        finally:
            os.close(fd)

    @staticmethod
    def _unlink(path: Path) -> None:
        for suffix in _FILES:
            Path(f"{path}{suffix}").unlink(missing_ok=True)


def _connect(path: str) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)


def _code(error: Exception) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CANTOPEN) & 0xFF


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_dev, state.st_ino

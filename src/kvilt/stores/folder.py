"""Blobs as files in a folder, shared by any number of processes.

    ab/abcdef...safetensors   a document, under the first two digits of its key
    ab/abcdef...pin           an empty file while the document is pinned
    aside/                    damaged files, each with a .reason
    catalogue.sqlite          can be deleted at any time

The folder is not trusted: no link in it is followed, and nothing but regular files is opened.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import os
import re
import resource
import secrets
import stat
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from kvilt.errors import StoreUnavailable
from kvilt.stores.blobs import Blob, Blobs, BlobStore, check_key, is_key

log = logging.getLogger("kvilt")

ASIDE_SECONDS = 86400.0
PIECES = 1024  # buffers that one call may fill
_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not make anybody wait
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_ADVICE = {
    "Free space there, or give the store a smaller budget or another path.": (errno.ENOSPC, errno.EDQUOT),
    "Files may not grow that large here: raise the limit (ulimit -f) or give another path.": (errno.EFBIG,),
    "Raise this process's limit of open files (ulimit -n).": (errno.EMFILE, errno.ENFILE),
    "It is read-only: stored documents are served, new ones need another path.": (errno.EROFS,),
    "Change its permissions, or give another path.": (errno.EACCES, errno.EPERM),
}


class DiskBlobs(BlobStore):
    """Blobs as files in a folder, which is made where it is not there."""

    def __init__(self, path: Path, suffix: str = ".safetensors") -> None:
        self.path, self.suffix = path, suffix

    def get_many(self, keys: Sequence[str]) -> Blobs:
        return [self._get(*place) for place in [self._place(key) for key in keys]]

    def put(self, key: str, data: Sequence[memoryview]) -> bool:
        folder, name = self._place(key)
        with trouble("cannot write to the store", self.path):
            for _ in range(2):  # again if its folder was deleted meanwhile
                with contextlib.suppress(FileNotFoundError), opened(folder, make=True) as fd:
                    return create(fd, name, data)
            raise FileNotFoundError(errno.ENOENT, "its folder is deleted again and again")

    def delete(self, key: str) -> bool:
        folder, name = self._place(key)
        with trouble("cannot delete from the store", self.path), contextlib.suppress(FileNotFoundError):
            with opened(folder) as fd:
                os.unlink(name, dir_fd=fd)
            return True
        return False

    def list(self) -> Iterator[tuple[str, int]]:
        for shard, fd in self._shards("[0-9a-f]{2}"):
            with os.scandir(fd) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    key, dot, suffix = entry.name.partition(".")
                    mine = dot + suffix == self.suffix and is_key(key) and key.startswith(shard)
                    with contextlib.suppress(FileNotFoundError):
                        if mine and entry.is_file(follow_symlinks=False):
                            yield key, entry.stat(follow_symlinks=False).st_size

    def contains(self, keys: Iterable[str]) -> set[str]:
        there = set()
        for key in keys:
            folder, name = self._place(key)
            with contextlib.suppress(OSError), opened(folder) as fd:
                there |= {key} if is_file(fd, name) else set()
        return there

    def set_aside(self, key: str, reason: str) -> bool:
        folder, name = self._place(key)
        target = f"{key}-{time.time_ns()}"
        with trouble("cannot set aside a document of the store", self.path), contextlib.suppress(FileNotFoundError):
            with opened(folder) as fd:
                os.stat(name, dir_fd=fd, follow_symlinks=False)  # no folder for nothing
                with opened(self.path / "aside", make=True) as aside:
                    os.rename(name, target + self.suffix, src_dir_fd=fd, dst_dir_fd=aside)
                    with contextlib.suppress(OSError):  # a full disk must not keep a damaged file in service
                        os.utime(target + self.suffix, dir_fd=aside, follow_symlinks=False)  # its day begins now
                        create(aside, target + ".reason", [memoryview(f"{reason}\n".encode(errors="replace"))])
            return True
        return False

    def sweep(self) -> int:
        freed = 0
        with trouble("cannot clean the store", self.path):
            for shard, fd in self._shards("[0-9a-f]{2}|aside"):
                for name in os.listdir(fd):
                    with contextlib.suppress(FileNotFoundError):
                        state = os.stat(name, dir_fd=fd, follow_symlinks=False)
                        old = shard == "aside" and time.time() - state.st_mtime > ASIDE_SECONDS
                        if old or is_abandoned(fd, name):
                            os.unlink(name, dir_fd=fd)
                            freed += state.st_size
        return freed

    def _place(self, key: str) -> tuple[Path, str]:
        key = key if isinstance(key, str) and is_key(key) else check_key(key)
        return self.path / key[:2], key + self.suffix

    def _get(self, folder: Path, name: str) -> Blob | None:
        try:
            return FileBlob(folder, name)
        except OSError as error:  # passing, perhaps: a miss
            if error.errno in (errno.EMFILE, errno.ENFILE):
                too_many_open()
            elif error.errno != errno.ENOENT:
                log.warning("cannot read stored document %s: %s", name[:16], error.strerror)
            return None

    def _shards(self, pattern: str) -> Iterator[tuple[str, int]]:
        """Names and descriptors of the store's own folders, one after another."""
        with trouble("cannot list the store", self.path):
            for name in sorted(os.listdir(self.path) if self.path.is_dir() else []):
                if re.fullmatch(pattern, name):
                    with contextlib.suppress(FileNotFoundError, NotADirectoryError), opened(self.path / name) as fd:
                        yield name, fd


@contextlib.contextmanager
def trouble(what: str, path: Path) -> Iterator[None]:
    """Failures of the system become StoreUnavailable: what failed, where, why, and what helps."""
    try:
        yield
    except OSError as error:
        known = (text for text, codes in _ADVICE.items() if error.errno in codes)
        advice = next(known, "Check the path, or give another.")
        raise StoreUnavailable(f"{what} at {path}: {error.strerror or error}. {advice}") from error


@contextlib.contextmanager
def opened(path: Path, make: bool = False) -> Iterator[int]:
    """A descriptor of a folder, made first if need be. Raises OSError, for a link too."""
    if make:
        path.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _SAFE)
    try:
        yield fd
    finally:
        os.close(fd)


def is_file(folder: int, name: str) -> bool:
    """Whether there is a regular file of that name. Raises OSError if something else has the name."""
    try:
        regular = stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False
    if not regular:
        raise OSError(errno.EEXIST, f"{name} is not a regular file")
    return True


def create(folder: int, name: str, data: Sequence[memoryview]) -> bool:
    """Write a file so that it is there completely or not at all; False if it was there. Raises OSError."""
    if is_file(folder, name):
        return False
    temporary = f".{name[:16]}.{secrets.token_hex(8)}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE, 0o666, dir_fd=folder)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # shows `is_abandoned` that its writer lives
        for piece in data:
            while piece:
                piece = piece[os.write(fd, piece) :]
        os.fsync(fd)
        os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)  # a second writer brings the same bytes
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
        os.close(fd)
    return True


def is_abandoned(folder: int, name: str) -> bool:
    """Whether a file is a temporary one whose writer is gone."""
    if name.startswith(".") and name.endswith(".tmp"):
        with contextlib.suppress(OSError), _file(folder, name) as (fd, state):
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return state.st_size > 0 or time.time() - state.st_mtime > 60  # a new one is not locked yet
    return False


@contextlib.contextmanager
def _file(folder: int, name: str) -> Iterator[tuple[int, os.stat_result]]:
    """A descriptor of a regular file, for reading, and its state. Raises OSError."""
    fd = os.open(name, os.O_RDONLY | _SAFE, dir_fd=folder)
    try:
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode):
            raise OSError(errno.EINVAL, f"{name} is not a regular file")
        yield fd, state
    finally:
        os.close(fd)


_held: weakref.WeakSet[FileBlob] = (
    weakref.WeakSet()
)  # files kept open: most of what this process may open, not all of it


@functools.cache
def too_many_open() -> None:
    """Say once what to do about it."""
    what = "So many documents are in use that each further one is opened anew for every read"
    log.warning("%s. Raise this process's limit of open files (ulimit -n).", what)


class FileBlob:
    """A file that stays open while it is referred to: whoever opened it reads it to the end, also when it is evicted."""

    _fd: int | None = None
    _release: Callable[[], object] = bool  # a finalizer: when Python ends, modules are gone before the last objects are

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        with self._open() as (fd, state):
            self.size, self.identity = state.st_size, _identity(state)
            if len(_held) < resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 3 // 4:
                self._fd = os.dup(fd)
                self._release = weakref.finalize(self, os.close, self._fd)
                _held.add(self)
            else:
                too_many_open()

    def read(self, offset: int, into: Sequence[memoryview]) -> None:
        """Read from `offset` on straight into all of `into`. Raises OSError, EOFError."""
        if self._fd is not None:
            return _fill(self._fd, offset, into)
        with self._open() as (fd, state):
            if _identity(state) != self.identity:
                raise OSError(errno.ESTALE, "it was replaced since it was opened")
            return _fill(fd, offset, into)

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        self._fd = None
        _held.discard(self)
        self._release()

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[int, os.stat_result]]:
        with opened(self._folder) as folder, _file(folder, self._name) as (fd, state):
            yield fd, state


def _identity(state: os.stat_result) -> tuple[int, ...]:
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _fill(fd: int, offset: int, into: Sequence[memoryview]) -> None:
    pieces = [piece for piece in into if piece]
    first = 0
    while first < len(pieces):
        done = os.preadv(fd, pieces[first : first + PIECES], offset)
        if not done:
            raise EOFError("the file is cut off")
        offset += done
        while first < len(pieces) and done >= len(pieces[first]):
            done -= len(pieces[first])
            first += 1
        if done:
            pieces[first] = pieces[first][done:]

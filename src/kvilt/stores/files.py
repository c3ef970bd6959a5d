"""Files of a folder that is not trusted: no link in it is followed, and nothing but regular files is opened."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import os
import resource
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvilt.errors import StoreUnavailable

log = logging.getLogger("kvilt")

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


def unavailable(error: OSError, what: str, path: Path) -> StoreUnavailable:
    """What an operation on a store's folder failed for, and what to do about it."""
    advice = next(
        (advice for advice, codes in _ADVICE.items() if error.errno in codes), "Check the path, or give another."
    )
    return StoreUnavailable(f"{what} at {path}: {error.strerror or error}. {advice}")


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


_held: set[int] = set()  # descriptors that blobs keep open: most of what this process may open, but not all of it


@functools.cache
def too_many_open() -> None:
    """Say once what to do about it."""
    what = "So many documents are in use that each further one is opened anew for every read"
    log.warning("%s. Raise this process's limit of open files (ulimit -n).", what)


class FileBlob:
    """A file that stays open while it is referred to: whoever opened it reads it to the end, also when it is evicted."""

    _fd: int | None = None

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        with self._open() as (fd, state):
            self.size, self.identity = state.st_size, _identity(state)
            if len(_held) < resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 3 // 4:
                self._fd = os.dup(fd)
                _held.add(self._fd)
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
        fd, self._fd = self._fd, None
        if fd is not None:
            _held.discard(fd)
            os.close(fd)

    __del__ = close

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

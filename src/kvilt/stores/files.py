"""Files of a folder that is not trusted: no link in it is followed, and nothing but regular files is opened."""

from __future__ import annotations

import contextlib
import errno
import fcntl
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
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a FIFO must not make anybody wait
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_SPACE = "Free space there, or give the store a smaller budget or another path."
_ADVICE = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "Files may not grow that large here: raise the limit (ulimit -f) or give another path.",
    errno.EMFILE: "Raise this process's limit of open files (ulimit -n).",
    errno.EROFS: "It is read-only: stored documents are served, new ones need another path.",
    errno.EACCES: "Change its permissions, or give another path.",
    errno.EPERM: "Change its permissions, or give another path.",
}


def unavailable(error: OSError, what: str, path: Path) -> StoreUnavailable:
    """What an operation on a store's folder failed for, and what to do about it."""
    advice = _ADVICE.get(error.errno or 0, "Check the path, or give another.")
    return StoreUnavailable(f"{what} at {path}: {error.strerror or error}. {advice}")


@contextlib.contextmanager
def opened(root: Path, name: str, make: bool = False) -> Iterator[int]:
    """A descriptor of one of the folder's own folders, made first if need be. Raises OSError, for a link too."""
    path, flags = root / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        if not make:
            raise
        path.mkdir(parents=True, exist_ok=True)
        sync(root)
        fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def sync(path: Path | int) -> None:
    """Make the names in a folder durable; some file systems cannot, and need not."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if isinstance(path, Path) else path
    with contextlib.suppress(OSError):
        os.fsync(fd)
    if isinstance(path, Path):
        os.close(fd)


def is_file(folder: int, name: str) -> bool:
    """Whether there is a regular file of that name. Raises OSError if something else has the name."""
    try:
        state = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EEXIST, f"{name} is not a regular file")
    return True


def create(folder: int, name: str, data: Sequence[memoryview]) -> bool:
    """Write a file so that it is there completely or not at all; False if it was there. Raises OSError."""
    if is_file(folder, name):
        return False
    temporary = f".{name[:16]}.{secrets.token_hex(8)}.tmp"
    fd = os.open(temporary, _NEW, 0o666, dir_fd=folder)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # shows `is_abandoned` that its writer lives
        for piece in data:
            while piece:
                piece = piece[os.write(fd, piece) :]
        os.fsync(fd)
        made = _publish(folder, temporary, name)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
        os.close(fd)
    sync(folder)
    return made


def _publish(folder: int, temporary: str, name: str) -> bool:
    try:
        os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)  # a second writer brings the same bytes
    return True


def is_abandoned(folder: int, name: str) -> bool:
    """Whether a file is a temporary one whose writer is gone."""
    if not (name.startswith(".") and name.endswith(".tmp")):
        return False
    with contextlib.suppress(OSError):
        fd, state = open_file(folder, name)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return state.st_size > 0 or time.time() - state.st_mtime > 60  # a new one is not locked yet
        finally:
            os.close(fd)
    return False


def open_file(folder: int, name: str) -> tuple[int, os.stat_result]:
    """A descriptor of a regular file, for reading, and its state. Raises OSError."""
    fd = os.open(name, _READ, dir_fd=folder)
    state = os.fstat(fd)
    if not stat.S_ISREG(state.st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, f"{name} is not a regular file")
    return fd, state


class _OpenFiles:
    """The files that blobs keep open: most of what this process may open, but not all of it."""

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.warned = False

    def keep(self, fd: int) -> bool:
        """Whether a file may stay open."""
        if len(self.held) < resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 3 // 4:
            self.held.add(fd)
            return True
        self.warn()
        return False

    def warn(self) -> None:
        """Say once what to do about it."""
        if not self.warned:
            self.warned = True
            what = "So many documents are in use that each further one is opened anew for every read"
            log.warning("%s. Raise this process's limit of open files (ulimit -n).", what)


open_files = _OpenFiles()


class FileBlob:
    """A file that stays open while it is referred to: whoever opened it reads it to the end, also when it is evicted."""

    def __init__(self, root: Path, folder: str, name: str) -> None:
        self._place = (root, folder, name)
        fd, state = self._open()
        self.size, self.identity = state.st_size, _identity(state)
        self._fd: int | None = fd
        if not open_files.keep(fd):
            self._fd = None
            os.close(fd)

    def read(self, offset: int, into: Sequence[memoryview]) -> None:
        """Read from `offset` on straight into all of `into`. Raises OSError, EOFError."""
        if self._fd is not None:
            return _fill(self._fd, offset, into)
        fd, state = self._open()
        try:
            if _identity(state) != self.identity:
                raise OSError(errno.ESTALE, "it was replaced since it was opened")
            return _fill(fd, offset, into)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        fd, self._fd = self._fd, None
        if fd is not None:
            open_files.held.discard(fd)
            os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()

    def _open(self) -> tuple[int, os.stat_result]:
        root, folder, name = self._place
        with opened(root, folder) as fd:
            return open_file(fd, name)


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

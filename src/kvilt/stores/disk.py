"""Blobs as files in a folder, shared by any number of processes, and the store of them.

ab/abcdef...safetensors   a document, under the first two digits of its key
ab/abcdef...pin           an empty file while the document is pinned
aside/                    damaged files, each with a .reason
catalogue.sqlite          can be deleted at any time
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from kvilt.stores.blobs import Blob, Blobs, BlobStore, check_key, is_key
from kvilt.stores.catalogue import Catalogue
from kvilt.stores.files import FileBlob, create, is_abandoned, is_file, opened, too_many_open, unavailable
from kvilt.stores.sizes import parse_size
from kvilt.stores.store import Store

log = logging.getLogger("kvilt")

SHARE = 0.5  # of the disk's free space, its own documents counted as free, for a store that is given no budget
ASIDE_SECONDS = 86400.0


class DiskBlobs(BlobStore):
    """Blobs as files in a folder, which is made where it is not there."""

    def __init__(self, path: Path, suffix: str = ".safetensors") -> None:
        self.path, self.suffix = path, suffix

    def get_many(self, keys: Sequence[str]) -> Blobs:
        return [self._get(key) for key in [check_key(key) for key in keys]]

    def put(self, key: str, data: Sequence[memoryview]) -> bool:
        folder, name = self._place(key)
        with self._trouble("cannot write to the store"):
            for _ in range(2):  # again if its folder was deleted meanwhile
                with contextlib.suppress(FileNotFoundError), opened(folder, make=True) as fd:
                    return create(fd, name, data)
            raise FileNotFoundError(errno.ENOENT, "its folder is deleted again and again")

    def delete(self, key: str) -> bool:
        folder, name = self._place(key)
        with self._trouble("cannot delete from the store"), contextlib.suppress(FileNotFoundError):
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
        for folder, group in itertools.groupby(sorted(map(self._place, keys)), lambda place: place[0]):
            with contextlib.suppress(OSError), opened(folder) as fd:
                for _, name in group:
                    with contextlib.suppress(OSError):
                        there |= {name.removesuffix(self.suffix)} if is_file(fd, name) else set()
        return there

    def set_aside(self, key: str, reason: str) -> bool:
        folder, name = self._place(key)
        target = f"{key}-{time.time_ns()}"
        with self._trouble("cannot set aside a document of the store"), contextlib.suppress(FileNotFoundError):
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
        with self._trouble("cannot clean the store"):
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
        return self.path / check_key(key)[:2], key + self.suffix

    def _get(self, key: str) -> Blob | None:
        try:
            return FileBlob(*self._place(key))
        except FileNotFoundError:
            return None
        except OSError as error:  # passing, perhaps: a miss
            if error.errno in (errno.EMFILE, errno.ENFILE):
                too_many_open()
            else:
                log.warning("cannot read stored document %s: %s", key[:16], error.strerror)
            return None

    def _shards(self, pattern: str) -> Iterator[tuple[str, int]]:
        """Names and descriptors of the store's own folders, one after another."""
        with self._trouble("cannot list the store"):
            for name in sorted(os.listdir(self.path) if self.path.is_dir() else []):
                if re.fullmatch(pattern, name):
                    with contextlib.suppress(FileNotFoundError, NotADirectoryError), opened(self.path / name) as fd:
                        yield name, fd

    @contextlib.contextmanager
    def _trouble(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unavailable(error, what, self.path) from error


class DiskStore(Store):
    """Keeps documents as files: `disk:path=caches,budget=200GB,policy=lru|lfu|greedy-dual,quota=20GB`.

    Without a budget it takes half of the disk's free space, its own documents counted as free."""

    def __init__(
        self,
        path: str | None = None,
        budget: str | int | None = None,
        policy: str = "lru",
        quota: str | int | None = None,
    ) -> None:
        self.path = Path(path).expanduser() if path else default_path()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unavailable(error, "cannot make the store", self.path) from error
        limits = parse_size(budget, "budget") or functools.partial(_share, self.path), parse_size(quota, "quota")
        blobs, pins = DiskBlobs(self.path), DiskBlobs(self.path, ".pin")
        super().__init__(Catalogue(blobs, pins, self.path / "catalogue.sqlite", policy, *limits))


def default_path() -> Path:
    """The user's own store: $XDG_CACHE_HOME/kvilt/store or ~/.cache/kvilt/store."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "kvilt" / "store"


def _share(path: Path, held: int) -> int:
    with contextlib.suppress(OSError):
        return max(1, int(SHARE * (shutil.disk_usage(path).free + held)))
    return max(1, held)

"""Blobs as files in a folder, shared by any number of processes, and the store of them.

ab/abcdef...safetensors   a document, under the first two digits of its key
aside/                    damaged files, each with a .reason
pins/                     an empty file for every key that is pinned
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

from kvilt.stores.blobs import Blob, Blobs, BlobStore, check_key
from kvilt.stores.files import FileBlob, create, is_abandoned, is_file, open_files, opened, unavailable
from kvilt.stores.kept import Kept
from kvilt.stores.sizes import parse_size
from kvilt.stores.store import Store

log = logging.getLogger("kvilt")

SUFFIX = ".safetensors"
SHARE = 0.5  # of the disk's free space, its own documents counted as free, for a store that is given no budget
ASIDE_SECONDS = 86400.0
_NAME = re.compile(r"([0-9a-f]{64})\.safetensors")
_SHARD = re.compile(r"[0-9a-f]{2}")
_GONE = (FileNotFoundError, NotADirectoryError)


class DiskBlobs(BlobStore):
    """Blobs as files in a folder, which is made if it is not there. Raises StoreUnavailable where it cannot be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unavailable(error, "cannot make the store", path) from error

    def get_many(self, keys: Sequence[str]) -> Blobs:
        return [self._get(key) for key in [check_key(key) for key in keys]]

    def put(self, key: str, data: Sequence[memoryview]) -> bool:
        try:
            try:
                return self._put(check_key(key), data)
            except FileNotFoundError:  # its folder was deleted meanwhile
                return self._put(key, data)
        except OSError as error:
            raise unavailable(error, "cannot write to the store", self.path) from error

    def delete(self, key: str) -> bool:
        try:
            with opened(self.path, check_key(key)[:2]) as folder:
                os.unlink(key + SUFFIX, dir_fd=folder)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise unavailable(error, "cannot delete from the store", self.path) from error
        return True

    def list(self) -> Iterator[tuple[str, int]]:
        for shard in self._shards():
            with contextlib.suppress(*_GONE), opened(self.path, shard) as folder, os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    name = _NAME.fullmatch(entry.name)
                    if name and name[1].startswith(shard) and entry.is_file(follow_symlinks=False):
                        with contextlib.suppress(FileNotFoundError):
                            yield name[1], entry.stat(follow_symlinks=False).st_size

    def contains(self, keys: Iterable[str]) -> set[str]:
        there = set()
        for shard, group in itertools.groupby(sorted(check_key(key) for key in keys), lambda key: key[:2]):
            with contextlib.suppress(OSError), opened(self.path, shard) as folder:
                for key in group:
                    with contextlib.suppress(OSError):
                        there |= {key} if is_file(folder, key + SUFFIX) else set()
        return there

    def set_aside(self, key: str, reason: str) -> bool:
        target = f"{check_key(key)}-{time.time_ns()}"
        try:
            with opened(self.path, key[:2]) as folder:
                os.stat(key + SUFFIX, dir_fd=folder, follow_symlinks=False)  # no folder for nothing
                with opened(self.path, "aside", make=True) as aside:
                    os.rename(key + SUFFIX, target + SUFFIX, src_dir_fd=folder, dst_dir_fd=aside)
                    with contextlib.suppress(OSError):  # a full disk must not keep a damaged file in service
                        os.utime(target + SUFFIX, dir_fd=aside, follow_symlinks=False)  # its day begins now
                        create(aside, target + ".reason", [memoryview(f"{reason}\n".encode(errors="replace"))])
        except FileNotFoundError:
            return False
        except OSError as error:
            raise unavailable(error, "cannot set aside a document of the store", self.path) from error
        return True

    def sweep(self) -> int:
        freed = 0
        try:
            for shard in [*self._shards(), "aside"]:
                with contextlib.suppress(*_GONE), opened(self.path, shard) as folder:
                    stale = _is_old if shard == "aside" else is_abandoned
                    for name in [name for name in os.listdir(folder) if stale(folder, name)]:
                        freed += os.stat(name, dir_fd=folder, follow_symlinks=False).st_size
                        os.unlink(name, dir_fd=folder)
        except OSError as error:
            raise unavailable(error, "cannot clean the store", self.path) from error
        return freed

    def _get(self, key: str) -> Blob | None:
        try:
            return FileBlob(self.path, key[:2], key + SUFFIX)
        except FileNotFoundError:
            return None
        except OSError as error:  # passing, perhaps: a miss
            if error.errno in (errno.EMFILE, errno.ENFILE):
                open_files.warn()
            else:
                log.warning("cannot read stored document %s: %s", key[:16], error.strerror)
            return None

    def _put(self, key: str, data: Sequence[memoryview]) -> bool:
        with opened(self.path, key[:2], make=True) as folder:
            return create(folder, key + SUFFIX, data)

    def _shards(self) -> Iterator[str]:
        with contextlib.suppress(FileNotFoundError):
            yield from sorted(filter(_SHARD.fullmatch, os.listdir(self.path)))


class PinFolder:
    """Pins as empty files, so that they outlive the catalogue, and a damaged document until it is encoded again."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __contains__(self, key: object) -> bool:
        with contextlib.suppress(OSError), opened(self.root, "pins") as folder:
            return is_file(folder, str(key))
        return False

    def add(self, key: str) -> None:
        """Pin a key."""
        try:
            with opened(self.root, "pins", make=True) as folder:
                create(folder, key, [])
        except OSError as error:
            raise unavailable(error, "cannot pin in the store", self.root) from error

    def discard(self, key: str) -> None:
        """Unpin a key."""
        try:
            with opened(self.root, "pins") as folder:
                os.unlink(key, dir_fd=folder)
        except FileNotFoundError:
            return
        except OSError as error:
            raise unavailable(error, "cannot unpin in the store", self.root) from error


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
        limits = parse_size(budget, "budget") or functools.partial(_share, self.path), parse_size(quota, "quota")
        kept = Kept(DiskBlobs(self.path), self.path / "catalogue.sqlite", policy, *limits, PinFolder(self.path))
        super().__init__(kept)


def default_path() -> Path:
    """The user's own store: $XDG_CACHE_HOME/kvilt/store or ~/.cache/kvilt/store."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "kvilt" / "store"


def _share(path: Path, held: int) -> int:
    with contextlib.suppress(OSError):
        return max(1, int(SHARE * (shutil.disk_usage(path).free + held)))
    return max(1, held)


def _is_old(folder: int, name: str) -> bool:
    with contextlib.suppress(OSError):
        return is_file(folder, name) and time.time() - os.stat(name, dir_fd=folder).st_mtime > ASIDE_SECONDS
    return False

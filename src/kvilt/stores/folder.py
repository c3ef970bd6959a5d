"""The files of a disk store: where they lie, how they are swept, and what happens to damaged ones.

ab/abcdef...safetensors   a document, under the first two digits of its key
ab/abcdef...pin           beside it while it is pinned
aside/                    damaged files, each with a .reason
index.sqlite              can be deleted at any time
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import asdict
from pathlib import Path

from kvilt.errors import DamagedCache
from kvilt.rows.filed import Header
from kvilt.rows.format import SUFFIX, read_header, sync_folder
from kvilt.stores.base import Entry
from kvilt.stores.process import Owner

log = logging.getLogger("kvilt")

TEMPORARY_SECONDS = 3600.0  # no write takes longer, even on another host
ASIDE_SECONDS = 86400.0
_KEY = re.compile(r"[0-9a-f]{64}")
_SHARD = re.compile(r"[0-9a-f]{2}")


class Folder:
    """The folder of a disk store. Methods raise OSError; `entries` and `take_out` do not."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.aside = root / "aside"
        self.refused: set[str] = set()  # damaged, but they could not be moved away

    def file(self, key: str) -> Path:
        """Where a document lies."""
        return self.root / key[:2] / f"{key}{SUFFIX}"

    def pinned(self, key: str) -> bool:
        """Whether a document is pinned; the truth is the file beside it, so it survives the index."""
        return self.file(key).with_suffix(".pin").exists()

    def set_pinned(self, key: str, pinned: bool) -> None:
        """Pin or unpin a document."""
        mark = self.file(key).with_suffix(".pin")
        if pinned:
            mark.touch()
            sync_folder(mark.parent)
        else:
            mark.unlink(missing_ok=True)

    def remove(self, key: str) -> int:
        """Delete a document; the bytes it had, 0 if it was not there."""
        path = self.file(key)
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            size = 0
        self.set_pinned(key, False)
        return size

    def scan(self) -> Iterator[str]:
        """The key of every file that is named like a document's."""
        for path in self._shards():
            for name in _names(path):
                stem, dot, suffix = name.partition(".")
                if dot + suffix == SUFFIX and _KEY.fullmatch(stem) and stem[:2] == path.name:
                    yield stem

    def describe(self, key: str) -> Entry:
        """What the index should know of a document, read from its file. Raises DamagedCache."""
        header = read_header(self.file(key))
        if header.key.digest != key:
            raise DamagedCache(key, f"it holds another document, {header.key.digest[:16]}")
        return entry_of(header, self.pinned(key))

    def entries(self, note: Callable[[str], None], known: Container[str] = ()) -> Iterator[Entry]:
        """Every document not `known`, from the files alone; damaged ones are taken out and noted."""
        for key in self.scan():
            if key in known:
                continue
            try:
                yield self.describe(key)
            except DamagedCache as error:
                if self.take_out(key, error.reason):
                    note("damaged")
            except OSError:
                continue

    def take_out(self, key: str, reason: str) -> bool:
        """Move a damaged file out of service, with the reason beside it; whether there was one."""
        try:
            place = self._move_aside(key, reason)
        except FileNotFoundError:
            return False
        except OSError as error:
            self.refused.add(key)
            log.warning("stored document %s is damaged: %s. It stays in place: %s", key[:16], reason, error)
            return True
        log.warning("stored document %s is damaged: %s. It was moved to %s", key[:16], reason, place)
        return True

    def _move_aside(self, key: str, reason: str) -> Path:
        target = self.aside / f"{key}-{time.time_ns()}{SUFFIX}"
        self.file(key).stat()  # no folder for nothing
        self.aside.mkdir(exist_ok=True)
        os.replace(self.file(key), target)
        self.set_pinned(key, False)
        with contextlib.suppress(OSError):  # a full disk must not keep a damaged file in service
            target.with_suffix(".reason").write_text(f"{reason}\n", encoding="utf-8")
        return target

    def sweep(self) -> int:
        """Delete what dead writers left, and what was set aside a day ago; bytes freed."""
        now = time.time()
        leftovers = [p for shard in self._shards() for p in shard.glob(".*.tmp") if _is_stale(p, now)]
        old = [p for p in self.aside.glob("*") if now - _changed(p, now) > ASIDE_SECONDS]
        return sum(map(_unlink, leftovers + old))

    def _shards(self) -> Iterator[Path]:
        for name in _names(self.root):
            if _SHARD.fullmatch(name):
                yield self.root / name


def entry_of(header: Header, pinned: bool) -> Entry:
    """An index entry from a file's header: uses start anew, and the last use was the writing."""
    return Entry(
        key=header.key.digest,
        bytes=header.bytes,
        tokens=header.spans["tokens"].shape[0],
        title=header.title,
        namespace=header.namespace,
        created=header.created,
        used=header.created,
        pinned=pinned,
        expires=header.expires,
        fields=asdict(header.key),
    )


def _names(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _changed(path: Path, default: float) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return default


def _is_stale(path: Path, now: float) -> bool:
    tag = path.name.split(".")[2] if path.name.count(".") > 2 else ""
    return now - _changed(path, now) > TEMPORARY_SECONDS or not Owner.tag_alive(tag)


def _unlink(path: Path) -> int:
    try:
        size = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size

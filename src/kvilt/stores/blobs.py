"""The contract every store meets: bytes under a key. A document exists if and only if its blob exists. And the
simplest of them: bytes in this process's memory.

Nothing here knows what the bytes mean; pins, time to live, budgets and statistics are the catalogue's (`catalogue`).
"""

from __future__ import annotations

import contextlib
import re
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Protocol, TypeAlias

from kvilt.errors import StoreError


class Blob(Protocol):
    """The bytes of one stored document, opened for reading.

    A blob that holds all of them in this process's memory says so by an attribute `memory`, a writable memoryview that nobody
    writes to: rows are then used where they lie."""

    @property
    def size(self) -> int:
        """Bytes in all."""

    @property
    def identity(self) -> Hashable:
        """Differs from what it was if the bytes may have changed since."""

    def read(self, offset: int, into: Sequence[memoryview]) -> None:
        """Fill all of `into` (writable bytes) from `offset` on. Raises OSError, and EOFError where the bytes end."""

    def close(self) -> None:
        """Release what it holds now rather than with the last reference."""


Blobs: TypeAlias = "list[Blob | None]"


class MemoryBlob:
    """Bytes in memory."""

    def __init__(self, data: bytes | bytearray | memoryview, identity: Hashable = None) -> None:
        self.memory, self.size = memoryview(data), len(data)
        self.identity = object() if identity is None else identity

    def read(self, offset: int, into: Sequence[memoryview]) -> None:
        """Copy from `offset` on into all of `into`."""
        for view in into:
            part = self.memory[offset : offset + len(view)]
            if len(part) < len(view):
                raise EOFError(f"it ends after {self.size} bytes")
            view[:] = part
            offset += len(view)

    def close(self) -> None:
        """Nothing to do: the bytes go with the last reference."""


class BlobStore(ABC):
    """Bytes by key. A key is 64 hex digits; anything else raises StoreError before anything is touched."""

    @abstractmethod
    def get_many(self, keys: Sequence[str]) -> Blobs:
        """The blob of every key; None where there is none, or it cannot be read just now."""

    @abstractmethod
    def put(self, key: str, data: Sequence[memoryview]) -> bool:
        """Store the joined `data`, all or nothing; False if the key was there already. Raises StoreUnavailable."""

    @abstractmethod
    def delete(self, key: str) -> bool:
        """Remove a blob; whether it was there. Raises StoreUnavailable."""

    @abstractmethod
    def list(self) -> Iterator[tuple[str, int]]:
        """Key and bytes of every blob. Raises StoreUnavailable."""

    def contains(self, keys: Iterable[str]) -> set[str]:
        """Which of these keys have a blob."""
        return {key for key in keys for blob in self.get_many([key]) if blob is not None}  # never all open at once

    def set_aside(self, key: str, reason: str) -> bool:
        """Take a damaged blob out of service, kept for inspection where the store can; whether it was there."""
        return self.delete(key)

    def sweep(self) -> int:
        """Remove what dead writers left behind, and what was set aside long ago; bytes freed."""
        return 0

    def close(self) -> None:  # noqa: B027
        """Release files and connections; the store may be used again."""


is_key = re.compile(r"[0-9a-f]{64}").fullmatch


def check_key(key: str) -> str:
    """The key itself, if it is one. Raises StoreError."""
    if not (isinstance(key, str) and is_key(key)):
        raise StoreError(f"{key!r:.80} is no key of a stored document: a key is 64 hex digits (0-9, a-f).")
    return key


class OnePerKey:
    """Lets one thread at a time work on a key."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: weakref.WeakValueDictionary[str, threading.Lock] = weakref.WeakValueDictionary()

    @contextlib.contextmanager
    def alone(self, key: str) -> Iterator[bool]:
        """Wait until nobody else works on this key; whether somebody did."""
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        busy = lock.locked()
        with lock:
            yield busy


class MemoryBlobs(BlobStore):
    """Blobs in this process's memory."""

    def __init__(self) -> None:
        self._blobs: dict[str, MemoryBlob] = {}  # every use of it is one operation, so no lock is needed

    def get_many(self, keys: Sequence[str]) -> Blobs:
        return [self._blobs.get(check_key(key)) for key in keys]

    def put(self, key: str, data: Sequence[memoryview]) -> bool:
        if check_key(key) in self._blobs:
            return False
        blob = MemoryBlob(bytearray().join(data))
        return self._blobs.setdefault(key, blob) is blob

    def delete(self, key: str) -> bool:
        return self._blobs.pop(check_key(key), None) is not None

    def list(self) -> Iterator[tuple[str, int]]:
        return iter([(key, blob.size) for key, blob in self._blobs.copy().items()])

    def close(self) -> None:
        self._blobs.clear()

"""What every cache store promises. Stores see caches and bytes, never a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from kvilt.types import CacheKey, DocumentCache


@dataclass(frozen=True)
class Entry:
    """One stored document as the index knows it. Times are seconds since the epoch."""

    key: str  # digest
    bytes: int  # of the whole file or of the tensors
    tokens: int
    title: str = ""
    namespace: str = "default"
    created: float = 0.0
    used: float = 0.0
    hits: int = 0
    pinned: bool = False
    expires: float | None = None
    fields: dict[str, str] = field(default_factory=dict)  # the key's identity in clear


@dataclass(frozen=True)
class StoreStats:
    """Totals of a store."""

    entries: int
    bytes: int
    budget: int | None
    hits: int
    misses: int
    evictions: int
    damaged: int


class CacheStore(ABC):
    """Document caches by content address.

    `put` of an existing key is a no-op, so writers need not coordinate. A damaged, foreign or half-written document is
    never returned: it is set aside, counted, logged, and `get` answers None.
    """

    @abstractmethod
    def get(self, key: CacheKey) -> DocumentCache | None:
        """The stored cache, or None. Rows may be read later; `layers.fetch` raises DamagedCache if they are damaged."""

    @abstractmethod
    def put(
        self, cache: DocumentCache, *, title: str = "", namespace: str = "default", ttl: float | None = None
    ) -> None:
        """Store a cache (seconds to live `ttl`). Raises StoreUnavailable when it cannot be written."""

    @abstractmethod
    def contains(self, keys: Iterable[str]) -> set[str]:
        """Which of these digests are stored; does not count as use."""

    @abstractmethod
    def delete(self, key: str) -> bool:
        """Forget a document; whether it was there."""

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """Every stored document."""

    def entry(self, key: str) -> Entry | None:
        """One stored document; does not count as use."""
        return next((entry for entry in self.entries() if entry.key == key), None)

    @abstractmethod
    def stats(self) -> StoreStats:
        """Totals."""

    @abstractmethod
    def pin(self, key: str, pinned: bool = True) -> bool:
        """Keep a document from eviction and expiry; whether it is there."""

    @abstractmethod
    def set_aside(self, key: str, reason: str) -> None:
        """Take a damaged document out of service, keeping it for inspection where the store can."""

    @abstractmethod
    def gc(self) -> int:
        """Drop expired documents, leftovers and whatever is over budget or quota; bytes freed."""

    @abstractmethod
    def verify(self) -> list[tuple[str, str]]:
        """Read every document completely; (key, reason) of each damaged one, which is set aside."""

    def touch(self, key: str) -> None:  # noqa: B027 - a store that evicts nothing need not care
        """Note a use that a faster store answered, so that what is popular there is not evicted here."""

    def claim(self, key: str) -> bool:
        """Announce that this process will encode `key`; False if another live process already has."""
        return True

    def release(self, key: str) -> None:  # noqa: B027 - stores without claims need none
        """Withdraw a claim."""

    def close(self) -> None:  # noqa: B027 - memory has nothing to close
        """Write what is pending and release files and connections; the store may be used again."""

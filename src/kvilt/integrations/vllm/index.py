"""Which stored documents a prompt holds, found by its token ids alone.

The first FIRST tokens of every window of the prompt are hashed at once; where a stored document begins like that, the digest
of as many tokens as it has decides. Of documents that begin at one place the longest is taken."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from kvilt.errors import StoreError
from kvilt.integrations.vllm.deployment import Deployment
from kvilt.stores.store import Entry
from kvilt.types import CacheKey, digest_of

FIRST = 8  # tokens by which a place is recognised; shorter documents are not looked for, computing them is as fast
TOGETHER = 128  # documents opened at a time while a store is looked through
IDLE = 20  # times as long as it took to look, at least, until the next look
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: powers of it do not vanish modulo 2**64

logger = logging.getLogger("kvilt")


@dataclass(frozen=True)
class Match:
    """A stored document inside a prompt: tokens [start, end)."""

    start: int
    end: int
    title: str
    compressions: frozenset[str]  # with which it is stored


@dataclass
class _Known:
    """Documents that begin alike."""

    by_tokens: dict[tuple[str, str], dict[str, tuple[str, str]]] = field(default_factory=lambda: defaultdict(dict))
    lengths: list[int] = field(default_factory=list)  # longest first


class Index:
    """Stored documents of one checkpoint by their first tokens. One thread writes, others may read."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}
        self._where: dict[str, tuple[int, str, str]] = {}  # key digest -> first tokens, namespace, digest of all tokens
        self._hashes = np.zeros(0, np.uint64)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._where)

    @property
    def digests(self) -> set[str]:
        """The keys that are in it."""
        return set(self._where)

    def add(self, key: CacheKey, own: torch.Tensor, title: str) -> None:
        """Take in a document whose tokens in a prompt are `own`, (tokens,)."""
        usable = len(own) >= FIRST and digest_of(own) == key.tokens  # else: known, never matched
        first = int(_windows(own[:FIRST].numpy())[0]) if usable else 0
        with self._lock:
            self._where[key.digest] = (first, key.namespace, key.tokens)
            if first:
                known = self._known.setdefault(first, _Known())
                known.by_tokens[key.namespace, key.tokens][key.digest] = (key.compression, title)
                known.lengths = sorted({*known.lengths, len(own)}, reverse=True)
            self._hashes = np.zeros(0, np.uint64)

    def remove(self, digest: str) -> None:
        """Forget a document."""
        with self._lock:
            first, namespace, tokens = self._where.pop(digest, (0, "", ""))
            known = self._known.get(first)
            if known is not None:
                known.by_tokens[namespace, tokens].pop(digest, None)

    def matches(self, ids: list[int], namespace: str) -> list[Match]:
        """The documents of a namespace that a prompt holds, from left to right, without overlaps."""
        if len(ids) < FIRST or not self._known:
            return []
        with self._lock:
            if not len(self._hashes):
                self._hashes = np.fromiter(self._known, np.uint64, len(self._known))
            array = np.asarray(ids, dtype=np.int64)
            windows = _windows(array)
            places = np.isin(windows, self._hashes).nonzero()[0].tolist()
            return list(self._taken(array, windows, places, namespace))

    def _taken(self, ids: np.ndarray, windows: np.ndarray, places: list[int], namespace: str) -> Iterator[Match]:
        end = 0
        for start in places:
            if start >= end:
                match = self._longest(ids, start, self._known[int(windows[start])], namespace)
                if match is not None:
                    end = match.end
                    yield match

    def _longest(self, ids: np.ndarray, start: int, known: _Known, namespace: str) -> Match | None:
        for length in known.lengths:
            if start + length <= len(ids):
                tokens = digest_of(torch.from_numpy(ids[start : start + length]))
                there = known.by_tokens.get((namespace, tokens))
                if there:
                    title = next(iter(there.values()))[1]
                    return Match(start, start + length, title, frozenset(c for c, _ in there.values()))
        return None


def _windows(ids: np.ndarray) -> np.ndarray:
    """A hash of every window of FIRST ids, (len(ids) - FIRST + 1,) uint64, never 0."""
    ids, count = ids.astype(np.uint64) + np.uint64(1), len(ids) - FIRST + 1
    total, power = np.zeros(count, np.uint64), np.uint64(1)
    with np.errstate(over="ignore"):
        for i in range(FIRST):
            total += ids[i : i + count] * power
            power *= BASE
    return total | np.uint64(1)


class Watcher:
    """Keeps an index like its store, from a thread that looks every few seconds."""

    def __init__(self, deployment: Deployment, index: Index) -> None:
        self.deployment, self.index, self.seconds = deployment, index, deployment.settings.refresh
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvilt-watcher", daemon=True)

    def start(self) -> None:
        """Look once, then go on from a thread."""
        self.look()
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()

    def look(self) -> None:
        """Take in what is new in the store, forget what is gone."""
        try:
            there = {e.key: e for e in self.deployment.store.entries() if self.deployment.knows(e.fields)}
            known = self.index.digests
            for digest in known - there.keys():
                self.index.remove(digest)
            new = [there[digest] for digest in there.keys() - known]
            for at in range(0, len(new), TOGETHER):
                self._take(new[at : at + TOGETHER])
        except (StoreError, OSError) as error:
            logger.warning("the store was not looked through: %s", error)

    def _take(self, entries: list[Entry]) -> None:
        caches = self.deployment.store.get_many([CacheKey(**e.fields) for e in entries], counted=False)
        for entry, cache in zip(entries, caches, strict=True):
            if cache is not None:
                self.index.add(cache.key, self.deployment.tokens_of(cache), entry.title)

    def _run(self) -> None:
        took = 0.0
        while not self._stop.wait(max(self.seconds, IDLE * took)):
            began = time.monotonic()
            self.look()
            took = time.monotonic() - began

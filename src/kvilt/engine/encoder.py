"""Documents to caches: each is encoded once, alone, in batches of like length, and stored."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from kvilt.compress.base import Compression, Made
from kvilt.engine.ranking import NEUTRAL, ranked
from kvilt.engine.text import TextFormat
from kvilt.errors import DocumentError, StoreUnavailable
from kvilt.model.model import Model
from kvilt.model.probe import ModelProbe
from kvilt.rows.header import MAX_TITLE
from kvilt.rows.rows import TensorRows
from kvilt.stores.store import Store, check_namespace
from kvilt.types import CacheKey, Document, DocumentCache, Encoding, digest_of

BATCH_TOKENS = 4096  # padded tokens of one pass: enough to fill the cores, small enough for activations
PADDING = 1.15  # a batch's longest document is at most this much longer than its shortest
KNOWN = 1 << 13  # documents whose tokens and keys are remembered

NONE = Compression()
NOTHING = torch.zeros(0, dtype=torch.long)
T = TypeVar("T")

logger = logging.getLogger("kvilt")


@dataclass(frozen=True, eq=False)
class Item:
    """A tokenised document and its content address."""

    document: Document
    ids: Tensor  # (tokens,)
    key: CacheKey
    title_length: int = 0  # tokens, where a press must know
    saved: int = 0  # tokens that are left out of the text

    @property
    def title(self) -> str:
        """What a person calls the document."""
        return self.document.title or self.document.id or ""

    @property
    def bare(self) -> DocumentCache:
        """Its tokens alone, to be computed."""
        return DocumentCache(self.ids, torch.arange(len(self.ids)), len(self.ids), self.key)


@dataclass(frozen=True)
class Progress:
    """How far an encoding run is, in documents and tokens."""

    done: int
    total: int
    tokens: int
    total_tokens: int
    seconds: float


@dataclass(frozen=True)
class EncodeReport:
    """What an encoding run did, or would do (`corpora.estimate`)."""

    documents: int
    encoded: int
    present: int
    tokens: int
    bytes: int
    seconds: float
    failed: tuple[str, ...] = ()  # why a document could not be encoded, a line each


class Flights:
    """One future per document that is being encoded in this process: whoever needs it meanwhile waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, Future[DocumentCache | None]] = {}

    def take(self, digests: Iterable[str]) -> tuple[list[str], dict[str, Future[DocumentCache | None]]]:
        """Which documents the caller is to encode, and the futures of those that somebody else encodes already."""
        mine, theirs = [], {}
        with self._lock:
            for digest in digests:
                if digest in self._running:
                    theirs[digest] = self._running[digest]
                else:
                    self._running[digest] = Future()
                    mine.append(digest)
        return mine, theirs

    def land(self, digest: str, cache: DocumentCache | None) -> None:
        """Hand a document to those who wait for it; None where it could not be encoded."""
        with self._lock:
            future = self._running.pop(digest, None)
        if future is not None:
            future.set_result(cache)


@dataclass(frozen=True, eq=False)
class Encoder:
    """Encodes documents for one model and one encoding into one store. Thread-safe."""

    model: Model
    text: TextFormat
    store: Store
    encoding: Encoding
    namespace: str = "shared"
    ttl: float | None = None
    compression: Compression = NONE
    flights: Flights = field(default_factory=Flights)

    def __post_init__(self) -> None:
        check_namespace(self.namespace)

    def items(self, documents: Iterable[Document], failed: list[str] | None = None) -> list[Item]:
        """Tokenise and key documents.

        Raises DocumentError naming all that are empty, too long or unreadable; with `failed` they are noted there and
        left out."""
        items, problems = [], list[str]()
        frame = self.model.key(NOTHING, self.encoding, namespace=self.namespace)  # what all their keys have in common
        for document in documents:
            try:
                items.append(self.item(document, frame))
            except DocumentError as error:
                problems.append(str(error))
        if failed is not None:
            failed += problems
        elif problems:
            raise DocumentError(" ".join(problems))
        return items

    def item(self, document: Document, frame: CacheKey) -> Item:
        """Tokens and key of one document; `frame` is a key of this encoder. Raises DocumentError."""
        ids, saved = self.text.document_ids(document), 0
        if self.compression.text is not None and not document.ids:
            document, before = self.compression.shorten(document), len(ids)
            ids = self.text.document_ids(document)
            saved = before - len(ids)
        name = document.title or document.id or ""
        if document.store and len(name.encode("utf-8", "replace")) > MAX_TITLE:
            raise DocumentError(f"document {name[:40]!r}... has a name of more than {MAX_TITLE} bytes: shorten it.")
        e = self.encoding
        around = len(e.before) + len(e.after) + e.anchors_of(len(ids))
        if len(ids) + around > self.model.context_length:
            name, room = document.id or document.title or document.text[:40], self.model.context_length - around
            raise DocumentError(f"document {name!r} has {len(ids)} tokens, the model's context holds {room}. Split it.")
        title = self.text.title_length(document) if self.compression.rows else 0
        compression = "" if self.compression == NONE else self.compression.identity(title)
        key = replace(frame, compression=compression, tokens=digest_of(ids))
        return Item(document, ids, key, title, saved)

    def encode(
        self,
        documents: Iterable[Document],
        on_progress: Callable[[Progress], None] | None = None,
        *,
        keep_going: bool = False,
    ) -> EncodeReport:
        """Encode and store what is missing; a rerun encodes nothing twice.

        Raises DocumentError for documents that cannot be encoded, or with `keep_going` names them in the report. Raises
        StoreUnavailable when the store cannot be written."""
        began, failed = time.perf_counter(), list[str]()
        count, missing = self.missing(documents, failed if keep_going else None)
        encoded, done, tokens, size, total = 0, 0, 0, 0, sum(len(i.ids) for i in missing)
        with closing(_Writer(self._store)) as writer:
            for batch in batches(missing, lambda i: len(i.ids)):
                stored = [(item, cache) for item, cache in self._make(batch, writer.take) if cache is not None]
                writer.turn()
                encoded, done = encoded + len(stored), done + len(batch)
                tokens += sum(len(item.ids) for item, _ in stored)
                size += sum(cache.nbytes for _, cache in stored)
                if on_progress:
                    on_progress(Progress(done, len(missing), tokens, total, time.perf_counter() - began))
            writer.turn()
        seconds = time.perf_counter() - began
        return EncodeReport(count, encoded, count - encoded, tokens, size, seconds, tuple(failed))

    def obtain(self, items: Sequence[Item], lost: Collection[str] = ()) -> dict[str, DocumentCache]:
        """The caches of documents that the store does not have, or has `lost`, encoded now and stored, by digest.

        An answer is still given when the store cannot take them."""
        unique = {item.key.digest: item for item in items}
        caches: dict[str, DocumentCache] = {}
        while missing := [item for digest, item in unique.items() if digest not in caches]:
            for batch in batches(missing, lambda i: len(i.ids)):
                made = self._make(batch, self._store_if_possible, lost)
                caches |= {item.key.digest: cache for item, cache in made if cache is not None}
        return caches

    def make(self, items: Sequence[Item]) -> list[DocumentCache]:
        """The caches of documents, encoded now and not stored."""
        caches = self.model.encode([i.ids for i in items], self.encoding)
        if self.encoding.ranked:
            caches = ranked(self.model, caches, self.encoding, self.text.plain_ids(NEUTRAL))
        return [self._smaller(cache, item) for cache, item in zip(caches, items, strict=True)]

    def _make(
        self, batch: Sequence[Item], store: Callable[[Item, DocumentCache], None], lost: Collection[str] = ()
    ) -> Iterator[tuple[Item, DocumentCache | None]]:
        """Encode and store a batch, or wait for those who do; None for what another thread has failed to encode."""
        by_digest = {item.key.digest: item for item in batch}
        mine, theirs = self.flights.take(by_digest)
        try:
            sound = [by_digest[digest] for digest in mine if digest not in lost]
            there = self.store.found([i.key for i in sound])  # finished by somebody since we looked
            for digest, cache in there.items():
                self.flights.land(digest, cache)
                yield by_digest[digest], cache
            todo = [by_digest[digest] for digest in mine if digest not in there]
            for item, cache in zip(todo, self.make(todo) if todo else [], strict=True):
                store(item, cache)
                self.flights.land(item.key.digest, cache)
                yield item, cache
        finally:
            for digest in mine:
                self.flights.land(digest, None)  # no effect on those that have landed
        for digest, future in theirs.items():
            yield by_digest[digest], future.result()

    def _store(self, item: Item, cache: DocumentCache) -> None:
        self.store.put(cache, title=item.title, ttl=self.ttl)

    def _store_if_possible(self, item: Item, cache: DocumentCache) -> None:
        try:
            self._store(item, cache)
        except StoreUnavailable as error:
            logger.warning("not stored: %s", error)

    def _smaller(self, cache: DocumentCache, item: Item) -> DocumentCache:
        """The cache as it is stored: compressed, in the dtype that its key names."""
        model, around = self.model, (len(self.encoding.before), len(self.encoding.after))
        if self.compression != NONE:
            made = Made(
                cache,
                around if self.encoding.keep else (0, 0),
                item.title_length,
                lambda keys, positions: model.rotation.rotate(keys, model.rotation.angles(positions)),
                ModelProbe(model, model.info()).attention,
                self.text.plain_ids,
                model.context_length,
            )
            cache = self.compression.apply(made)
        rows = cache.rows
        if isinstance(rows, TensorRows):
            rows = TensorRows(rows.data.to(model.stored))
        return replace(cache, key=item.key, rows=rows)

    def missing(self, documents: Iterable[Document], failed: list[str] | None = None) -> tuple[int, list[Item]]:
        """How many different documents may be stored, and those that are not there."""
        unique = {item.key.digest: item for item in self.items(documents, failed) if item.document.store}
        present = self.store.contains(unique)
        return len(unique), [item for digest, item in unique.items() if digest not in present]


class _Writer:
    """Stores a batch in a thread while the next one is computed; never more than two batches are held."""

    def __init__(self, store: Callable[[Item, DocumentCache], None]) -> None:
        self._store, self._pool = store, ThreadPoolExecutor(1, "kvilt-writer")
        self._now, self._before = list[Future[None]](), list[Future[None]]()

    def take(self, item: Item, cache: DocumentCache) -> None:
        self._now.append(self._pool.submit(self._store, item, cache))

    def turn(self) -> None:
        """End of a batch: the one before is stored. Raises what storing it raised."""
        for future in self._before:
            future.result()
        self._before, self._now = self._now, []

    def close(self) -> None:
        self._pool.shutdown()  # what was computed is stored, whatever happened


def batches(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Groups of like size, in tokens, whose padded size stays under BATCH_TOKENS."""
    group: list[T] = []
    for item in sorted(items, key=size):
        longest = size(item)
        if group and (longest * (len(group) + 1) > BATCH_TOKENS or longest > PADDING * size(group[0]) + 16):
            yield group
            group = []
        group.append(item)
    if group:
        yield group

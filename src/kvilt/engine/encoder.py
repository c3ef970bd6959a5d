"""Documents to caches: each is encoded once, alone, in batches of like length, and stored."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from kvilt.compress.base import Compression, Made
from kvilt.engine.text import TextFormat
from kvilt.errors import DocumentError, StoreUnavailable
from kvilt.model.model import Model
from kvilt.model.probe import ModelProbe
from kvilt.model.rope import turned
from kvilt.stores.base import CacheStore
from kvilt.types import CacheKey, Document, DocumentCache, Encoding

BATCH_TOKENS = 4096  # padded tokens of one pass: enough to fill the cores, small enough for activations
PADDING = 1.15  # a batch's longest document is at most this much longer than its shortest
POLL_SECONDS = 0.2

NONE = Compression()
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
    """What an encoding run did (or, for a dry run, would do)."""

    documents: int
    encoded: int
    present: int
    tokens: int
    bytes: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Encoder:
    """Encodes documents for one model and one encoding into one store."""

    model: Model
    text: TextFormat
    store: CacheStore
    encoding: Encoding
    namespace: str = "default"
    ttl: float | None = None
    compression: Compression = NONE

    def items(self, documents: Iterable[Document]) -> list[Item]:
        """Tokenise and key documents. Raises DocumentError for empty ones and those longer than the model's context."""
        return [self._item(d) for d in documents]

    def _item(self, document: Document) -> Item:
        ids, saved = self.text.document_ids(document), 0
        if self.compression.text is not None:
            document, before = self.compression.shorten(document), len(ids)
            ids = self.text.document_ids(document)
            saved = before - len(ids)
        e = self.encoding
        around = len(e.before) + len(e.after) + e.anchors_of(len(ids))
        if len(ids) + around > self.model.context_length:
            name = document.id or document.title or document.text[:40]
            raise DocumentError(
                f"document {name!r} has {len(ids)} tokens, the model's context holds "
                f"{self.model.context_length - around}. Split it."
            )
        title = self.text.title_length(document) if self.compression.rows else 0
        return Item(document, ids, self.model.key(ids, e, self.compression.identity(title)), title, saved)

    def _storable(self, documents: Iterable[Document]) -> dict[str, Item]:
        """Documents by content address, those left out that must never be stored."""
        return {item.key.digest: item for item in self.items(documents) if item.document.store}

    def encode(
        self, documents: Iterable[Document], on_progress: Callable[[Progress], None] | None = None
    ) -> EncodeReport:
        """Encode and store what is missing. A rerun, or another process at the same time, encodes nothing twice."""
        began = time.perf_counter()
        unique = self._storable(documents)
        present = self.store.contains(unique)
        missing = [item for key, item in unique.items() if key not in present]
        encoded, done, tokens, size, total = 0, 0, 0, 0, sum(len(i.ids) for i in missing)
        for batch in self._claimed(missing):
            mine = self._encode_claimed(batch)
            encoded, done, tokens = encoded + len(mine), done + len(batch), tokens + sum(len(i.ids) for i, _ in mine)
            size += sum(stored for _, stored in mine)
            if on_progress:
                on_progress(Progress(done, len(missing), tokens, total, time.perf_counter() - began))
        return EncodeReport(len(unique), encoded, len(unique) - encoded, tokens, size, time.perf_counter() - began)

    def dry_run(self, documents: Iterable[Document], sample: int = 2) -> EncodeReport:
        """What `encode` would do: documents, bytes, and seconds extrapolated from encoding `sample` of them unstored."""
        unique = self._storable(documents)
        present = self.store.contains(unique)
        missing = [item for key, item in unique.items() if key not in present]
        tried = sorted(missing, key=lambda i: len(i.ids))[len(missing) // 2 :][:sample]
        began = time.perf_counter()
        size = sum(cache.nbytes for item in tried for cache in self._run([item]))
        rate = sum(len(i.ids) for i in tried) / max(time.perf_counter() - began, 1e-9)
        tokens, share = sum(len(i.ids) for i in missing), size / max(self._plain_size(tried), 1)
        size, seconds = round(share * self._plain_size(missing)), tokens / rate if tried else 0.0
        return EncodeReport(len(unique), len(missing), len(unique) - len(missing), tokens, size, seconds)

    def fetch(self, items: Sequence[Item], refused: Container[str] = ()) -> tuple[list[DocumentCache], int]:
        """The caches of documents, encoding and storing what is missing; and how many were found.

        What is stored under the digests `refused` is damaged: it is encoded again."""
        unique = {i.key.digest: i for i in items}
        stored = {digest: self.get(item.key, refused) for digest, item in unique.items()}
        found = {digest: cache for digest, cache in stored.items() if cache is not None}
        hits = sum(i.key.digest in found for i in items)
        for batch in batches([item for digest, item in unique.items() if digest not in found]):
            for item, cache in zip(batch, self._run(batch), strict=True):
                self.put(cache, item.title)
                found[item.key.digest] = turned(cache, self.model.rope)
        return [found[i.key.digest] for i in items], hits

    def make(self, items: Sequence[Item]) -> list[DocumentCache]:
        """The caches of documents, encoded now and not stored."""
        return [turned(cache, self.model.rope) for cache in self._run(items)]

    def _run(self, batch: Sequence[Item]) -> list[DocumentCache]:
        caches = self.model.encode([i.ids for i in batch], self.encoding)
        return [self._smaller(cache, item) for cache, item in zip(caches, batch, strict=True)]

    def _smaller(self, cache: DocumentCache, item: Item) -> DocumentCache:
        """The cache as it is stored."""
        if self.compression == NONE:
            return cache
        model, around = self.model, (len(self.encoding.before), len(self.encoding.after))
        attention, turn = ModelProbe(model, model.info()).attention, model.rope.move
        made = Made(
            cache,
            around if self.encoding.keep else (0, 0),
            item.title_length,
            turn,
            attention,
            self.text.plain_ids,
            model.context_length,
        )
        return replace(self.compression.apply(made), key=item.key)

    def get(self, key: CacheKey, refused: Container[str] = ()) -> DocumentCache | None:
        """The stored cache; None if there is none, it is known to be damaged, or the store cannot be read."""
        if key.digest in refused:
            return None
        try:
            found = self.store.get(key)
        except StoreUnavailable as error:
            logger.warning("not read: %s", error)
            return None
        return None if found is None else turned(found, self.model.rope)

    def put(self, cache: DocumentCache, title: str) -> None:
        """Store a cache; an answer is still given when the store cannot take it."""
        try:
            self.store.put(cache, title=title, namespace=self.namespace, ttl=self.ttl)
        except StoreUnavailable as error:
            logger.warning("not stored: %s", error)

    def _claimed(self, missing: list[Item]) -> Iterator[list[Item]]:
        """Batches that this process may encode; what another process has claimed is waited for at the end."""
        waiting = []
        for batch in batches(missing):
            mine = [i for i in batch if self.store.claim(i.key.digest)]
            waiting += [i for i in batch if i not in mine]
            if mine:
                yield mine
        while waiting:
            stored = self.store.contains(i.key.digest for i in waiting)
            waiting = [i for i in waiting if i.key.digest not in stored]
            orphans = [i for i in waiting if self.store.claim(i.key.digest)]
            if orphans:
                yield from batches(orphans)
                waiting = [i for i in waiting if i not in orphans]
            elif waiting:
                time.sleep(POLL_SECONDS)

    def _encode_claimed(self, batch: list[Item]) -> list[tuple[Item, int]]:
        """Encode and store what nobody has stored in the meantime; returns what that was, and its bytes."""
        try:
            stored = self.store.contains(i.key.digest for i in batch)  # finished by another process before the claim
            todo = [i for i in batch if i.key.digest not in stored]
            made = list(zip(todo, self._run(todo) if todo else [], strict=True))
            for item, cache in made:
                self.store.put(cache, title=item.title, namespace=self.namespace, ttl=self.ttl)
            return [(item, cache.nbytes) for item, cache in made]
        finally:
            for item in batch:
                self.store.release(item.key.digest)

    def _plain_size(self, items: Sequence[Item]) -> int:
        """Bytes of documents that are not compressed."""
        around = (len(self.encoding.before) + len(self.encoding.after)) if self.encoding.keep else 0
        return sum(len(i.ids) + around for i in items) * self.model.bytes_per_token


def batches(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Groups of like length whose padded size stays under BATCH_TOKENS."""
    group: list[Item] = []
    for item in sorted(items, key=lambda i: len(i.ids)):
        longest = len(item.ids)
        if group and (longest * (len(group) + 1) > BATCH_TOKENS or longest > PADDING * len(group[0].ids) + 16):
            yield group
            group = []
        group.append(item)
    if group:
        yield group

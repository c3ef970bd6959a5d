"""The documents of a tenant: encoded in the background, listed, verified, pinned, deleted."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from kvilt.engine.encoder import Item
from kvilt.engine.engine import Engine
from kvilt.errors import DamagedCache, KviltError
from kvilt.rows.rows import whole
from kvilt.serve.asking import Engines, Question, is_digest, readable
from kvilt.serve.wire import Refused
from kvilt.serve.worker import Worker
from kvilt.stores.store import Entry
from kvilt.types import CacheKey

REMEMBERED = 4096  # documents whose encoding is remembered
LISTED = 1000  # documents in one answer


@dataclass
class Pending:
    """A document that waits to be encoded, is encoded, or could not be."""

    item: Item
    status: str = "queued"  # queued, encoding, stored, failed
    error: str | None = None
    ends: Future[None] = field(default_factory=Future)

    def end(self, status: str, error: str | None = None) -> None:
        """What came of it."""
        self.status, self.error = status, error
        if not self.ends.done():
            self.ends.set_result(None)


class Library:
    """What the routes of documents do. `add` runs in the worker, everything else anywhere."""

    def __init__(
        self, engines: Engines, worker: Worker, encoded: Callable[[], object], shared: Callable[[], object]
    ) -> None:
        self.engines, self.worker, self.store = engines, worker, engines.base.store
        self._encoded, self._shared = encoded, shared
        self._pending: OrderedDict[tuple[str, str], Pending] = OrderedDict()

    @property
    def waiting(self) -> int:
        """Documents that wait to be encoded."""
        return sum(not p.ends.done() for p in list(self._pending.values()))

    def add(self, question: Question, system: str | None) -> tuple[list[dict[str, Any]], list[Pending]]:
        """Queue the documents that are missing; all of them as they are now, and what there is to wait for."""
        engine, _, documents = question.ready(self.engines)
        engine = engine if system is None else engine.with_system(system)
        items = engine.encoder.items(documents)
        there, todo, waits = self.store.contains(i.key.digest for i in items), list[Pending](), list[Pending]()
        for item in items:
            known = self._pending.get(place := (question.namespace, item.key.digest))
            if item.key.digest in there:
                continue
            if known is None or known.ends.done():
                known = self._pending[place] = Pending(item)
                todo.append(known)
            else:
                self._shared()
            waits.append(known)
        while len(self._pending) > REMEMBERED:
            self._pending.popitem(last=False)
        if todo:
            self.worker.background(self._encode(engine, todo))
        return [self.told(question.namespace, i.key.digest, i) for i in items], waits

    def _encode(self, engine: Engine, todo: Sequence[Pending]) -> Iterator[None]:
        """Encode one document with every step."""
        try:
            for pending in todo:
                if pending.ends.done():  # deleted meanwhile
                    continue
                pending.status = "encoding"
                try:
                    engine.encode([pending.item.document])
                    pending.end("stored")
                    self._encoded()
                except KviltError as error:
                    pending.end("failed", str(error))
                yield
        finally:
            for pending in todo:
                if not pending.ends.done():
                    pending.end("failed", "the server ends.")

    def told(self, namespace: str, digest: str, item: Item | None = None) -> dict[str, Any]:
        """What is known of one document. Raises Refused (404) where nothing is."""
        entry, pending = self._entry(namespace, digest), self._pending.get((namespace, digest))
        if entry is not None:
            return _shown(entry)
        known = item or (pending.item if pending and pending.status != "stored" else None)
        if known is None:
            raise Refused(404, f"no document {digest!r:.80} is stored.")
        status = pending.status if pending and pending.status != "stored" else "missing"
        told = {"id": digest, "object": "document", "title": known.title, "tokens": len(known.ids), "stored": False}
        return {**told, "status": status, "error": pending.error if pending else None}

    def read(self, namespace: str, digest: str) -> dict[str, Any]:
        """The same with the document's text, as the model reads it."""
        told = self.told(namespace, digest)
        caches = self.store.get_many([self._key(namespace, digest)], counted=False) if told["stored"] else []
        ids = [i for cache in caches if cache is not None for i in cache.own_tokens.tolist()]
        return {**told, "text": self.engines.base.text.tokenizer.decode(ids, clean_up_tokenization_spaces=False)}

    def listed(self, namespace: str, limit: int, after: str | None) -> dict[str, Any]:
        """Stored documents of this model, oldest first."""
        own = [e for e in self.store.entries(namespace) if readable(self.engines.base, e.fields)]
        start = next((n for n, e in enumerate(own, 1) if e.key == after), 0)
        page = own[start : start + limit]
        more = start + limit < len(own)
        return {"object": "list", "data": [_shown(e) for e in page], "total": len(own), "has_more": more}

    def verify(self, namespace: str, digest: str) -> dict[str, Any]:
        """Read a document completely; a damaged one is set aside."""
        key, reason = self._key(namespace, digest), None
        try:
            (cache,) = self.store.get_many([key])
            reason = "it is damaged, or was deleted meanwhile: it is not served." if cache is None else None
            if cache is not None and cache.rows is not None:
                whole(cache.rows)
        except DamagedCache as error:
            self.store.set_aside(digest, error.reason)
            reason = error.reason
        return {"id": digest, "ok": reason is None, "reason": reason}

    def pin(self, namespace: str, digest: str, pinned: bool = True) -> dict[str, Any]:
        """Keep a document from eviction."""
        self._key(namespace, digest)
        self.store.pin(digest, pinned)
        return {"id": digest, "pinned": pinned}

    def unpin(self, namespace: str, digest: str) -> dict[str, Any]:
        """Let a document be evicted."""
        return self.pin(namespace, digest, False)

    def delete(self, namespace: str, digest: str) -> dict[str, Any]:
        """Delete a document, stored or waiting."""
        pending = self._pending.pop((namespace, digest), None)
        waited = pending is not None and not pending.ends.done()
        if pending is not None:
            pending.end("failed", "it was deleted.")
        if not (is_digest(digest) and self.store.delete(digest, namespace)) and not waited:
            raise Refused(404, f"no document {digest!r:.80} is stored.")
        return {"id": digest, "object": "document", "deleted": True}

    def _entry(self, namespace: str, digest: str) -> Entry | None:
        entry = self.store.entry(digest) if is_digest(digest) else None
        return entry if entry is not None and entry.namespace == namespace else None

    def _key(self, namespace: str, digest: str) -> CacheKey:
        entry = self._entry(namespace, digest)
        if entry is None or not readable(self.engines.base, entry.fields):
            raise Refused(404, f"no document {digest!r:.80} is stored.")
        return CacheKey(**entry.fields)


def _shown(entry: Entry) -> dict[str, Any]:
    """A stored document."""
    encoding = entry.fields.get("encoding", "")
    kind = "system" if entry.title == "system" and encoding == "plain" else "document"
    names = ("title", "tokens", "bytes", "hits", "pinned", "created", "used")
    told = {"id": entry.key, "object": "document", "kind": kind, **{name: getattr(entry, name) for name in names}}
    more = {"encoding": encoding, "compression": entry.fields.get("compression", "")}
    return {**told, **more, "stored": True, "status": "stored"}

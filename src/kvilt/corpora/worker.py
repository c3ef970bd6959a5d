"""What encodes a part of a corpus, wherever it runs: the model and the store are opened once, and caches go straight into the
store. What is handed back is ids, keys and sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kvilt import registry
from kvilt.corpora.sources import DOCUMENTS, Part, batched, read
from kvilt.engine.encoder import Item, batches
from kvilt.engine.engine import Engine
from kvilt.errors import DocumentError, KviltError, StoreError, StoreUnavailable, UserError
from kvilt.types import Document, DocumentCache


@dataclass(frozen=True)
class Job:
    """What every worker of a run is told; it can be written as JSON. The fields are options of `Engine.load`."""

    model: str
    strategy: str = registry.DEFAULT
    store: str = "disk"
    system: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    namespace: str = "shared"
    compress: str = ""
    trust_remote_code: bool = False
    ttl: float | None = None  # seconds


@dataclass
class Outcome:
    """What became of a part: a row for every document, and why others could not be encoded."""

    rows: list[dict[str, Any]] = field(default_factory=list)  # id, key, tokens, bytes (of new ones)
    failed: list[str] = field(default_factory=list)


Runner = Callable[[Job, Sequence[Part], int], Iterator[Outcome]]  # the number is of workers


class Worker:
    """Encodes parts with a model that is loaded once. Raises UserError where it cannot be."""

    def __init__(self, job: Job) -> None:
        options = {name: value for name, value in vars(job).items() if name != "ttl"}
        self.ttl, self.engine = job.ttl, Engine.load(**options)

    def __call__(self, part: Part) -> Outcome:
        """Encode what is missing of a part. Raises StoreUnavailable."""
        made = Outcome()
        for some in batched(read(part), DOCUMENTS):
            made.failed += [str(problem) for problem in some if isinstance(problem, DocumentError)]
            self._encode([document for document in some if isinstance(document, Document)], made)
        return made

    def _encode(self, documents: Sequence[Document], made: Outcome) -> None:
        """Batches are those of all documents, whether they are there or not: so a document's bytes do not depend on which
        others an earlier run has stored."""
        encoder, store = self.engine.encoder, self.engine.store
        items = encoder.items(documents, made.failed)
        unique = {item.key.digest: item for item in reversed(items)}  # of several the first one gives the name
        sizes: dict[str, int | None] = dict.fromkeys(store.contains(unique))
        for batch in batches(reversed(unique.values()), lambda i: len(i.ids)):
            if sizes.keys() >= {item.key.digest for item in batch}:
                continue
            for item, cache in self._made(batch, made.failed):
                if item.key.digest not in sizes:
                    new = store.put(cache, title=item.title, ttl=self.ttl)
                    sizes[item.key.digest] = cache.nbytes if new else None
        made.rows += [
            {"id": i.document.id, "key": i.key.digest, "tokens": len(i.ids), "bytes": sizes[i.key.digest]}
            for i in items
            if i.key.digest in sizes
        ]

    def _made(self, batch: Sequence[Item], failed: list[str]) -> Iterator[tuple[Item, DocumentCache]]:
        """The caches of a batch; where it does not fit the device's memory, of one document after another."""
        try:
            yield from zip(batch, self.engine.encoder.make(batch), strict=True)
        except RuntimeError as error:
            if len(batch) == 1:
                failed.append(f"document {batch[0].title!r} cannot be encoded: {error}")
                return
            for item in batch:
                yield from self._made([item], failed)


class Clerk:
    """A worker for other processes: parts and outcomes are JSON, and what Kvilt raises is an outcome, too."""

    def __init__(self, job: Job) -> None:
        self.problem = ""
        try:
            self.worker = Worker(job)
        except KviltError as error:
            self.problem = _problem(error)

    def __call__(self, part: str) -> str:
        """The outcome of a part; `outcome_of` reads it."""
        try:
            return self.problem or json.dumps(asdict(self.worker(Part(**json.loads(part)))))
        except KviltError as error:
            return _problem(error)


def _problem(error: KviltError) -> str:
    return json.dumps({"error": str(error), "store": isinstance(error, StoreError)})


def outcome_of(answer: str) -> Outcome:
    """What a clerk says. Raises UserError, StoreUnavailable where it does."""
    data = json.loads(answer)
    if "error" in data:
        raise (StoreUnavailable if data["store"] else UserError)(data["error"])
    return Outcome(**data)

"""A corpus encoded by one process, several, or the actors of a Ray cluster; all of them run `Worker`.

The store is what has been done: a run that was stopped is continued by starting it again, and what exists is skipped. Workers
put caches straight into the store; what they hand back is ids, keys and sizes."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from kvilt import registry
from kvilt.compress.base import Compression
from kvilt.corpora.processes import in_processes
from kvilt.corpora.sources import Part, split
from kvilt.corpora.worker import Job, Outcome, Runner, Worker
from kvilt.engine.encoder import EncodeReport
from kvilt.errors import DocumentError, UserError
from kvilt.types import Document

TABLES = ("documents.jsonl", "failed.jsonl")
Told = Callable[[int, int, str], None]  # parts that are done, parts in all, and what that is for people


def encode_corpus(
    source: str | Iterable[str | Document],
    model: str,
    strategy: str = registry.DEFAULT,
    store: str = "disk",
    *,
    workers: int = 1,
    run: Runner | None = None,
    columns: str = "",
    tables: Path | str | None = None,
    on_progress: Told | None = None,
    on_skip: Callable[[str], None] = lambda path: None,
    **options: Any,
) -> EncodeReport:
    """Encode and store what is missing of paths, URLs or documents; what cannot be encoded is in the report.

    `workers` processes of this machine share the work, or, with `run=kvilt.integrations.ray.on_ray(address)`, actors of Ray.
    `tables` is a folder for documents.jsonl (id, key, tokens, bytes) and failed.jsonl. `options` are those of
    `Job`. Raises UserError, StoreUnavailable."""
    job = Job(model, strategy, store, **options)
    _check(job, workers, shared=workers > 1 or run is not None)
    paths = [source] if isinstance(source, str) else source
    began, found = time.perf_counter(), list(split(paths, columns, on_skip))
    parts = [part for part in found if isinstance(part, Part)]
    total = _Total([str(problem) for problem in found if isinstance(problem, DocumentError)])
    if not parts:
        raise DocumentError(" ".join(total.failed) or "no documents to encode.")
    with _tables(tables) as files:
        total.write(files, Outcome(failed=list(total.failed)))
        for number, outcome in enumerate((run or _here)(job, parts, workers), 1):
            total.add(outcome)
            total.write(files, outcome)
            if on_progress:
                r = total.report(time.perf_counter() - began)
                on_progress(number, len(parts), f"{r.documents:,} documents, {r.tokens / r.seconds:,.0f} tokens/s")
    return total.report(time.perf_counter() - began)


def _here(job: Job, parts: Sequence[Part], workers: int) -> Iterator[Outcome]:
    """The outcomes of all parts, in the order in which they are done."""
    return map(Worker(job), parts) if workers == 1 else in_processes(job, parts, workers)


def _check(job: Job, workers: int, *, shared: bool) -> None:
    """Raise UserError for what can be seen to be wrong before anything is loaded or started."""
    if workers < 1:
        raise UserError(f"workers={workers}: a whole number from 1.")
    if job.ttl is not None and not 0 < job.ttl < float("inf"):
        raise UserError(f"ttl={job.ttl!r}: a document's time to live is a number of seconds above 0.")
    if shared and job.store.partition(":")[0] == "memory":
        raise UserError("a store in memory ends with the worker that fills it: give one that workers share, like disk.")
    registry.build("strategy", job.strategy)
    Compression.of(job.compress)


class _Total:
    """What all parts come to."""

    def __init__(self, failed: list[str]) -> None:
        self.failed, self.keys = failed, set[str]()
        self.encoded = self.tokens = self.bytes = 0

    def add(self, outcome: Outcome) -> None:
        new = [row for row in outcome.rows if row["bytes"] is not None and row["key"] not in self.keys]
        new = list({row["key"]: row for row in new}.values())
        self.keys |= {row["key"] for row in outcome.rows}
        self.failed += outcome.failed
        self.encoded += len(new)
        self.tokens += sum(row["tokens"] for row in new)
        self.bytes += sum(row["bytes"] for row in new)

    def write(self, files: Sequence[IO[str]], outcome: Outcome) -> None:
        for file, rows in zip(files, (outcome.rows, [{"error": error} for error in outcome.failed]), strict=False):
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()

    def report(self, seconds: float) -> EncodeReport:
        count = len(self.keys)
        return EncodeReport(
            count, self.encoded, count - self.encoded, self.tokens, self.bytes, seconds, tuple(self.failed)
        )


@contextlib.contextmanager
def _tables(folder: Path | str | None) -> Iterator[list[IO[str]]]:
    """The two tables of a run, written as it goes on."""
    with contextlib.ExitStack() as stack:
        try:
            if folder is not None:
                os.makedirs(folder, exist_ok=True)
            yield [stack.enter_context(open(Path(folder, n), "w")) for n in TABLES] if folder is not None else []
        except OSError as error:
            raise UserError(f"cannot write the tables in {folder}: {error.strerror}.") from error

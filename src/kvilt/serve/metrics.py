"""Counters for Prometheus, each with what it is a share of, and the audit log: one JSON line for every answer."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kvilt.errors import StoreError, UserError
from kvilt.serve.worker import Worker
from kvilt.stores.store import Store

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """A registry of its own: two servers in one process do not count together."""

    def __init__(self, worker: Worker, store: Store) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter("kvilt_requests", "Requests by route and status.", ["route", "status"], registry=r)
        self.ttft = Histogram("kvilt_ttft_seconds", "From arrival to the first token.", registry=r, buckets=SECONDS)
        self.steps = Histogram("kvilt_step_seconds", "Parts of an answer.", ["step"], registry=r, buckets=SECONDS)
        self.prompt = Counter("kvilt_prompt_tokens", "Tokens of prompts: reused or computed.", ["how"], registry=r)
        self.kept = Counter("kvilt_kept_tokens", "Reused tokens whose rows an earlier prompt left.", registry=r)
        self.written = Counter("kvilt_generated_tokens", "Tokens of answers.", registry=r)
        self.documents = Counter("kvilt_documents", "Documents of prompts: hit, miss, damaged.", ["how"], registry=r)
        self.loaded = Counter("kvilt_loaded_bytes", "Bytes read from the store for answers.", registry=r)
        self.encoded = Counter("kvilt_encoded_documents", "Documents encoded in the background.", registry=r)
        waits = "Documents asked for while they waited to be encoded already."
        self.shared = Counter("kvilt_single_flight_waits", waits, registry=r)
        self.gauge("kvilt_queue_requests", "Requests that wait.", lambda: worker.waiting)
        self.gauge("kvilt_queue_limit", "Requests that may wait.", lambda: worker.limit)
        self.gauge("kvilt_running_requests", "Requests that are answered now.", lambda: worker.current is not None)
        self.store, names = store, ("bytes", "budget_bytes", "documents")
        self.tiers = [Gauge(f"kvilt_store_{n}", f"The store's {n} by tier.", ["tier"], registry=r) for n in names]

    def gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A number that is looked up when somebody asks."""
        Gauge(name, about, registry=self.registry).set_function(value)

    def answered(self, receipt: dict[str, Any], written: int) -> None:
        """Count an answer."""
        self.ttft.observe(receipt["ttft"])
        for step, seconds in receipt["steps"].items():
            self.steps.labels(step).observe(seconds)
        for how in ("reused", "computed"):
            self.prompt.labels(how).inc(receipt[f"{how}_tokens"])
        for how, name in (("hit", "hits"), ("miss", "misses"), ("damaged", "damaged")):
            self.documents.labels(how).inc(receipt[name])
        self.kept.inc(receipt["kept_tokens"])
        self.loaded.inc(receipt["bytes_loaded"])
        self.written.inc(written)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        for number, catalogue in enumerate(self.store.catalogues):
            with contextlib.suppress(StoreError, OSError):
                stats, tier = catalogue.stats(), f"{number} {type(catalogue.blobs).__name__.lower()}"
                for gauge, value in zip(self.tiers, (stats.bytes, stats.budget, stats.entries), strict=True):
                    gauge.labels(tier).set(float("inf") if value is None else value)
        return bytes(generate_latest(self.registry))


class Audit:
    """One JSON line for every answer: who asked, what was reused and what not. Never a text."""

    def __init__(self, path: Path | None) -> None:
        try:
            self._file: BinaryIO | None = None if path is None else path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"cannot write the audit log {path}: {error.strerror}.") from error

    def note(self, route: str, namespace: str, receipt: dict[str, Any], **more: Any) -> None:
        """Write one line. A disk that is full costs no answer."""
        if self._file is None:
            return
        names = ("strategy", "reused_tokens", "computed_tokens", "charged", "hits", "misses", "damaged", "ttft", "note")
        told = {name: receipt[name] for name in names}
        documents = [{"id": d["id"], "hit": d["hit"]} for d in receipt["documents"]]
        who = hashlib.sha256(namespace.encode()).hexdigest()[:16]
        line = {"time": round(time.time(), 3), "route": route, "tenant": who, **more, **told, "documents": documents}
        with contextlib.suppress(OSError):
            self._file.write(msgspec.json.encode(line) + b"\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

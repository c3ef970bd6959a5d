"""What a corpus will take and cost: bytes, time and money, beside prefilling the same documents with every request.

Seconds are measured by a short probe on this machine: two documents are encoded, and one request of the size in question is
answered from a folder on the local disk. Prefilling is extrapolated from the speed of encoding, linearly in tokens, which is
kind to it: attention's share grows faster than the prompt."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvilt.engine.encoder import Encoder, EncodeReport, Item
from kvilt.engine.engine import Engine
from kvilt.stores.disk import DiskStore
from kvilt.types import Document

LOOKED_AT = 64  # documents among which the probe's are found
SAMPLE = 2
QUESTION = "What is this about?"
SPARE = 256  # tokens of a request that are no documents
MILLION = 1_000_000


@dataclass(frozen=True)
class Estimate:
    """What encoding would do and cost, in the currency of the prices. What could not be measured is 0."""

    report: EncodeReport
    encoding: float  # once
    storage_month: float
    request_tokens: int = 0  # of its documents
    prefill_s: float = 0.0  # to the first token of a request, everything computed
    reuse_s: float = 0.0  # to the first token of a request, caches loaded from the local disk
    prefill_million: float = 0.0  # of requests
    reuse_million: float = 0.0
    break_even_month: float | None = (
        None  # requests from which on storing is cheaper than prefilling; None: it never is
    )


def dry_run(encoder: Encoder, documents: Sequence[Document], sample: int = SAMPLE) -> EncodeReport:
    """What `encoder.encode` would do: documents, bytes, and seconds extrapolated from encoding `sample` of them unstored."""
    failed = list[str]()
    count, missing = encoder.missing(documents, failed)
    tried = sorted(missing, key=lambda i: len(i.ids))[len(missing) // 2 :][:sample]
    began = time.perf_counter()
    size = sum(cache.nbytes for item in tried for cache in encoder.make([item]))
    rate = sum(len(i.ids) for i in tried) / max(time.perf_counter() - began, 1e-9)
    tokens, share = sum(len(i.ids) for i in missing), size / max(_plain_size(encoder, tried), 1)
    size, seconds = round(share * _plain_size(encoder, missing)), tokens / rate if tried else 0.0
    return EncodeReport(count, len(missing), count - len(missing), tokens, size, seconds, tuple(failed))


def _plain_size(encoder: Encoder, items: Sequence[Item]) -> int:
    """Bytes of documents that are not compressed."""
    e = encoder.encoding
    around = (len(e.before) + len(e.after)) if e.keep else 0
    return sum(len(i.ids) + around for i in items) * encoder.model.bytes_per_token


def estimate(
    engine: Engine, documents: Sequence[Document], *, gb_month: float, gpu_hour: float, per_request: int
) -> Estimate:
    """What encoding the documents would take; nothing is stored.

    `gb_month` is the price of a GB kept for a month, `gpu_hour` that of an hour of this machine; a request holds
    `per_request` documents. Takes as long as encoding four documents and answering one request."""
    report, encoder = dry_run(engine.encoder, documents), engine.encoder
    items = sorted(encoder.items(documents[:LOOKED_AT], []), key=lambda i: len(i.ids))
    chosen = items[len(items) // 2 :][:SAMPLE]
    once, month = report.seconds / 3600 * gpu_hour, report.bytes / 1e9 * gb_month
    if not chosen:
        return Estimate(report, once, month)
    mean, room = sum(len(i.ids) for i in items) / len(items), engine.model.context_length - SPARE
    count = max(1, min(per_request, room // max(len(chosen[-1].ids), 1)))
    asked = [chosen[i % len(chosen)] for i in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        store = DiskStore(folder)
        probe = Engine(engine.model, engine.text, engine.strategy, store, engine.namespace, engine.compression)
        began = time.perf_counter()
        tokens = probe.encode([i.document for i in chosen]).tokens
        rate = report.tokens / report.seconds if report.seconds else tokens / (time.perf_counter() - began)
        for _ in range(2):  # the first one is slower
            usage = probe.answer(QUESTION, [i.document for i in asked], max_new_tokens=1).usage
        store.close()
    wanted = round(mean * per_request)
    prefill, reuse = wanted / rate, usage.ttft_s * wanted / sum(len(i.ids) for i in asked)
    computed, reused = (MILLION * seconds / 3600 * gpu_hour for seconds in (prefill, reuse))
    pays = MILLION * month / (computed - reused) if computed > reused else None
    return Estimate(report, once, month, wanted, prefill, reuse, computed, reused, pays)

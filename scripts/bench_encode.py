"""Encoding a thousand documents: the rate from first to last, beside plain batched prefill of the same tokens.

Run: python scripts/bench_encode.py OUT.json [--shape llama-30m] [--documents 1000] [--batch 8] [--dtype auto]
Everything that `kvilt encode` pays is inside: tokenising, keys, the pass, digests, files on disk with fsync, the
catalogue. Prefill is the model alone, in the same batches, before and after."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from kvilt.engine.encoder import Progress
from kvilt.engine.engine import Engine
from kvilt.lab.bench.subject import DOCUMENT_TOKENS, Subject, random_subject, text_of
from kvilt.lab.bench.timing import machine
from kvilt.registry import build
from kvilt.types import Document


@torch.no_grad()
def prefill(subject: Subject, batch: int, passes: int = 20) -> float:
    """Tokens per second of the model alone, in batches of documents; the median of some passes."""
    ids = torch.stack([subject.text.document_ids(d) for d in subject.texts[:batch]])
    positions, base = torch.arange(ids.shape[1])[None], subject.model.hf.base_model
    taken = []
    for _ in range(passes):
        began = time.perf_counter()
        base(input_ids=ids, position_ids=positions, use_cache=False)
        taken.append(time.perf_counter() - began)
    return ids.numel() / statistics.median(taken)


def encoded(subject: Subject, count: int) -> list[float]:
    """Tokens per second of every tenth of the documents."""
    documents = [Document(text_of(DOCUMENT_TOKENS, seed=10_000 + i), id=str(i)) for i in range(count)]
    marks = [(0, time.perf_counter())]

    def note(progress: Progress) -> None:
        if progress.tokens >= marks[-1][0] + count * DOCUMENT_TOKENS // 10:
            marks.append((progress.tokens, time.perf_counter()))

    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(subject.model, subject.text, build("strategy", "naive"), build("store", f"disk:path={folder}"))  # type: ignore[arg-type]
        marks[0] = (0, time.perf_counter())
        engine.encode(documents, on_progress=note)
        engine.store.close()
    return [(b[0] - a[0]) / (b[1] - a[1]) for a, b in itertools.pairwise(marks)]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="llama-30m")
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    subject = random_subject(options.shape, options.dtype)
    before = prefill(subject, options.batch)
    rates = encoded(subject, options.documents)
    plain = statistics.median([before, prefill(subject, options.batch)])
    result: dict[str, Any] = {
        "machine": machine(),
        "shape": options.shape,
        "dtype": str(subject.model.shape.dtype).removeprefix("torch."),
        "documents": options.documents,
        "prefill_tokens_per_s": plain,
        "tenths_tokens_per_s": rates,
        "of_prefill": statistics.median(rates) / plain,
        "last_of_first": rates[-1] / rates[0],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""Does a corpus go N times as fast with N workers? python scripts/bench_corpora.py [OUT.json]

One and two workers take turns, as processes and as actors of a Ray on this machine, one thread each, on the built-in model. Two
speeds are taken between the first part that is done and the last: tokens by the clock, and tokens by the second of processor time
that the workers used. The second one is what a machine with a free core for each worker would give; where other work runs
beside, the first one is not."""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kvilt.corpora.encode import encode_corpus
from kvilt.corpora.processes import in_processes
from kvilt.integrations.ray import on_ray

DOCUMENTS, GROUP, WORDS, ROUNDS = 384, 16, 90, 3
WORKERS = {
    "processes": "kvilt.corpora.processes",
    "ray": "ray::",
}  # how their command lines begin or what stands in them
TICK = os.sysconf("SC_CLK_TCK")


def processor_seconds(mark: str) -> float:
    """Processor time of all worker processes so far."""
    total = 0.0
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path("/proc", entry, "cmdline").read_bytes().replace(b"\0", b" ").decode()
            fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if mark in line and "IDLE" not in line:
            total += (int(fields[11]) + int(fields[12])) / TICK
    return total


def measure(kind: str, workers: int, corpus: Path, folder: Path) -> dict[str, float]:
    """Tokens a second by the clock and by the processor."""
    seen: list[tuple[float, float, int]] = []
    rows = folder / "tables" / "documents.jsonl"

    def note(done: int, parts: int, text: str) -> None:
        if done in (workers + 1, parts - workers):  # every worker has begun; none has run out of parts
            tokens = sum(json.loads(line)["tokens"] for line in rows.read_text().splitlines())
            seen.append((time.perf_counter(), processor_seconds(WORKERS[kind]), tokens))

    run = on_ray() if kind == "ray" else in_processes
    store = f"disk:path={folder / 'store'}"
    encode_corpus(
        str(corpus), "builtin", store=store, workers=workers, run=run, tables=folder / "tables", on_progress=note
    )
    (began, used, first), (ended, spent, last) = seen
    return {"clock": (last - first) / (ended - began), "processor": (last - first) / (spent - used)}


def main() -> None:
    """Measure in turns and write the result."""
    os.environ["OMP_NUM_THREADS"] = "1"
    chance, found = random.Random(0), {(k, n): [] for k in WORKERS for n in (1, 2)}  # type: dict[tuple[str, int], list[Any]]
    words = [f"word{i}" for i in range(200)]
    texts = [" ".join(chance.choices(words, k=WORDS + chance.randrange(20))) for _ in range(DOCUMENTS)]
    load = []
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name, "corpus.parquet")
        pq.write_table(pa.table({"text": texts}), corpus, row_group_size=GROUP)
        for turn in range(ROUNDS):
            for (kind, workers), results in found.items():
                results.append(measure(kind, workers, corpus, Path(name, f"{kind}-{workers}-{turn}")))
                load.append(os.getloadavg()[0])
                print(kind, workers, results[-1], f"load {load[-1]:.1f}", file=sys.stderr, flush=True)
    made: dict[str, Any] = {"documents": DOCUMENTS, "rounds": ROUNDS, "cores": os.cpu_count(), "load": load}
    for (kind, workers), results in found.items():
        made[f"{kind} {workers}"] = {way: [r[way] for r in results] for way in results[0]}
        made[f"{kind} {workers}"]["median"] = {way: statistics.median(r[way] for r in results) for way in results[0]}
    Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/corpora.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The same answer from every kind of store, on servers that this script starts: python scripts/bench_stores.py

Time to first token at 5,000 tokens from memory, disk, Redis and an object store (moto, over HTTP) beside full prefill; loading
from the object store beside raw ranged GETs of the same bytes by the same client; and 1,000 novel questions of 14 documents each
over 500 documents, where memory holds a tenth of them. About five minutes on two cores; `--shape llama-30m --questions 200`
takes one. Writes benchmarks/stores.json and stores.md, with what million.json says of large stores."""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "stores"))  # the servers that the tests start

import servers  # noqa: E402

from kvilt.engine.engine import Engine  # noqa: E402
from kvilt.lab.bench.subject import Subject, named_subject, random_subject  # noqa: E402
from kvilt.registry import build  # noqa: E402
from kvilt.stores.remote.parts import PART  # noqa: E402
from kvilt.types import Document  # noqa: E402

COUNT, REPEATS = 10, 3  # documents of 500 tokens; runs, in turns, after one that warms up
PROMPT, STORED = 14, 500  # documents of a question, and in the store


def stores(folder: str, moto: str, redis: str) -> dict[str, str]:
    """A specification for each kind."""
    return {
        "memory": "memory:budget=4GB",
        "disk": f"disk:path={folder}/disk,budget=20GB",
        "redis": f"redis:url={redis}",
        "object": f"object:url=s3://kvilt/stores,endpoint={moto}",
        "memory over object": f"tiered:memory:budget=4GB|object:url=s3://kvilt/stores,endpoint={moto}",
    }


def first_tokens(subject: Subject, specs: dict[str, str]) -> dict[str, Any]:
    """Seconds to the first token: full prefill once, then all stores in turns, each time in another order of documents."""
    documents = subject.documents(COUNT)
    times: dict[str, list[float]] = {name: [] for name in specs}
    steps: dict[str, dict[str, float]] = {}
    engines = {
        name: Engine(subject.model, subject.text, build("strategy", "block"), build("store", s))
        for name, s in specs.items()
    }
    memory = engines["memory"]
    encoding = timed(lambda: memory.encode(documents))
    keys = [entry.key for entry in memory.store.entries()]
    for name, engine in engines.items():
        if name != "memory":
            copy(memory.store, engine.store, keys)
    full = Engine(subject.model, subject.text, build("strategy", "full"), memory.store)
    alone = full.answer(subject.question, documents, max_new_tokens=1).usage.ttft_s
    for turn in range(REPEATS + 1):
        order = random.Random(turn).sample(documents, COUNT)
        for name, engine in engines.items():
            usage = engine.answer(subject.question, order, max_new_tokens=1).usage
            assert usage.misses == 0, (name, usage)
            times[name] += [usage.ttft_s] if turn else []
            steps[name] = usage.steps_s
    size = memory.store.stats().bytes
    for engine in engines.values():
        engine.store.close()
    rows = {name: {"ttft_s": spread(each), "steps_s": steps[name]} for name, each in times.items()}
    return {"full_s": alone, "encode_s": encoding, "bytes": size, "stores": rows}


def copy(source: Any, target: Any, keys: Sequence[str]) -> None:
    """Document files as they are."""
    for key in keys:
        (blob,) = source.last.get_many([key])
        data = bytearray(blob.size)
        blob.read(0, [memoryview(data)])
        target.take(key, bytes(data))


def loading(spec: str) -> dict[str, Any]:
    """Bytes per second of documents read layer by layer and checked, and of raw ranged GETs of the same bytes, in turns."""
    from kvilt.types import CacheKey

    store = build("store", spec)
    entries, blobs = [e for e in store.entries() if e.title != "system"], store.last.blobs  # documents are of one size
    keys, size = [CacheKey(**entry.fields) for entry in entries], sum(entry.bytes for entry in entries)
    parts = [(blobs.path(e.key), at, min(at + PART, e.bytes)) for e in entries for at in range(0, e.bytes, PART)]
    ours, raw = list[float](), list[float]()

    layers, *block = store.get_many(keys)[0].rows.shape
    buffer = torch.empty(
        len(keys), 2, 2, *block
    )  # two layers of every document, as the engine has it: memory that is there

    def read() -> None:
        caches = store.get_many(keys)
        for first in range(0, layers, 2):
            for cache, into in zip(caches, buffer, strict=True):
                cache.rows.read(slice(first, first + 2), into)

    def get(part: tuple[str, int, int]) -> int:
        return len(memoryview(blobs.api.get_range(blobs.client, part[0], start=part[1], end=part[2])))

    def plain() -> None:
        assert sum(blobs.pool.map(get, parts)) == size

    for turn in range(2 * REPEATS + 1):
        for work, rates in [(read, ours), (plain, raw)][:: 1 if turn % 2 else -1]:
            rates.append(size / timed(work))
    store.close()
    of_raw = [a / b for a, b in zip(ours, raw, strict=True)][1:]
    return {"bytes": size, "ours_per_s": spread(ours[1:]), "raw_per_s": spread(raw[1:]), "of_raw": spread(of_raw)}


def steady(moto: str, questions: int) -> dict[str, Any]:
    """Hits, encoded documents and time to first token, a hundred questions at a time."""
    subject = named_subject("builtin", dtype="float32", device="cpu")
    documents = [Document(f"{number} {subject.texts[number % len(subject.texts)].text}") for number in range(STORED)]
    bucket = f"object:url=s3://kvilt/steady,endpoint={moto}"
    first = Engine(subject.model, subject.text, build("strategy", "block"), build("store", bucket))
    first.encode(documents)
    size = first.store.stats()
    first.store.close()
    spec = f"tiered:memory:budget={size.bytes // 10}|{bucket}"
    engine = Engine(subject.model, subject.text, build("strategy", "block"), build("store", spec))
    chance, told, asked = random.Random(0), list[dict[str, Any]](), set[frozenset[int]]()
    memory, behind = engine.store.stores
    keys = [item.key.digest for item in engine.encoder.items(documents)]
    for _ in range(questions // 100):
        times, near, misses = list[float](), 0, 0
        while len(times) < 100:
            chosen = frozenset(chance.sample(range(STORED), PROMPT))
            if chosen in asked:
                continue
            asked.add(chosen)
            near += len(memory.last.blobs.contains([keys[number] for number in chosen]))
            usage = engine.answer(subject.question, [documents[number] for number in chosen], max_new_tokens=1).usage
            times.append(usage.ttft_s)
            misses += usage.misses
        told.append({"ttft_s": spread(times), "memory_hits": near / (100 * PROMPT), "encoded": misses})
        print(told[-1], flush=True)
    after = len(list(behind.last.list()))
    engine.store.close()
    return {"hundreds": told, "before": size.entries, "after": after, "bytes": size.bytes}


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def lines(told: dict[str, Any], million: dict[str, Any]) -> Iterator[str]:
    """benchmarks/stores.md."""
    yield "# Stores\n\nMade by `python scripts/bench_stores.py` and `python scripts/bench_million.py --most 1000000`."
    if told:
        before, after = told["load"]
        yield f"{told['cpus']} CPU cores, which servers and client share; {told['shape']}, float32;"
        yield f"load average {before:.1f} before, {after:.1f} after."
    for name, section in (("first", first_lines), ("loading", loading_lines), ("steady", steady_lines)):
        yield from section(told[name]) if name in told else ()
    yield from million_lines(million) if million else ()


def first_lines(told: dict[str, Any]) -> Iterator[str]:
    """Time to first token."""
    yield f"\n## Time to first token\n\nTen documents of 500 tokens ({told['bytes'] / 1e6:.0f} MB) and a question of 20, medians of"
    yield f"{REPEATS}. Encoding the documents took {told['encode_s']:.1f} s.\n"
    yield "| Store | TTFT, s | of full prefill |\n|---|---|---|"
    yield f"| full prefill | {told['full_s']:.2f} | 1 |"
    for name, row in told["stores"].items():
        t = row["ttft_s"]
        yield f"| {name} | {t['median']:.3f} ({t['min']:.3f} to {t['max']:.3f}) | {t['median'] / told['full_s']:.4f} |"


def loading_lines(told: dict[str, Any]) -> Iterator[str]:
    """Loading beside raw GETs."""
    ours, raw = (
        {name: told[which][name] / 1e6 for name in ("median", "min", "max")} for which in ("ours_per_s", "raw_per_s")
    )
    share = told["of_raw"]
    yield "\n## Loading from an object store\n\nThe documents of the table above, read two layers of all documents at a time, every"
    yield "digest checked, beside ranged GETs of the same bytes by the same client on as many connections, in turns:"
    yield f"{ours['median']:.0f} MB/s ({ours['min']:.0f} to {ours['max']:.0f}) beside {raw['median']:.0f} MB/s raw"
    yield f"({raw['min']:.0f} to {raw['max']:.0f}), {share['median']:.2f} of raw ({share['min']:.2f} to {share['max']:.2f})."


def steady_lines(told: dict[str, Any]) -> Iterator[str]:
    """The steady state."""
    count = 100 * len(told["hundreds"])
    yield f"\n## Steady state\n\n{count:,} questions, each about {PROMPT} of {STORED} documents (the built-in model);"
    yield f"no set is asked about twice. Memory holds a tenth of the {told['bytes'] / 1e6:.0f} MB, an object store all.\n"
    yield "| Questions | found in memory | encoded anew | TTFT, ms, median (smallest to largest) |\n|---|---|---|---|"
    for number, row in enumerate(told["hundreds"]):
        t = {name: 1e3 * row["ttft_s"][name] for name in ("median", "min", "max")}
        span = f"{100 * number + 1} to {100 * number + 100}"
        yield f"| {span} | {row['memory_hits']:.1%} | {row['encoded']} | {t['median']:.1f} ({t['min']:.1f} to {t['max']:.1f}) |"
    yield f"\nThe store held {told['before']} documents before and {told['after']} after."


def million_lines(told: dict[str, Any]) -> Iterator[str]:
    """Large stores."""
    yield f"\n## A million documents\n\nFiles of {told['bytes']} bytes in a folder, read as a disk store and as a bucket through"
    yield f"obstore's `file://`, every figure in a process of its own, on {told['cpus']} cores; load average"
    yield f"{told['load']:.1f} before, {told['load_after']:.1f} after. Rates are entries per second, in brackets"
    yield "per second of CPU time.\n"
    yield "![curves](million.png)\n"
    yield "| Documents | as | rebuild | listing | names alone | look-up, us | put, us | put and evict, us | peak MB |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for count, kinds in told["sizes"].items():
        for kind, row in kinds.items():
            phases = [row[phase] for phase in ("rebuild", "listing", "names")]
            rates = [f"{each['per_s']:,.0f} ({each['per_cpu_s']:,.0f})" for each in phases]
            times = [f"{each['median_us']:,.0f}" for each in (row["lookup"]["entry"], row["writing"], row["evicting"])]
            peak = max(each["peak_mb"] for each in phases)
            yield f"| {' | '.join([f'{int(count):,}', kind, *rates, *times, f'{peak:.0f}'])} |"
    yield "\nLook-up, put and eviction are medians of 200. Memory includes SQLite's pages, 32 MB at most."
    yield from [told["note"]] if "note" in told else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-1b")
    parser.add_argument("--questions", type=int, default=1000, help="of the steady state")
    parser.add_argument(
        "--only", action="append", choices=["first", "steady", "none"], help="measure this alone; the rest is kept"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of stores.json and stores.md")
    parser.add_argument("--check", action="store_true", help="only see whether stores.md is what the results make it")
    given = parser.parse_args()
    if given.check:
        assert page(given.out) == (given.out / "stores.md").read_text(), "run scripts/bench_stores.py --only none"
        return
    record, wanted = given.out / "stores.json", set(given.only or ["first", "steady"])
    told: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    if wanted != {"none"}:
        os.environ.update(AWS_ACCESS_KEY_ID=servers.ACCESS, AWS_SECRET_ACCESS_KEY=servers.SECRET)
        told |= {"cpus": os.cpu_count(), "load": [os.getloadavg()[0]]}
        with torch.no_grad():
            told |= measured(wanted, given.shape, given.questions)
        told["load"].append(os.getloadavg()[0])
        record.write_text(json.dumps(told, indent=1) + "\n")
    (given.out / "stores.md").write_text(page(given.out))


def measured(wanted: set[str], shape: str, questions: int) -> dict[str, Any]:
    """The sections that are wanted, on servers that run meanwhile."""
    told: dict[str, Any] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvilt-stores-"))
        moto = stack.enter_context(servers.moto())
        redis = stack.enter_context(servers.redis("--maxmemory", "4gb", "--maxmemory-policy", "allkeys-lfu"))
        specs = stores(folder, moto, redis)
        if "first" in wanted:
            told |= {
                "shape": shape,
                "first": first_tokens(random_subject(shape), specs),
                "loading": loading(specs["object"]),
            }
        if "steady" in wanted:
            told["steady"] = steady(moto, questions)
    return told


def page(out: Path) -> str:
    """benchmarks/stores.md, of the results beside it."""
    records = [
        json.loads(path.read_text()) if (path := out / name).exists() else {}
        for name in ("stores.json", "million.json")
    ]
    return "\n".join(lines(*records)) + "\n"


if __name__ == "__main__":
    main()

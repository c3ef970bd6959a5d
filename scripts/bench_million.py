"""How a store behaves as its documents grow in number: listing, rebuilding the catalogue, look-up, put, eviction, memory.

    python scripts/bench_million.py                     1e3 to 1e5 documents, in about a minute
    python scripts/bench_million.py --most 1000000      the whole curve; 8 GB of disk

The documents are synthetic files of 4 kB (a header and one row), in a folder that is read in two ways: as a disk store, and as
a bucket through obstore's `file://`. Up to 10,000 of them are also put into moto's bucket, over HTTP, where moto sets the pace:
it answers some hundred requests a second. Every figure is taken in a process of its own, whose memory is noted.
Writes benchmarks/million.json and million.png."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "stores"))  # the server that the tests start
SIZES = (1_000, 10_000, 100_000, 1_000_000)
TRIES = 200


def documents(numbers: Iterable[int], there: Callable[[str], bool] = lambda key: False) -> Iterator[tuple[str, bytes]]:
    """Keys and files of documents that differ in their key and title alone; not of those that are there."""
    import torch

    from kvilt.rows.file import pack
    from kvilt.rows.header import DIGEST_AT, seal
    from kvilt.rows.rows import TensorRows
    from kvilt.types import CacheKey, DocumentCache

    tokens, rows = torch.zeros(1, dtype=torch.long), TensorRows(torch.zeros(1, 2, 1, 1, 4))
    key = CacheKey("weights", "tokenizer", "rope", "torch.float32", "encoding", "", "0" * 64)
    made = b"".join(pack(DocumentCache(tokens, torch.zeros(1, dtype=torch.long), 1, key, rows), title="0" * 12))
    length = 8 + int.from_bytes(made[:8], "little")
    head, rest = made[:length], made[length:]
    for number in numbers:
        name = f"{number:064x}"
        new = replace(key, tokens=name).digest
        if not there(new):
            raw = head.replace(key.digest.encode(), new.encode()).replace(b"0" * 64, name.encode(), 2)
            raw = raw.replace(b'"title":"' + b"0" * 12, b'"title":"' + name[-12:].encode())
            yield new, raw[:DIGEST_AT] + seal(raw) + raw[DIGEST_AT + 64 :] + rest


def fill(folder: Path, count: int) -> float:
    """Write the documents that are not there; seconds. Without syncing: this is not what is measured."""
    began, new = time.perf_counter(), not folder.exists()
    for number in range(256):
        (folder / f"{number:02x}").mkdir(parents=True, exist_ok=True)

    def place(key: str) -> str:
        return f"{folder}/{key[:2]}/{key}.safetensors"

    for key, data in documents(range(count), lambda key: not new and os.path.exists(place(key))):
        with open(place(key), "wb") as file:
            file.write(data)
    return time.perf_counter() - began


def upload(url: str, folder: Path) -> None:
    """Put the folder's documents into moto's bucket, without asking for each whether it is there."""
    blobs = store_of(url, str(folder)).last.blobs

    def put(path: Path) -> None:
        blobs.api.put(blobs.client, f"{path.parent.name}/{path.name}", path.read_bytes(), use_multipart=False)

    assert len([*blobs.pool.map(put, folder.glob("??/*.safetensors"))])


def store_of(kind: str, folder: str, budget: int | None = None) -> Any:
    """A store over the folder, or over a bucket where `kind` is a server's URL, with its catalogue in a file beside it."""
    from kvilt.stores.catalogue import Catalogue
    from kvilt.stores.disk import DiskStore
    from kvilt.stores.remote.object import ObjectStore
    from kvilt.stores.store import Store

    if kind == "disk":
        return DiskStore(folder, budget or "1TB")
    path, far = f"{folder}.sqlite", kind.startswith("http")
    made = ObjectStore("s3://kvilt/million" if far else f"file://{folder}", kind if far else "", catalogue=path)
    return made if budget is None else Store(Catalogue(made.last.blobs, made.last.pins, Path(path), "lru", budget))


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def median_us(works: list[Callable[[], object]]) -> dict[str, float]:
    """Median and 95th percentile of calls, in microseconds."""
    times = sorted(1e6 * timed(work) for work in works)
    return {"median_us": statistics.median(times), "p95_us": times[int(0.95 * len(times))]}


def rebuild(store: Any) -> dict[str, Any]:
    """The catalogue is missing: it is built from the headers."""
    seconds = timed(lambda: store.last.read(lambda db: None))
    count = store.stats().entries
    return {"seconds": seconds, "per_s": count / seconds, "entries": count}


def listing(store: Any) -> dict[str, Any]:
    """Every document as `kvilt cache ls` shows it, one by one."""
    store.stats()
    began = time.perf_counter()
    count = sum(1 for _ in store.each())
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "per_s": count / seconds, "entries": count}


def names(store: Any) -> dict[str, Any]:
    """Keys and sizes alone."""
    began = time.perf_counter()
    count = sum(1 for _ in store.last.list())
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "per_s": count / seconds, "entries": count}


def lookup(store: Any) -> dict[str, Any]:
    """Entries of documents chosen at random, then the documents themselves, header and all, opened for the first time."""
    from kvilt.types import CacheKey

    rows = store.last.read(
        lambda db: [row[0] for row in db.execute("SELECT key FROM entries ORDER BY key LIMIT 200000")]
    )
    keys = random.Random(0).sample(rows, TRIES)
    made = {"entry": median_us([lambda key=key: store.entry(key) for key in keys])}
    made["contains"] = median_us([lambda key=key: store.contains([key]) for key in keys])
    full = [CacheKey(**store.entry(key).fields) for key in keys]
    return {**made, "get": median_us([lambda key=key: store.get_many([key]) for key in full])}


def writing(store: Any) -> dict[str, Any]:
    """`put` of new documents; nothing is evicted."""
    os.fsync = lambda fd: None  # a disk's own time is no question of how many documents there are
    first, *new = documents(range(10**9, 10**9 + TRIES + 1))
    store.take(*first)  # the first one compares the catalogue with the folder
    made = median_us([lambda key=key, data=data: store.take(key, data) for key, data in new])
    for key, _ in (first, *new):
        store.delete(key)
    return made


def evicting(store: Any) -> dict[str, Any]:
    """`put` into a full store: every one evicts another."""
    made = writing(store)
    return {**made, "evictions": store.stats().evictions}


PHASES = {f.__name__: f for f in (rebuild, listing, names, lookup, writing, evicting)}


def child(phase: str, kind: str, folder: str, budget: int | None) -> None:
    """One measurement in this process; a line of JSON."""
    store = store_of(kind, folder, budget)
    base, began = peak_mb(), time.process_time()
    made = PHASES[phase](store)
    cpu = time.process_time() - began
    store.close()
    rate = {"per_cpu_s": made["entries"] / cpu} if "entries" in made else {}
    print(json.dumps({**made, **rate, "start_mb": base, "peak_mb": peak_mb()}))


def peak_mb() -> float:
    """The most memory that this process ever had."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def measure(kind: str, folder: Path, count: int) -> dict[str, Any]:
    """All phases over `count` documents."""
    made: dict[str, Any] = {}
    for path in (folder / "catalogue.sqlite", Path(f"{folder}.sqlite")):
        path.unlink(missing_ok=True)
    for phase in PHASES:
        budget = [str(4128 * count)] if phase == "evicting" else []
        command = [sys.executable, __file__, "--child", phase, kind, str(folder), *budget]
        told = subprocess.run(command, check=True, capture_output=True, text=True)
        made[phase] = json.loads(told.stdout.splitlines()[-1])
        print(f"{count:9,} {kind:6} {phase:9} {told.stdout.splitlines()[-1]}", flush=True)
    return made


def plot(told: dict[str, Any], path: Path) -> None:
    """Rates, times and memory over the number of documents."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 5))
    for kind, style in (("disk", "-"), ("file", "--")):
        rows = [(int(count), kinds[kind]) for count, kinds in told["sizes"].items() if kind in kinds]
        x = [count for count, _ in rows]
        name = "disk" if kind == "disk" else "bucket (file://)"
        for phase, label in (("rebuild", "rebuild"), ("listing", "listing"), ("names", "names alone")):
            axes[0].loglog(x, [row[phase]["per_s"] for _, row in rows], style, marker="o", label=f"{label}, {name}")
        times = {"entry": "look-up", "get": "open"}
        for what, label in times.items():
            axes[1].loglog(
                x, [row["lookup"][what]["median_us"] for _, row in rows], style, marker="o", label=f"{label}, {name}"
            )
        for phase, label in (("writing", "put"), ("evicting", "put and evict")):
            axes[1].loglog(x, [row[phase]["median_us"] for _, row in rows], style, marker="o", label=f"{label}, {name}")
        for phase in ("rebuild", "listing"):
            axes[2].semilogx(x, [row[phase]["peak_mb"] for _, row in rows], style, marker="o", label=f"{phase}, {name}")
    axes[0].axhline(5000, color="grey", linewidth=1)
    axes[1].axhline(1000, color="grey", linewidth=1)
    for axis, title in zip(
        axes, ("entries per second", "microseconds, median", "peak memory of the process, MB"), strict=True
    ):
        axis.set_title(title)
        axis.set_xlabel("documents")
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    axes[2].set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, size by size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=100_000, help="documents of the largest size")
    parser.add_argument(
        "--folder", type=Path, help="where the documents are made and kept (default: a temporary folder)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of million.json and million.png")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        phase, kind, folder, *budget = given.child
        child(phase, kind, folder, int(budget[0]) if budget else None)
        return
    import servers

    folder = given.folder or Path(tempfile.mkdtemp(prefix="kvilt-million-"))
    told: dict[str, Any] = {"load": os.getloadavg()[0], "cpus": os.cpu_count(), "bytes": 4128, "sizes": {}}
    try:
        for count in [size for size in SIZES if size <= given.most]:
            print(f"{count:9,} documents, made in {fill(folder / 'store', count):.0f} s", flush=True)
            told["sizes"][str(count)] = {}
            for kind in ("disk", "file"):
                fill(folder / "store", count)  # what was evicted
                told["sizes"][str(count)][kind] = measure(kind, folder / "store", count)
                save(told, given.out)
            if count <= 10_000:
                fill(folder / "store", count)
                os.environ.update(AWS_ACCESS_KEY_ID=servers.ACCESS, AWS_SECRET_ACCESS_KEY=servers.SECRET)
                with servers.moto() as url:
                    upload(url, folder / "store")
                    told["sizes"][str(count)]["moto"] = measure(url, folder / "store", count)
    finally:
        if not given.folder:
            shutil.rmtree(folder)
    save(told, given.out)


def save(told: dict[str, Any], out: Path) -> None:
    """Write the results and the plot."""
    told["load_after"] = os.getloadavg()[0]
    (out / "million.json").write_text(json.dumps(told, indent=1) + "\n")
    plot(told, out / "million.png")


if __name__ == "__main__":
    main()

"""Sum up evaluation records: `python scripts/quality_records.py RECORDS... --out benchmarks/quality.json`.

Every folder of RECORDS is named like the model it was made with; the first one's full recompute is what all others are
compared with, sample by sample. What several folders hold counts once."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import transformers

import kvilt
from kvilt.lab.evaluate.bootstrap import difference, interval
from kvilt.lab.evaluate.fidelity import same_text
from kvilt.lab.evaluate.records import read

Record = dict[str, Any]
EARLIER = ("chunked", "chunked_hop")
ACROSS = ("two_hop", *EARLIER, "state")


def kinds_of(record: Record) -> tuple[str, ...]:
    """The columns a record belongs to: a bAbI task has its own, and all have one together."""
    kind = record["metadata"]["kind"]
    return (kind,) if isinstance(kind, str) else (f"babi_{kind}", "babi")


def lanes(folder: Path) -> Iterator[tuple[str, str, list[Record]]]:
    """(role, strategy, records of all tasks together) of a folder."""
    found: dict[tuple[str, str], list[Record]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        header, records = read(file)
        found.setdefault((header["role"], header["name"]), []).extend(records)
    for (role, name), records in found.items():
        yield role, re.sub(r"wrapper=[^,+]*?([\w-]+)/wrapper\.safetensors", r"wrapper=\1", name), records


def pairs(records: Sequence[Record]) -> list[tuple[float, float]]:
    """Right or not: the answer holds the value, as whole words."""
    metric = "word_accuracy" if "word_accuracy" in records[0]["metrics"] else "accuracy"
    return [tuple(record["metrics"][metric]) for record in records]


def cell(records: Sequence[Record], full: dict[str, Record]) -> Record:
    """The figures of one strategy on one kind of question."""
    groups = [record["group"] for record in records]
    theirs = [full[record["id"]] for record in records]
    score, gap = interval(pairs(records), groups), difference(pairs(records), pairs(theirs), groups)
    reference = interval(pairs(theirs), groups).value
    usage = [record["usage"] for record in records]
    distances = [record["kl"] for record in records if record["kl"] is not None]
    return {
        "n": len(records),
        "accuracy": [round(100 * value, 2) for value in score],
        "minus_full": [round(100 * value, 2) for value in gap],
        "of_full": round(100 * score.value / reference, 2) if reference else None,
        "agreement": round(
            100 * fmean(same_text(a["text"], b["text"]) for a, b in zip(records, theirs, strict=True)), 2
        ),
        "kl": round(fmean(distances), 4) if distances else None,
        "charged": round(fmean(u["charged"] for u in usage), 4),
        "computed": round(fmean(u["computed_tokens"] for u in usage), 1),
        "kb_loaded": round(fmean(u["bytes_loaded"] for u in usage) / 1000, 1),
        "ttft_ms": round(1000 * median(u["ttft_s"] for u in usage), 2),
    }


def summary(folders: Sequence[Path], kinds: Sequence[str]) -> Iterator[Record]:
    """One record per model, strategy and kind of question; of `kinds` alone, if any."""
    full = {r["id"]: r for role, _, records in lanes(folders[0]) if role == "full" for r in records}
    seen = set()
    for folder in folders:
        for role, name, records in lanes(folder):
            for kind in sorted({kind for r in records for kind in kinds_of(r)}):
                mine = [r for r in records if kind in kinds_of(r) and r["id"] in full]
                place = {"model": folder.name, "strategy": name, "role": role, "kind": kind}
                if (not kinds or kind in kinds) and tuple(place.values()) not in seen:
                    seen.add(tuple(place.values()))
                    yield {**place, **cell(mine, full)}


def compared(folders: Sequence[Path], duels: Sequence[Sequence[str]]) -> Iterator[Record]:
    """Paired differences of right answers, in points, between two lanes given by how their names, "model strategy", end."""
    found = {f"{f.name} {name}": {r["id"]: r for r in records} for f in folders for _, name, records in lanes(f)}
    for duel in duels:
        one, other = (next(name for name in found if name.endswith(part)) for part in duel)
        for label, kinds in (("across documents", ACROSS), ("earlier chunk", EARLIER)):
            ids = [i for i, r in found[one].items() if kinds_of(r)[0] in kinds and i in found[other]]
            sides = [[found[name][i] for i in ids] for name in (one, other)]
            gap = difference(pairs(sides[0]), pairs(sides[1]), [r["group"] for r in sides[0]])
            points = [round(100 * value, 2) for value in gap]
            yield {"a": one, "b": other, "kinds": label, "n": len(ids), "difference": points}


def main() -> None:
    """Write the summary with how it was made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--kinds", nargs="*", default=[], help="kinds of questions (default: all)")
    parser.add_argument(
        "--duel", nargs=2, action="append", default=[], help="how the names of two lanes to compare end"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    made = {
        "kvilt": kvilt.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    cells, duels = list(summary(args.records, args.kinds)), list(compared(args.records, args.duel))
    args.out.write_text(json.dumps({"made": made, "cells": cells, "duels": duels}, indent=1) + "\n")


if __name__ == "__main__":
    main()

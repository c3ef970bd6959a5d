"""Figures of what real.py and links.py wrote, for benchmarks/real.json.

    python recipes/smollm2/methods.py OUT [--times FOLDER]; python scripts/real_tables.py

Of every strategy on every set: right answers, the paired difference to full recompute and what was kept of it, fidelity, costs; and
pairs of strategies; and kept.json of the models that ship, for `kvilt list strategy MODEL`. Times come from FOLDER, a short run of
real.py with nothing else on the machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kvilt.lab.evaluate.bootstrap import difference
from kvilt.lab.evaluate.report import Rows, load, retention

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "real.json"
NEARLY = 0.95  # a strategy that was asked fewer questions than this share of the others' does not shorten their records
SHUFFLED = "full, documents in another order"
PACKAGE = ROOT / "src/kvilt/builtin"
PAIRS = (
    ("kvlink:links=5", "kvlink:links=1"),
    ("kvlink:links=5", "kvlink:links=0"),
    ("kvlink:links=1", "kvlink:links=0"),
    ("writer", "linked_packet"),
    ("writer", "kv_packet"),
    ("linked_packet", "kv_packet"),
    ("writer", "block:sink=system"),
    ("prophetkv:ratio=0.2", "writer"),
    ("block:sink=system", "naive"),
    ("writer + int8", "writer"),
    ("prophetkv:ratio=0.2 + int8", "prophetkv:ratio=0.2"),
)
MEANS = {
    "agree": ("agreement",),
    "kl": ("kl",),
    "charged": ("usage", "charged"),
    "computed": ("usage", "computed_tokens"),
    "bytes": ("usage", "bytes_loaded"),
}


def read(folder: Path) -> dict[str, Rows]:
    """Every strategy of a set by its name, full recompute first; KVLink's own models write less of each question."""
    (rows,) = load(folder).values()
    found = {r.header["name"]: r for r in rows}
    for file in sorted(folder.glob("*.json")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        found[file.stem] = Rows({**rows[0].header, "name": file.stem}, lines)
    asked = [{r["id"] for r in one.records} for one in found.values()]
    same = set.intersection(
        *(ids for ids in asked if len(ids) > NEARLY * max(map(len, asked)))
    )  # of a run that was stopped
    return {name: Rows(one.header, [r for r in one.records if r["id"] in same]) for name, one in found.items()}


def both(a: Rows, b: Rows) -> tuple[Rows, Rows]:
    """The records of questions that both answered, in one order."""
    theirs = {r["id"]: r for r in b.records}
    mine = [r for r in a.records if r["id"] in theirs]
    return Rows(a.header, mine), Rows(b.header, [theirs[r["id"]] for r in mine])


def gap(a: Rows, b: Rows) -> list[float]:
    """The paired difference in points, with its interval over contexts."""
    groups = [r["group"] for r in a.records]
    return [round(100 * v, 1) for v in difference(a.pairs(a.headline), b.pairs(b.headline), groups)]


def cell(name: str, rows: Rows, full: Rows) -> dict[str, Any]:
    """The figures of one strategy on one set, on the questions that full recompute has answered, too."""
    mine, theirs = both(rows, full)
    told = {key: mine.mean(*path) for key, path in MEANS.items() if path[0] in mine.records[0]}
    means = {key: round(value, 4) for key, value in told.items() if value is not None}
    right = [round(v, 1) for v in mine.score()]
    close = {"difference": gap(mine, theirs), "kept": round(retention(mine, theirs) or 0.0, 1)}
    return {"set": name, "strategy": rows.header["name"], "n": len(mine.records), "right": right, **close, **means}


def headline(rows: Rows, name: str) -> list[dict[str, Any]]:
    """Records with the set's leading metric alone, and groups of their own, so that sets can be put together."""
    return [{**r, "group": f"{name} {r['group']}", "metrics": {"": r["metrics"][rows.headline]}} for r in rows.records]


def pairs(sets: dict[str, dict[str, Rows]]) -> list[dict[str, Any]]:
    """Two strategies on the questions of every set that has both."""
    lines = []
    for first, second in PAIRS:
        a, b = Rows({"metrics": [""]}, []), Rows({"metrics": [""]}, [])
        names = [name for name, rows in sets.items() if first in rows and second in rows]
        for name in names:
            for whole, part in zip((a, b), both(sets[name][first], sets[name][second]), strict=True):
                whole.records.extend(headline(part, name))
        if names:
            about = {"first": first, "second": second, "sets": names, "n": len(a.records)}
            lines.append({**about, "difference": gap(a, b)})
    return lines


def kept(cells: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """What `kvilt list strategy MODEL` says of each strategy: kept on SQuAD, with every option that was measured."""
    found: dict[str, dict[str, list[str]]] = {"smollm2-qa": {}, "smollm2-kvlink5": {}}
    for c in cells:
        name, _, options = c["strategy"].partition(":")
        model = "smollm2-qa" if name != "kvlink" else f"smollm2-kvlink{options.removeprefix('links=')}"
        if c["set"] == "squad5" and " " not in c["strategy"] and name != "full" and model in found:
            found[model].setdefault(name, []).append(f"{c['kept']:.0f} %" + (f" with {options}" if options else ""))
    return {model: {name: ", ".join(each) for name, each in names.items()} for model, names in found.items()}


def main() -> None:
    """Write what the folder holds into real.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--times", type=Path)
    given = parser.parse_args()
    sets = {folder.name: read(folder) for folder in sorted(given.out.iterdir()) if any(folder.glob("*.jsonl"))}
    made = json.loads(RESULT.read_text())
    if "shuffled" in sets:
        header, records = (full := sets.pop("shuffled")["full"]).header, full.records
        sets["squad5"][SHUFFLED] = Rows({**header, "name": SHUFFLED}, records)
    cells = [cell(name, rows, found["full"]) for name, found in sets.items() for rows in found.values()]
    engine = {**made.get("engine", {}), "cells": cells, "pairs": pairs(sets)}
    if given.times:
        timed = {n: r.median("usage", "ttft_s") for n, r in read(given.times).items()}
        engine["ttft_s"] = {name: round(seconds, 4) for name, seconds in timed.items() if seconds is not None}
    made["engine"] = engine
    for model, told in kept(cells).items():
        (PACKAGE / model / "kept.json").write_text(json.dumps(told) + "\n")
    RESULT.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()

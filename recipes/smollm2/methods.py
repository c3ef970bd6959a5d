"""Figures of `kvilt evaluate run` for benchmarks/real.json.

Run: python recipes/smollm2/methods.py FOLDER...; then python scripts/real_tables.py.
Each FOLDER is what `--out` named; its own name is the name of the set of questions. Of every strategy: right answers, the paired
difference to full recompute, what was kept, fidelity, what it costs. Times are left out: other work may have run beside."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kvilt.lab.evaluate.bootstrap import difference
from kvilt.lab.evaluate.report import Rows, common, load, retention

OUT = Path(__file__).parents[2] / "benchmarks" / "real.json"


def cell(name: str, rows: Rows, full: Rows) -> dict[str, Any]:
    """The figures of one strategy on one set, on the questions that full recompute has answered, too."""
    both = common(rows, full)
    assert both is not None, f"{name}: full recompute has answered none of the questions"
    mine, theirs = both
    gap = difference(mine.pairs(mine.headline), theirs.pairs(mine.headline), [r["group"] for r in mine.records])
    means = {key: mine.mean(*path) for key, path in MEANS.items()}
    return {
        "set": name,
        "strategy": mine.header["name"],
        "n": len(mine.records),
        "right": [round(v, 1) for v in mine.score()],
        "difference": [round(100 * v, 1) for v in gap],
        "kept": round(retention(mine, theirs) or 0.0, 1),
        **{key: None if value is None else round(value, 4) for key, value in means.items()},
    }


MEANS = {
    "agree": ("agreement",),
    "kl": ("kl",),
    "charged": ("usage", "charged"),
    "computed": ("usage", "computed_tokens"),
    "bytes": ("usage", "bytes_loaded"),
}


def main(folders: list[str]) -> None:
    """Add the sets to real.json."""
    made = json.loads(OUT.read_text())
    fresh = []
    for folder in folders:
        (rows,) = load(folder).values()
        full = next(r for r in rows if r.header["role"] == "full")
        fresh += [cell(Path(folder).name, r, full) for r in rows]
    names = {Path(folder).name for folder in folders}
    made["methods"] = [c for c in made.get("methods", []) if c["set"] not in names] + fresh
    OUT.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

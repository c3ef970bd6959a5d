"""Draw benchmarks/real.png from real.json: right answers over what a query computes, and what is kept on every set."""

from __future__ import annotations

import json
from typing import Any

from real_tables import ENGINE, FEWEST, ROOT

from kvilt.lab.pages import figure

KEPT = {
    "naive": "o",
    "block:sink=system": "s",
    "cacheblend:ratio=0.15": "^",
    "prophetkv:ratio=0.2": "v",
    "linked_packet": "P",
    "writer": "D",
}
LEFT_OUT = ("no documents", "kvlink:links=0", "kvlink:links=1")


def main() -> None:
    """Write the picture."""
    cells = json.loads((ROOT / "benchmarks" / "real.json").read_text())["engine"]["cells"]
    drawn, (left, right) = figure(13, 5.5, columns=2)
    over_compute(left, [c for c in cells if c["set"] == "squad5" and c["strategy"] not in LEFT_OUT])
    kept(right, {(c["strategy"], c["set"]): c for c in cells})
    drawn.savefig(ROOT / "benchmarks" / "real.png", dpi=110)


def over_compute(axes: Any, cells: list[dict[str, Any]]) -> None:
    """One point a strategy, with its interval."""
    cheap = 0
    for number, c in enumerate(sorted(cells, key=lambda c: (c["charged"], c["right"]))):
        value, low, high = c["right"]
        spread, cheap = [[value - low], [high - value]], cheap + (c["charged"] < 0.03)
        apart = 1.05**cheap if c["charged"] < 0.03 else 1.0  # those that compute the question alone, beside each other
        axes.errorbar(
            [c["charged"] * apart], [value], yerr=spread, fmt="os^vDP*X"[number % 8], capsize=2, label=c["strategy"]
        )
    axes.set_xscale("log")
    axes.set_xlabel("charged compute (full recompute = 1; those at 0.025 are drawn beside each other)")
    axes.set_ylabel("per cent")
    axes.set_title(f"right answers: SQuAD, 5 documents, {cells[0]['n']} questions")
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)


def kept(axes: Any, cells: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Of what full recompute answers right, what each strategy answers right, set by set."""
    names = [name for name in ENGINE if cells.get(("full", name), {"n": 0})["n"] >= FEWEST]
    for strategy, mark in KEPT.items():
        there = [
            (place, cells[strategy, name]["kept"]) for place, name in enumerate(names) if (strategy, name) in cells
        ]
        axes.plot(*zip(*there, strict=True), mark, label=strategy)
    axes.set_xticks(range(len(names)), [ENGINE[name] for name in names], rotation=60, ha="right")
    axes.set_title("kept of full recompute's right answers")
    axes.legend(fontsize=7, loc="lower left")


if __name__ == "__main__":
    main()

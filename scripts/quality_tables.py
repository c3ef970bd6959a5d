"""Write the figures of quality.json, methods.json and compression*.json into their pages; `--check` fails if they are stale."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "benchmarks"
Cell = dict[str, Any]
ONE, ACROSS = ("one_hop",), ("two_hop", "chunked", "chunked_hop", "state")
BABI = ("babi",)
TASKS = tuple(f"babi_{task}" for task in (1, 2, 6, 9, 12, 15))
TWO, METHODS = ("one_hop", "two_hop"), ("one_hop", "two_hop", "chunked", "babi")  # columns of the other pages
ENOUGH = 500  # questions of a cell


def load(name: str) -> Any:
    """The cells of a summary; of "name:key" another part; or a benchmark's whole result."""
    name, _, key = name.partition(":")
    made = json.loads((FOLDER / f"{name}.json").read_text())
    return made.get(key or "cells", made)


def rows(cells: Sequence[Cell]) -> dict[tuple[str, str], dict[str, Cell]]:
    """(model, strategy) -> kind -> cell; models in the order of the file, full recompute first, the floor last."""
    found: dict[tuple[str, str], dict[str, Cell]] = {}
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    roles = ("full", "strategy", "floor")
    for cell in sorted(cells, key=lambda c: (models.index(c["model"]), roles.index(c["role"]))):
        found.setdefault((cell["model"], cell["strategy"]), {})[cell["kind"]] = cell
    return found


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column left-aligned."""
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, marks, *lines))


def scored(cell: Cell | None) -> str:
    """Accuracy with its interval."""
    if cell is None:
        return ""
    value, low, high = cell["accuracy"]
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def label(model: str, strategy: str) -> str:
    """A row's name: the strategy, and the checkpoint where it is not the base model."""
    return f"`{strategy}`" if model == "builtin" else f"`{strategy}` on {model}"


def accuracies(cells: Sequence[Cell], kinds: Sequence[str]) -> str:
    """A row per strategy, a column per kind."""
    found = rows(cells)
    lines = [[label(*key), *(scored(row.get(kind)) for kind in kinds)] for key, row in found.items()]
    return table(["strategy", *kinds], [line for line in lines if any(line[1:])])


def mean(row: dict[str, Cell], kinds: Sequence[str], key: str) -> float | None:
    """The mean of a figure over kinds that are all there."""
    values = [row[kind][key] for kind in kinds if kind in row and row[kind][key] is not None]
    return sum(values) / len(values) if len(values) == len(kinds) else None


def number(value: float | None, digits: int = 1) -> str:
    """A figure, or nothing."""
    return "" if value is None else f"{value:.{digits}f}"


def costs(cells: Sequence[Cell]) -> str:
    """What strategies keep of full recompute and what they take, over all kinds of the collection."""
    kinds = ONE + ACROSS
    lines = []
    for key, row in rows(cells).items():
        share = [number(mean(row, group, "of_full")) for group in (ONE, ACROSS, BABI)]
        rest = [number(mean(row, kinds, name), digits) for name, digits in COSTS]
        lines.append([label(*key), *share, *rest])
    head = ["one document, % of full", "across documents, % of full", "bAbI, % of full"]
    return table(["strategy", *head, "agreement %", "KL", "charged", "computed", "KB loaded"], lines)


def shown(model: str, strategy: str) -> bool:
    """Whether a short table has this row: each method once, trained on everything."""
    off_task = "packet_" in strategy.partition("=")[2]
    return strategy.startswith("kvlink") if model != "builtin" else not off_task and not strategy.startswith("no ")


def methods(cells: Sequence[Cell]) -> str:
    """A row per method and budget: accuracy with its interval, and fidelity and compute over all kinds."""
    lines = []
    for (model, strategy), row in rows(cells).items():
        if listed(model, strategy):
            rest = [number(mean(row, METHODS, name), digits) for name, digits in COSTS if name != "computed"]
            lines.append([label(model, strategy), *(scored(row.get(kind)) for kind in METHODS), *rest])
    head = ["method", "one document", "two documents", "earlier chunk", "bAbI"]
    return table([*head, "agreement %", "KL", "charged", "KB loaded"], lines)


def listed(model: str, strategy: str) -> bool:
    """Whether the page of methods has this row: no wrappers off their task, and of fine-tuned checkpoints their own method."""
    return (
        shown(model, strategy) or strategy.startswith("anchors") or (strategy == "no documents" and model == "builtin")
    )


def compressed(cells: Sequence[Cell]) -> str:
    """A row per strategy and compression: accuracy; on one document fidelity, and bytes beside the uncompressed ones."""
    found = rows(cells)
    plain = {key: row["one_hop"]["kb_loaded"] for key, row in found.items()}
    bases = {(model, strategy.partition(" + ")[0]) for model, strategy in found if " + " in strategy}
    lines = []
    for (model, strategy), row in found.items():
        if (model, strategy.partition(" + ")[0]) in {*bases, ("builtin", "full")}:
            one = row["one_hop"]
            base = ("builtin", "naive") if strategy.startswith("anchors") else (model, strategy.partition(" + ")[0])
            small, whole = one["kb_loaded"], plain[base]
            share = number(100 * small / whole) if small and whole else ""
            figures = [number(one["agreement"]), number(one["kl"], 3), number(small, 0), share]
            lines.append([label(model, strategy), *(scored(row.get(kind)) for kind in TWO), *figures])
    head = ["strategy + compression", "one document", "two documents"]
    return table([*head, "agreement %", "KL", "KB loaded", "% of all rows uncompressed"], lines)


def stored(result: dict[str, Any]) -> str:
    """What `kvilt bench compression` found: bytes, errors, and the time to load."""
    whole = result["rows"]["none"]["bytes_per_token"]
    lines = []
    for name, row in result["rows"].items():
        errors = [
            f"{100 * row[which]:.2f}" if row[which] is not None else "" for which in ("keys_error", "values_error")
        ]
        size, load = row["bytes_per_token"], row["load_s"]["median"]
        lines.append(
            [
                f"`{name}`",
                f"{size:,.0f}",
                f"{100 * size / whole:.1f}",
                *errors,
                f"{load:.3f}",
                f"{row['load_of_plain']:.2f}",
            ]
        )
    return table(
        ["compression", "bytes per token", "% of bfloat16", "keys off by %", "values off by %", "load s", "of plain"],
        lines,
    )


def duels(found: Sequence[Cell]) -> str:
    """Who is ahead of whom, question by question."""
    lines = []
    for duel in found:
        gap, low, high = duel["difference"]
        names = [label(*duel[side].split(" ", 1)) for side in "ab"]
        lines.append([" against ".join(names), duel["kinds"], str(duel["n"]), f"{gap:+.1f} [{low:+.1f}, {high:+.1f}]"])
    return table(["", "questions", "n", "points"], lines)


COSTS = (("agreement", 1), ("kl", 3), ("charged", 3), ("computed", 1), ("kb_loaded", 0))
SECTIONS: list[tuple[str, str, dict[str, Callable[[Any], str]]]] = [
    (
        "quality.md",
        "quality",
        {
            "collection": lambda cells: accuracies(cells, ONE + ACROSS + BABI),
            "babi": lambda cells: accuracies([c for c in cells if c["n"] >= ENOUGH], TASKS),
            "costs": costs,
        },
    ),
    ("quality.md", "quality:duels", {"duels": duels}),
    ("methods.md", "methods", {"methods": methods}),
    ("compression.md", "compression", {"stored": stored}),
    ("compression.md", "compression_quality", {"quality": compressed}),
]


def main() -> None:
    """Rewrite, or check, the pages."""
    stale = []
    for place, name, sections in SECTIONS:
        page, cells = FOLDER / place, load(name)
        made = text = page.read_text()
        for section, write in sections.items():
            mark = rf"(<!-- {section} -->\n).*?(<!-- /{section} -->)"
            made = re.sub(mark, rf"\g<1>{write(cells)}\n\g<2>", made, flags=re.DOTALL)
        if made != text:
            stale.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(made)
    if stale and "--check" in sys.argv:
        sys.exit(f"stale: {', '.join(stale)}; run python scripts/quality_tables.py")


if __name__ == "__main__":
    main()

"""Write the figures of real.json into benchmarks/real.md and the README; `--check` fails if they are stale."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SETS = {
    "squad5": "SQuAD, 5",
    "shifts5": "SQuADShifts, 5",
    "nq5": "NQ, 5",
    "chunked": "in pieces",
    "squad10": "SQuAD, 10",
}
SHORT = ("full", "writer + wrapper", "linked_packet", "kv_packet", "kvlink:links=5", "query_lora", "naive")


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, first column left-aligned."""
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, marks, *lines))


def span(values: list[float], sign: str = "") -> str:
    """A value with its interval."""
    return "{:{s}.1f} [{:{s}.1f}, {:{s}.1f}]".format(*values, s=sign)


def per_set(made: dict[str, Any], key: str, sign: str = "") -> str:
    """A row per strategy, a column per set."""
    found: dict[str, dict[str, str]] = {}
    for cell in made["cells"]:
        if key in cell:
            value = cell[key]
            found.setdefault(cell["strategy"], {})[cell["set"]] = (
                span(value, sign) if isinstance(value, list) else f"{value:.1f}"
            )
    return table(["strategy", *SETS.values()], [[f"`{name}`", *(row[s] for s in SETS)] for name, row in found.items()])


def short(made: dict[str, Any]) -> str:
    """The README's table: right answers in per cent, and the mean that was kept of full recompute's."""
    cells = {(c["strategy"], c["set"]): c for c in made["cells"]}
    lines = []
    for name in SHORT:
        row = [cells[name, s] for s in SETS]
        kept = "" if name == "full" else f"{sum(c['kept'][0] for c in row) / len(row):.0f} %"
        lines.append([f"`{name}`", *(f"{c['right'][0]:.1f}" for c in row), kept])
    return table(["strategy", *SETS.values(), "kept"], lines)


def duels(made: dict[str, Any]) -> str:
    """Two methods on the same questions."""
    return table(
        ["first", "second", "questions", "first - second, points"],
        [[f"`{d['first']}`", f"`{d['second']}`", str(d["n"]), span(d["difference"], "+")] for d in made["duels"]],
    )


def untrained(made: dict[str, Any]) -> str:
    """Strategies without training on both models."""
    lines = []
    for u in made["untrained"]:
        if u["strategy"] != "full":
            low = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*u["nats"])
            lines.append([f"`{u['strategy']}`", u["model"], SETS[u["set"]], str(u["n"]), low, f"{u['kl']:.2f}"])
    return table(["strategy", "model", "set", "questions", "nats above full", "KL to full"], lines)


def training(made: dict[str, Any]) -> str:
    """What each training took."""
    head = ["training", "steps", "questions", "tokens", "seconds", "GB of GPU memory"]
    lines = [
        [f"`{n}`", *(f"{t[k]:,.0f}" for k in ("steps", "questions", "tokens", "seconds")), f"{t['memory_gb']}"]
        for n, t in made["training"].items()
    ]
    return table(head, lines)


def methods(made: dict[str, Any]) -> str:
    """Every strategy as Kvilt itself runs it."""
    head = [
        "strategy",
        "right",
        "- full, points",
        "kept, %",
        "same answer, %",
        "KL",
        "charged",
        "computed",
        "MB",
        "questions",
    ]
    lines = []
    for c in made.get("methods", []):
        close = ["", "", "", ""] if c["strategy"] == "full" else [span(c["difference"], "+"), f"{c['kept']:.0f}"]
        close += [] if c["strategy"] == "full" else [f"{100 * c['agree']:.0f}", f"{c['kl']:.3f}"]
        costs = [f"{c['charged']:.3f}", f"{c['computed']:.0f}", f"{c['bytes'] / 1e6:.1f}", str(c["n"])]
        lines.append([f"`{c['strategy']}`", span(c["right"]), *close, *costs])
    return table(head, lines)


def main() -> None:
    """Fill the marked parts of both pages."""
    made = json.loads((ROOT / "benchmarks" / "real.json").read_text())
    parts = {
        "real": short(made),
        "real-right": per_set(made, "right"),
        "real-difference": per_set(made, "difference", "+"),
        "real-kept": per_set(made, "kept"),
        "real-agree": per_set(made, "agree"),
        "real-duels": duels(made),
        "real-untrained": untrained(made),
        "real-training": training(made),
        "real-methods": methods(made),
    }
    for page in (ROOT / "README.md", ROOT / "benchmarks" / "real.md"):
        old = page.read_text()
        new = re.sub(
            r"<!-- (real[\w-]*) -->\n.*?<!-- /\1 -->",
            lambda m: f"<!-- {m[1]} -->\n{parts[m[1]]}\n<!-- /{m[1]} -->",
            old,
            flags=re.DOTALL,
        )
        if "--check" in sys.argv and new != old:
            raise SystemExit(f"{page.name} is stale: python scripts/real_tables.py")
        if new != old:
            page.write_text(new)


if __name__ == "__main__":
    main()

"""Write the figures of real.json into benchmarks/real.md and the README; `--check` fails if they are stale."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
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
ENGINE = {
    "squad5": "SQuAD, 5",
    "squad10": "SQuAD, 10",
    "pieces": "in pieces",
    "squadshifts": "SQuADShifts, 5",
    "nq": "NQ, 10",
    "hotpotqa": "HotpotQA, 5",
    "2wiki": "2Wiki, 5",
    "musique": "MuSiQue, 5",
    "babi1": "bAbI 1",
    "babi2": "bAbI 2",
    "babi3": "bAbI 3",
    "babi15": "bAbI 15",
    "needle2000": "needle, 2,000",
    "needle6000": "needle, 6,000",
}
SIDES = {"one": tuple(ENGINE)[:5], "several": tuple(ENGINE)[5:8], "made": tuple(ENGINE)[8:]}
ORDER = (
    "full",
    "no documents",
    "naive",
    "block:sink=4",
    "block:sink=system",
    "prompt_cache",
    "ape",
    "epic:tokens=16",
    "epic:tokens=16,sink=system",
    "ranked:ratio=0.15",
    "cacheblend:ratio=0.15",
    "prophetkv:ratio=0.2",
    "prophetkv:ratio=0.2 + int8",
    "sam_kv",
    "kv_packet",
    "linked_packet",
    "query_lora",
    "writer",
    "writer + int8",
    "kvlink:links=0",
    "kvlink:links=1",
    "kvlink:links=5",
)
SHORT = (
    "full",
    "prophetkv:ratio=0.2",
    "writer",
    "kvlink:links=5",
    "linked_packet",
    "cacheblend:ratio=0.15",
    "block:sink=system",
    "naive",
)
FEWEST = 20  # questions of a set that is shown
SHOWN = "squad5", "squad10", "pieces", "squadshifts", "hotpotqa", "babi1"


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, first column left-aligned."""
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, marks, *lines))


def code(name: str) -> str:
    """A specification as one types it; what is none is written as text."""
    return name if " " in name else f"`{name}`"


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
    return table(["strategy", *SETS.values()], [[code(name), *(row[s] for s in SETS)] for name, row in found.items()])


def short(made: dict[str, Any]) -> str:
    """The README's table: right answers in per cent on some sets, what is kept of full recompute's, what a query costs."""
    cells = {(c["strategy"], c["set"]): c for c in made["engine"]["cells"]}
    times = made["engine"].get("ttft_s", {})
    lines = []
    for name in SHORT:
        row = [cells.get((name, one)) for one in SHOWN]
        first = cells[name, SHOWN[0]]
        kept = "" if name == "full" else f"{first['kept']:.0f} %"
        spent = [f"{first['charged']:.3f}", f"{1000 * times[name]:.0f} ms" if name in times else ""]
        lines.append([code(name), *(f"{c['right'][0]:.1f}" if c else "" for c in row), kept, *spent])
    return table(["strategy", *(ENGINE[one] for one in SHOWN), "kept", "charged", "TTFT"], lines)


def duels(made: dict[str, Any]) -> str:
    """Two methods on the same questions."""
    return table(
        ["first", "second", "questions", "first - second, points"],
        [[code(d["first"]), code(d["second"]), str(d["n"]), span(d["difference"], "+")] for d in made["duels"]],
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


def asked(made: dict[str, Any], names: tuple[str, ...], show: Callable[[dict[str, Any]], str]) -> str:
    """What the engine answered: a row a strategy, a column a set with its number of questions."""
    cells = {(c["strategy"], c["set"]): c for c in made["engine"]["cells"]}
    names = tuple(name for name in names if cells.get(("full", name), {"n": 0})["n"] >= FEWEST)
    head = ["strategy", *(f"{ENGINE[name]} ({cells['full', name]['n']})" for name in names)]
    lines = []
    for strategy in ORDER:
        row = [c if (c := cells.get((strategy, name))) and whole(c, cells) else None for name in names]
        if any(row):
            lines.append([code(strategy), *(show(c) if c else "" for c in row)])
    return table(head, lines)


def whole(c: dict[str, Any], cells: dict[tuple[str, str], dict[str, Any]]) -> bool:
    """Whether a strategy was asked all questions of a set: a cell of fewer is not shown."""
    return bool(c["n"] == cells["full", c["set"]]["n"])


def right(c: dict[str, Any]) -> str:
    """Right answers with half of the interval's width."""
    value, low, high = c["right"]
    return f"{value:.1f} ± {(high - low) / 2:.1f}"


def lost(c: dict[str, Any]) -> str:
    """The paired difference to full recompute, and what was kept."""
    return "" if c["strategy"] == "full" else f"{span(c['difference'], '+')} {c['kept']:.0f} %"


def costs(made: dict[str, Any]) -> str:
    """Fidelity and costs of every strategy on one set."""
    head = ["strategy", "same answer, %", "KL", "charged", "tokens computed", "MB read", "TTFT, ms"]
    cells = {c["strategy"]: c for c in made["engine"]["cells"] if c["set"] == "squad5"}
    times = made["engine"].get("ttft_s", {})
    lines = []
    for name in (n for n in ORDER if n in cells):
        c = cells[name]
        close = [f"{100 * c['agree']:.0f}", f"{c['kl']:.3f}"] if "kl" in c and name != "full" else ["", ""]
        spent = [f"{c['charged']:.3f}", f"{c['computed']:.0f}", f"{c['bytes'] / 1e6:.1f}"]
        lines.append([code(name), *close, *spent, f"{1000 * times[name]:.0f}" if name in times else ""])
    return table(head, lines)


def beside(made: dict[str, Any]) -> str:
    """Pairs of strategies on the same questions, as the engine ran them."""
    lines = []
    for d in made["engine"]["pairs"]:
        names = [ENGINE[name] for name in d["sets"] if name in ENGINE]
        names = (
            names if len(names) < 6 else [f"all {len(names)}" if len(names) == len(ENGINE) else f"{len(names)} of them"]
        )
        lines.append([code(d["first"]), code(d["second"]), str(d["n"]), span(d["difference"], "+"), "; ".join(names)])
    return table(["first", "second", "questions", "first - second, points", "sets"], lines)


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
        **{f"real-asked-{n}": asked(made, SIDES[n], right) for n in SIDES},
        **{f"real-lost-{n}": asked(made, SIDES[n], lost) for n in SIDES},
        "real-costs": costs(made),
        "real-beside": beside(made),
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

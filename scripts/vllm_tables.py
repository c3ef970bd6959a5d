"""Write the figures of vllm.json (made by bench_vllm.py) into benchmarks/vllm.md; `--check` fails if they are stale."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "benchmarks"
Rows = list[list[str]]


def table(head: list[str], rows: Rows) -> str:
    """A Markdown table, first column left-aligned."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *rows))


def label(name: str) -> str:
    """A strategy without the path of its vectors."""
    name = re.sub(r":wrapper=[^,]*", "", name)
    return name if name.startswith("vllm") else f"`{name}`"


def ttft(made: dict[str, Any]) -> str:
    """One row per contender: seconds at each size, and what a strategy's floor is."""
    sizes = list(made)
    head = ["time to first token, s"]
    head += [f"{made[s]['tokens']:,} tokens, {made[s]['documents']} documents" for s in sizes]
    head += [f"{made[s]['tokens']:,}: loading, computed, of its floor" for s in sizes]
    names = [n for n in made[sizes[0]]["seconds"] if not n.startswith("step of")]
    return table(
        head,
        [
            [label(n), *(f"{made[s]['seconds'][n]:.3f}" for s in sizes), *(parts(made[s], n) for s in sizes)]
            for n in names
        ],
    )


def parts(size: dict[str, Any], name: str) -> str:
    """Seconds of loading, computed tokens, and the ratio to loading plus a plain step of as many tokens."""
    if name not in size["loading"]:
        return ""
    of_floor = size["seconds"][name] / size["floor"][name]
    return f"{size['loading'][name]:.3f}, {size['computed'][name]}, {of_floor:.2f}"


def throughput(made: dict[str, float]) -> str:
    """Requests per second."""
    rows = [[label(n.removesuffix(", new combinations")), f"{v:.2f}"] for n, v in made.items()]
    return table(["sixteen requests at once", "requests/s"], rows)


def decode(made: dict[str, float]) -> str:
    """Tokens per second of one request."""
    return table(["decoding after 2,000 tokens", "tokens/s"], [[label(n), f"{v:.1f}"] for n, v in made.items()])


def clients(made: dict[str, Any]) -> str:
    """TTFT of many clients."""
    rows = [[label(n), *(f"{v[k]:.2f}" for k in ("p50", "p95", "requests/s"))] for n, v in made.items()]
    return table(["sixteen clients", "TTFT p50, s", "p95, s", "requests/s"], rows)


def steady(made: list[dict[str, float]]) -> str:
    """One row per hundred questions."""
    keys = ("hit rate", "seconds", "speed-up", "documents", "bytes")
    rows = [
        [
            f"{100 * i + 1}-{100 * (i + 1)}",
            f"{r[keys[0]]:.3f}",
            f"{r[keys[1]]:.3f}",
            f"{r[keys[2]]:.1f}",
            f"{r[keys[3]]:.0f}",
            f"{r[keys[4]] / 1e9:.2f}",
        ]
        for i, r in enumerate(made)
    ]
    return table(["questions", "hit rate", "TTFT median, s", "times faster than vLLM", "documents stored", "GB"], rows)


WRITERS = {"ttft": ttft, "throughput": throughput, "decode": decode, "clients": clients, "steady": steady}


def main() -> None:
    """Rewrite the page, or check it."""
    made, path = json.loads((FOLDER / "vllm.json").read_text()), FOLDER / "vllm.md"
    text = old = path.read_text()
    for name, write in WRITERS.items():
        if name in made:
            text = re.sub(
                rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", rf"\g<1>{write(made[name])}\n\g<2>", text, flags=re.DOTALL
            )
    if "--check" not in sys.argv:
        path.write_text(text)
    elif text != old:
        sys.exit("stale: vllm.md; run python scripts/vllm_tables.py")


if __name__ == "__main__":
    main()

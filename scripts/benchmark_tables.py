"""Write the figures of benchmarks/*.json into README.md and benchmarks/README.md; `--check` fails if they are stale."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from kvilt.lab.bench.ttft import table

ROOT = Path(__file__).parent.parent
COLUMNS = ("full", "block", "kv_packet:wrapper=WRAPPER", "kvlink:links=5")


def main() -> None:
    """Rewrite, or check, both files."""
    stale = []
    for path, sections in ((ROOT / "README.md", {"ttft": short}), (ROOT / "benchmarks" / "README.md", LONG)):
        text = path.read_text()
        made = text
        for name, write in sections.items():
            result = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())
            made = re.sub(
                rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", rf"\g<1>{write(result)}\n\g<2>", made, flags=re.DOTALL
            )
        if made != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(made)
    if stale and "--check" in sys.argv:
        sys.exit(f"stale: {', '.join(stale)}; run python scripts/benchmark_tables.py")


def short(result: dict[str, Any]) -> str:
    """One row per context, for the README."""
    lines = ["| context | full prefill | `block` | `kv_packet` | `kvlink:links=5` |", "|" + "---|" * 5]
    for point in result["points"]:
        rows = point["rows"]
        lines.append(f"| {point['context']:,} tokens | {' | '.join(cell(rows.get(name)) for name in COLUMNS)} |")
    return "\n".join(lines)


def cell(row: dict[str, Any] | None) -> str:
    """Median seconds, and the share of full prefill."""
    if row is None:
        return ""
    share = f" ({100 * row['of_full']:.1f} %)" if row.get("of_full", 1.0) != 1.0 else ""
    return f"{row['ttft_s']['median']:.2f} s{share}"


def decode(result: dict[str, Any]) -> str:
    """Decoding, one sentence."""
    return (
        f"At {result['context']:,} rows of context, medians of {result['tokens_per_s']['kvilt']['n']} paired runs of "
        f"{result['tokens']} tokens: {rates(result)}."
    )


def encode(result: dict[str, Any]) -> str:
    """Encoding, one sentence."""
    runs = result["tokens_per_s"]["kvilt"]["n"]
    return f"Batches of {result['batch']} x 500 tokens, medians of {runs} paired runs: {rates(result)}."


def rates(result: dict[str, Any]) -> str:
    """Both rates and their ratio."""
    mine, theirs = (result["tokens_per_s"][name]["median"] for name in ("kvilt", "transformers"))
    return f"{mine:.1f} tokens/s, transformers {theirs:.1f} tokens/s, ratio {result['ratio']:.2f}"


def memory(result: dict[str, Any]) -> str:
    """Memory, one sentence."""
    mb = {name: f"{result[name] / 1e6:,.0f} MB" for name in ("weights", "placed_cache", "grown")}
    return (
        f"Weights {mb['weights']}, one placed cache {mb['placed_cache']}; an answer makes the process grow by {mb['grown']}, "
        f"{100 * result['beyond_model_and_cache']:.1f} % of model and cache beyond the cache itself."
    )


LONG = {
    "ttft": table,
    "floor/ttft": table,
    "methods/ttft": table,
    "recompute/ttft": table,
    "decode": decode,
    "encode": encode,
    "memory": memory,
}

if __name__ == "__main__":
    main()

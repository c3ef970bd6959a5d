"""Write the figures of benchmarks/*.json into README.md and benchmarks/README.md; `--check` fails if they are stale."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from kvilt.lab.bench.ttft import table

ROOT = Path(__file__).parent.parent
SHOWN = ("block", "kvlink")  # in the README


def main() -> None:
    """Rewrite, or check, both files."""
    stale = []
    for path, sections in ((ROOT / "README.md", {"smollm2/ttft": peers}), (ROOT / "benchmarks" / "README.md", LONG)):
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


def peers(result: dict[str, Any]) -> str:
    """The README's table: what a prompt of 5,000 tokens waits for its first token, documents in another order."""
    own, served = (
        result["points"][0]["rows"],
        json.loads((ROOT / "benchmarks" / "vllm.json").read_text())["ttft"]["5000"],
    )
    vllm = served["seconds"]
    rows = [("vLLM with prefix caching, documents shuffled", vllm["vllm shuffled"])]
    rows += [(f"vLLM with Kvilt, {label(n)}, shuffled", vllm[n]) for n in vllm if n.startswith(SHOWN)]
    rows += [("vLLM's own prefix hit: the same documents in the same order", vllm["vllm same order"])]
    rows += [("transformers, full prefill", own["full"]["ttft_s"]["median"])]
    rows += [
        (f"Kvilt's engine, {label(n)}, any order", r["ttft_s"]["median"]) for n, r in own.items() if n.startswith(SHOWN)
    ]
    lines = [f"| {name} | {seconds:.2f} |" for name, seconds in rows]
    return "\n".join(
        [f"| {served['tokens']:,} and {result['points'][0]['context']:,} tokens | TTFT, s |", "|---|---:|", *lines]
    )


def label(name: str) -> str:
    """A strategy as code, without the path of its vectors; where its documents lie in words."""
    name, _, where = re.sub(r":wrapper=[^ ,]*", "", name).partition(" (")
    return f"`{name}` from {where.rstrip(')') or 'disk'}" if where else f"`{name}`"


def decode(result: dict[str, Any]) -> str:
    """Decoding, one sentence."""
    return (
        f"At {result['context']:,} rows of context, medians of {result['tokens_per_s']['kvilt']['n']} paired runs of "
        f"{result['tokens']} tokens: {rates(result)}; APE {result['tokens_per_s']['ape']['median']:.1f} tokens/s."
    )


def encode(result: dict[str, Any]) -> str:
    """Encoding, one sentence."""
    runs = result["tokens_per_s"]["kvilt"]["n"]
    return f"Batches of {result['batch']} x 500 tokens, medians of {runs} paired runs: {rates(result)}."


def corpus(result: dict[str, Any]) -> str:
    """Encoding many documents, one sentence."""
    tenths = result["tenths_tokens_per_s"]
    return (
        f"{result['documents']:,} documents of 500 tokens, writing included ({result['shape']}, {result['dtype']}): "
        f"{min(tenths):,.0f} to {max(tenths):,.0f} tokens/s from tenth to tenth, {result['of_prefill']:.2f} of plain batched "
        f"prefill; the last tenth is {result['last_of_first']:.2f} times as fast as the first."
    )


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
    "smollm2/ttft": table,
    "bfloat16/ttft": table,
    "methods/ttft": table,
    "recompute/ttft": table,
    "decode": decode,
    "smollm2/decode": decode,
    "bfloat16/decode": decode,
    "encode": encode,
    "bfloat16/encode": encode,
    "encode1000": corpus,
    "memory": memory,
}

if __name__ == "__main__":
    main()

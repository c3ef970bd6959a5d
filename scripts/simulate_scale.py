"""A hundred million documents and ten thousand requests a second: what tiers hold, what they hit, what a million requests cost.

    python scripts/simulate_scale.py [--out benchmarks] [--documents 1e8] [--requests 1e4] [--gpu-hour 1.79] ...

Measured: the seconds of a request with everything computed and with everything reused, and the bytes of a token under each codec
(benchmarks/*.json, named in the result). Assumed: everything that is an option. Hit rates of a hundred million documents come
from Che's approximation (LRU) and from the most popular documents (LFU); both, and greedy-dual, which has no formula, are run one
access after another with fewer documents and the same share of them held. Popularity is Zipf's; requests are independent."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
SHARES = (0.001, 0.01, 0.05, 0.1, 0.3)  # of all bytes, that a tier holds
POLICIES = ("lru", "lfu", "greedy-dual")
MONTH = 30 * 86400.0
CODECS = {"bfloat16": "none", "int8": "int8", "int4": "int4"}


def popularity(documents: int, alpha: float, bins: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """(documents of each bin, chance of each of them), the most popular first; the first thousand ranks stand alone."""
    alone = min(documents, 1000)
    edges = np.unique(np.round(np.geomspace(alone, documents, bins))) if documents > alone else np.array([alone])
    counts = np.concatenate([np.ones(alone), np.diff(edges)])
    middles = np.sqrt(edges[:-1] * edges[1:]) + 0.5
    weights = np.concatenate([np.arange(1, alone + 1.0), middles]) ** -alpha
    return counts, weights / (counts @ weights)


def che(counts: np.ndarray, chances: np.ndarray, room: float) -> float:
    """Hit rate of LRU with room for so many documents: each stays for one characteristic time after its last use."""
    low, high = 0.0, 1e3 / chances[-1]
    for _ in range(100):
        span = (low + high) / 2
        low, high = (span, high) if counts @ -np.expm1(-chances * span) < room else (low, span)
    return float((counts * chances) @ -np.expm1(-chances * span))


def best(counts: np.ndarray, chances: np.ndarray, room: float) -> float:
    """Hit rate where the most popular documents are held: what LFU comes to when popularity stays."""
    taken = np.clip(room - np.concatenate([[0.0], np.cumsum(counts)[:-1]]), 0.0, counts)
    return float(taken @ chances)


def trace(documents: int, alpha: float, accesses: int, drift: float, chance: np.random.Generator) -> np.ndarray:
    """Documents in the order in which they are asked for. With `drift`, that share changes its rank ten times over."""
    sums = np.cumsum(np.arange(1, documents + 1.0) ** -alpha)
    ranks = np.searchsorted(sums, chance.random(accesses) * sums[-1])
    names, parts = chance.permutation(documents), []
    for some in np.array_split(ranks, 10 if drift else 1):
        parts.append(names[some])
        moved = chance.choice(documents, int(drift * documents), replace=False)
        names[moved] = names[chance.permutation(moved)]
    return np.concatenate(parts)


def replay(policy: str, asked: np.ndarray, sizes: np.ndarray, tokens: np.ndarray, room: float) -> tuple[float, float]:
    """(hit rate by documents, by tokens) over the second half of the accesses; scores are those of `stores/catalogue.py`."""
    size, cost, half = sizes.tolist(), tokens.tolist(), len(asked) // 2
    used, hits = [-1] * len(size), [0] * len(size)  # last use (-1: not held), and uses since it was stored
    waiting: list[
        tuple[float, int, int]
    ] = []  # score, last use, document; entries that are out of date are passed over
    clock, full, found, saved, wanted = 0.0, 0.0, 0, 0.0, 0.0
    for now, document in enumerate(asked.tolist()):
        there, counted = used[document] >= 0, now >= half
        wanted += cost[document] * counted
        if there:
            found, saved = found + counted, saved + cost[document] * counted
            hits[document] += 1
        else:
            while full + size[document] > room:
                score, last, out = heappop(waiting)
                if used[out] == last:
                    used[out], clock, full = -1, max(clock, score), full - size[out]
            hits[document], full = 0, full + size[document]
        used[document] = now
        worth = clock + (hits[document] + 1.0) * cost[document] / size[document]
        score = worth if policy == "greedy-dual" else float(hits[document]) if policy == "lfu" else 0.0
        heappush(waiting, (score, now, document))
    return found / (len(asked) - half), saved / wanted


def checked(
    o: argparse.Namespace, documents: int, alpha: float, shares: Sequence[float], drift: float = 0.0
) -> dict[str, Any]:
    """Hit rates of fewer documents, run one access after another, beside what the formulas say of as many."""
    chance = np.random.default_rng(o.seed)
    tokens = np.clip(chance.lognormal(0.0, o.spread, documents), 0.05, 20.0)
    asked = trace(documents, alpha, int(o.accesses * documents), drift, chance)
    run = {p: [replay(p, asked, tokens, tokens, share * tokens.sum())[0] for share in shares] for p in POLICIES}
    bins = popularity(documents, alpha)
    lru, lfu = ([rule(*bins, share * documents) for share in shares] for rule in (che, best))
    lean = {p: [(h - low) / (high - low) for h, low, high in zip(run[p], lru, lfu, strict=True)] for p in POLICIES}
    return {
        "documents": documents,
        "alpha": alpha,
        "drift": drift,
        "shares": shares,
        "run": run,
        "che": lru,
        "best": lfu,
        "lean": lean,
    }


class Rates:
    """Hit rates at full size: from LRU's formula to the best possible one, as far as a policy came in what was run."""

    def __init__(self, documents: float, check: dict[str, Any]) -> None:
        self.documents, self.check = documents, check
        self.bins = popularity(int(documents), check["alpha"])

    def __call__(self, policy: str, share: float) -> float:
        """The hit rate where so large a share of the documents is held."""
        if share >= 1:
            return 1.0
        room = share * self.documents
        low, high = che(*self.bins, room), best(*self.bins, room)
        lean = (
            np.interp(np.log(share), np.log(self.check["shares"]), self.check["lean"][policy])
            if policy != "lru"
            else 0.0
        )
        return low + float(np.clip(lean, 0.0, 1.0)) * (high - low)


def measured(o: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds to the first token of ten documents of 500 tokens, all computed and all reused, and bytes of a token."""
    read = lambda name: json.loads((ROOT / "benchmarks" / name).read_text())  # noqa: E731
    rows = next(p["rows"] for p in read("ttft.json")["points"] if p["context"] == 5000)
    gpu, codecs = read("gpu.json"), read("compression.json")["rows"]
    share = {name: codecs[row]["bytes_per_token"] / codecs["none"]["bytes_per_token"] for name, row in CODECS.items()}
    plain = codecs["none"]["load_s"]["median"]
    slower = {
        name: 4 * (codecs[row]["load_s"]["median"] - plain) for name, row in CODECS.items()
    }  # 4 x the numbers of llama-30m
    cpu, h200 = rows["block"]["ttft_s"]["median"], gpu["llama-8b"]["block"]["median"]
    loading = 5000 * 131072 / o.link
    return {
        "CPU, Llama-3.2-1B": {
            "source": "ttft.json: 2 threads, float32 compute; caches on the disk, in the page cache",
            "prefill_s": rows["full"]["ttft_s"]["median"],
            "reuse_s": {name: cpu + slower[name] for name in CODECS},
            "bytes_per_token": {name: 32768 * share[name] for name in CODECS},
        },
        "H200, Llama-3-8B": {
            "source": "gpu.json: transformers engine, bfloat16; caches in host memory; codecs not measured there",
            "prefill_s": gpu["llama-8b"]["full"]["median"],
            "reuse_s": dict.fromkeys(CODECS, h200),
            "bytes_per_token": {name: 131072 * share[name] for name in CODECS},
        },
        "A100, Llama-3-8B (paper)": {
            "source": f"KVLink: 246 and 9 GPU-hours per million requests, loading at {o.link / 1e9:g} GB/s added",
            "prefill_s": 246 * 3600 / 1e6,
            "reuse_s": {name: 9 * 3600 / 1e6 + loading * share[name] for name in CODECS},
            "bytes_per_token": {name: 131072 * share[name] for name in CODECS},
        },
    }


def costs(o: argparse.Namespace, profile: dict[str, Any], rates: Rates) -> dict[str, Any]:
    """What a machine of one kind makes of the whole: bytes, machines, and money for a million requests."""
    monthly, per = (
        o.requests * MONTH / 1e6,
        o.gpu_hour / 3600 * 1e6,
    )  # millions of requests a month; money per second of each
    prefill, made = profile["prefill_s"], {}
    for codec in CODECS:
        reuse, document = profile["reuse_s"][codec], o.tokens * profile["bytes_per_token"][codec]
        total = document * o.documents
        storage = total / 1e9 * o.gb_month / monthly
        tier = min(
            1.0, o.memory * o.requests * reuse / total
        )  # of all documents, in the memory of the machines that serve
        hits = {p: rates(p, tier) for p in POLICIES}
        moved = o.requests * o.per_request * document
        some = {p: [per * (h * reuse + (1 - h) * prefill) for h in (rates(p, s) for s in SHARES)] for p in POLICIES}
        pays = document / 1e9 * o.gb_month / max((prefill - reuse) / o.per_request * o.gpu_hour / 3600, 1e-30)
        made[codec] = {
            "bytes": total,
            "storage_month": total / 1e9 * o.gb_month,
            "machines": o.requests * reuse,
            "memory_share": tier,
            "memory_hits": hits,
            "memory_bytes_s": moved * hits["greedy-dual"],
            "object_bytes_s": {p: moved * (1 - h) for p, h in hits.items()},
            "all_million": {
                p: per * reuse + storage + (1 - h) * o.per_request * o.get_1000 * 1000 for p, h in hits.items()
            },
            "some_million": some,
            "pays_from": pays if prefill > reuse else None,  # requests for a document a month
        }
    return {"prefill_million": per * prefill, "prefill_machines": o.requests * prefill, **profile, "codecs": made}


def plot(made: dict[str, Any], rates: Rates, path: Path) -> None:
    """Hit rates by share held; and the price of a million requests where only so much is held, of all computed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    shares = np.geomspace(0.001, 0.5, 30)
    for policy, colour in zip(POLICIES, ("tab:gray", "tab:orange", "tab:blue"), strict=True):
        left.plot(shares, [rates(policy, s) for s in shares], color=colour, label=policy)
        check = made["checks"][0]
        left.plot(check["shares"], check["run"][policy], "o", color=colour, fillstyle="none")
        for (name, profile), style in zip(made["machines"].items(), ("-", "--", ":"), strict=True):
            price = profile["codecs"]["int8"]["some_million"][policy]
            label = f"{name}, {policy}" if policy != "lfu" else None
            if label:
                right.plot(SHARES, np.array(price) / profile["prefill_million"], style, color=colour, label=label)
    left.set(
        xscale="log",
        xlabel="share of all documents held",
        ylabel="hit rate",
        title=f"lines: {rates.documents:.0e} documents; circles: {check['documents']:,}, run",
    )
    right.set(
        xscale="log",
        xlabel="share of all documents held",
        ylabel="cost of a request / prefilling",
        title="misses computed, int8",
        ylim=(0, None),
    )
    left.legend()
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def tables(made: dict[str, Any]) -> dict[str, list[str]]:
    """Markdown tables by name; where three figures stand together they are LRU's, LFU's and greedy-dual's."""
    checks = [
        _row(
            "documents",
            "alpha",
            "popularity",
            "held",
            "LRU, formula",
            *(f"{p}, run" for p in POLICIES),
            "best possible",
        )
    ]
    checks.append("| ---: " * 9 + "|")
    for c in made["checks"]:
        for i, share in enumerate(c["shares"]):
            run = [f"{100 * x[i]:.1f} %" for x in (c["che"], *(c["run"][p] for p in POLICIES), c["best"])]
            moves = f"{c['drift']:.0%} move ten times" if c["drift"] else "stays"
            checks.append(_row(f"{c['documents']:,}", c["alpha"], moves, f"{share:.1%}", *run))
    hits = [_row("alpha", "held", *POLICIES), "| ---: " * 5 + "|"]
    for alpha, found in made["hits"].items():
        hits += [
            _row(alpha, f"{s:.1%}", *(f"{100 * found[p][i]:.1f} %" for p in POLICIES)) for i, s in enumerate(SHARES)
        ]
    columns = (
        "all documents, TB",
        "kept, a month",
        "machines",
        "memory holds",
        "hits there",
        "TB/s from memory",
        "TB/s from the store",
    )
    size = [_row("machine", "codec", *columns), "| --- | --- " + "| ---: " * 7 + "|"]
    columns = ("all computed", "all kept", "1 % kept, misses computed", "10 % kept", "a document pays from")
    cost = [_row("machine", "codec", *columns), "| --- | --- " + "| ---: " * 5 + "|"]
    for name, m in made["machines"].items():
        size.append(_row(name, "all computed", "", "", f"{m['prefill_machines']:,.0f}", "", "", "", ""))
        for codec, c in m["codecs"].items():
            moved = c["memory_bytes_s"] / 1e12, c["object_bytes_s"]["greedy-dual"] / 1e12
            found = _three(f"{100 * c['memory_hits'][p]:.0f} %" for p in POLICIES)
            held = (
                f"{c['bytes'] / 1e12:,.0f}",
                f"{c['storage_month']:,.0f}",
                f"{c['machines']:,.0f}",
                f"{c['memory_share']:.1%}",
            )
            size.append(_row(name, codec, *held, found, *(f"{x:.2f}" for x in moved)))
            some = [_three(f"{c['some_million'][p][SHARES.index(s)]:,.0f}" for p in POLICIES) for s in (0.01, 0.1)]
            pays = "never" if c["pays_from"] is None else f"{c['pays_from']:,.2g} requests a month"
            kept = _three(f"{c['all_million'][p]:,.0f}" for p in POLICIES)
            cost.append(_row(name, codec, f"{m['prefill_million']:,.0f}", kept, *some, pays))
    return {"checks": checks, "hits": hits, "size": size, "cost": cost}


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _three(cells: Iterable[str]) -> str:
    given = list(cells)
    return given[0] if len(set(given)) == 1 else " / ".join(given)


def write(page: Path, made: dict[str, list[str]]) -> None:
    """Put the tables where the page has their names."""
    text = page.read_text()
    for name, lines in made.items():
        new = f"<!-- {name} -->\n" + "\n".join(lines) + f"\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->\n.*?<!-- /{name} -->", lambda _, new=new: new, text, flags=re.DOTALL)
    page.write_text(text)


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What is assumed; money is in US dollars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value, about in (
        ("documents", 1e8, "documents of the corpus"),
        ("tokens", 500.0, "tokens of a document, on average"),
        ("spread", 0.6, "of their logarithm, in what is run"),
        ("requests", 1e4, "a second"),
        ("per-request", 10.0, "documents of a request"),
        ("alpha", 1.0, "Zipf's exponent, where costs are reckoned"),
        ("gpu-hour", 1.79, "price of an hour of a machine (the paper's A100)"),
        ("gb-month", 0.023, "price of a GB in an object store for a month"),
        ("get-1000", 0.0004, "price of a thousand reads from it"),
        ("memory", 256e9, "bytes of memory for caches in every machine; together they are one tier"),
        ("link", 25e9, "bytes a second into the GPU, where loading was not measured"),
        ("small", 1e5, "documents in what is run"),
        ("large", 1e6, "documents in the largest run"),
        ("accesses", 6.0, "accesses per document in what is run"),
        ("drift", 0.05, "share of documents that change their rank, ten times, where popularity moves"),
    ):
        parser.add_argument(f"--{name}", type=float, default=value, help=f"{about} (default {value:g})")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, reckon, and write scale.json, scale.png and the tables of scale.md."""
    o, began = options(arguments), time.perf_counter()
    small, some = int(o.small), SHARES[1:]
    checks = [
        checked(o, small, o.alpha, some),
        checked(o, small, 0.8, some),
        checked(o, small, o.alpha, (0.05,), o.drift),
    ]
    checks.append(checked(o, int(o.large), o.alpha, (0.05,)))
    rates = {c["alpha"]: Rates(o.documents, c) for c in checks[:2]}
    made: dict[str, Any] = {"options": {k: v for k, v in vars(o).items() if k != "out"}, "checks": checks}
    made["hits"] = {alpha: {p: [rate(p, s) for s in SHARES] for p in POLICIES} for alpha, rate in rates.items()}
    made["machines"] = {name: costs(o, profile, rates[o.alpha]) for name, profile in measured(o).items()}
    made["seconds"] = time.perf_counter() - began
    (o.out / "scale.json").write_text(json.dumps(made, indent=1) + "\n")
    plot(made, rates[o.alpha], o.out / "scale.png")
    write(o.out / "scale.md", tables(made))


if __name__ == "__main__":
    main()

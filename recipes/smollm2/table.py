"""The figures of benchmarks/real.json from what a training run left: shares with intervals, paired differences, retention.

Run: python recipes/smollm2/table.py RESULTS.npz DATA [--untrained FILE] [--more RESULTS.npz]; then python scripts/real_tables.py.
DATA holds what data.py wrote, the untrained FILE what untrained.py measured; --more is a run of the stages that go on from there
(writer_more, teach_more), which are compared with that run's own full recompute."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import data
import evaluation
import numpy as np

import rows
from kvilt.lab.evaluate.bootstrap import difference, interval

OUT = Path(__file__).parents[2] / "benchmarks" / "real.json"
NAMES = {  # labels of a run: strategies
    "full": "full",
    "writer_more": "writer",
    "writer_packet": "writer trained for 50 s",
    "writer_packet_query": "writer trained for 50 s, with query_lora",
    "writer": "writer without vectors",
    "linked": "linked_packet",
    "packet": "kv_packet",
    "kvlink5": "kvlink:links=5",
    "query": "query_lora",
    "naive": "naive",
    "weights/full": "full, all weights taught",
}
MORE = ("writer_more",)  # of a second run
PAIRS = (("linked", "packet"), ("writer_packet", "packet"), ("writer_packet", "writer"), ("writer_packet", "kvlink5"))
PAIRS += (("writer_packet_query", "writer_packet"), ("query", "naive"), ("writer_more", "writer_packet"))


class Outcomes:
    """Right or not, and the tokens, of every question of every label."""

    def __init__(self, results: Any, arrays: dict[str, Any], texts: Any) -> None:
        self.results, self.arrays, self.texts = results, arrays, texts
        self.run: Any = SimpleNamespace(arrays=arrays, drawn={})

    def tokens(self, label: str, name: str) -> dict[int, list[int]]:
        """Answers by question."""
        numbers, tokens = (self.results[f"{label}/{name}/{part}"].tolist() for part in ("questions", "tokens"))
        return dict(zip(numbers, tokens, strict=True))

    def right(self, label: str, name: str) -> dict[int, bool]:
        """Whether each answer holds an accepted one."""
        wanted = rows.texts(evaluation.SETS[name][0], self.arrays)
        return {q: evaluation.right(self.texts.text(t), wanted[q]) for q, t in self.tokens(label, name).items()}

    def groups(self, name: str, limit: int) -> dict[int, str]:
        """The context that each question was asked in."""
        made = evaluation.contexts(self.run, name, limit)
        return {q: str(number) for number, context in enumerate(made) for _, q in context.names}


def percent(values: Any) -> list[float]:
    """A value and its interval in per cent."""
    return [round(100 * v, 1) for v in values]


def cell(o: Outcomes, label: str, name: str) -> dict[str, Any]:
    """One strategy on one set, beside full recompute of the taught model."""
    reference = "more/full" if label in MORE else "full"
    mine, full = o.right(label, name), o.right(reference, name)
    both = [q for q in full if q in mine]
    of = o.groups(name, evaluation.CHEAP[name])
    groups = [of[q] for q in both]
    hits, best = ([(float(h[q]), 1.0) for q in both] for h in (mine, full))
    kept = [(float(mine[q] and full[q]), float(full[q])) for q in both]
    told, said = o.tokens(label, name), o.tokens(reference, name)
    made: dict[str, Any] = {
        "strategy": NAMES[label],
        "set": name,
        "n": len(both),
        "right": percent(interval(hits, groups)),
    }
    if label != "full":
        made |= {"difference": percent(difference(hits, best, groups)), "kept": percent(interval(kept, groups))}
        made["agree"] = round(100 * sum(told[q] == said[q] for q in both) / len(both), 1)
    return made


def duel(o: Outcomes, first: str, second: str, names: list[str]) -> dict[str, Any]:
    """Two methods on the questions of several sets together."""
    a, b, groups = [], [], []
    for name in names:
        one, other, of = o.right(first, name), o.right(second, name), o.groups(name, evaluation.CHEAP[name])
        both = [q for q in one if q in other]
        a += [(float(one[q]), 1.0) for q in both]
        b += [(float(other[q]), 1.0) for q in both]
        groups += [f"{name} {of[q]}" for q in both]
    return {
        "first": NAMES[first],
        "second": NAMES[second],
        "n": len(a),
        "difference": percent(difference(a, b, groups)),
    }


def untrained(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Strategies without training: what the gold answer costs in nats, and the divergence from full recompute."""
    lines = []
    for key, found in measured.items():
        name, model, strategy = key.split("/", 2)
        full = measured[f"{name}/{model}/full"]["nll"]
        nats, best = ([(x, 1.0) for x in values] for values in (found["nll"], full))
        groups = [str(n) for n in found["context"]] if "context" in found else None
        gap = [round(v, 2) for v in difference(nats, best, groups)]
        kl = round(float(np.mean(found["kl"])), 3)
        lines.append({"set": name, "model": model, "strategy": strategy, "n": len(full), "nats": gap, "kl": kl})
    return lines


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--untrained", type=Path)
    parser.add_argument("--more", type=Path)
    given = parser.parse_args()
    results = dict(np.load(given.results))
    told = json.loads(bytes(results["results.json"]))
    if given.more:
        more = dict(np.load(given.more))
        own = ("full/", *(f"{label}/" for label in MORE))
        results |= {f"more/{k}" if k.startswith("full/") else k: v for k, v in more.items() if k.startswith(own)}
        told |= {k: v for k, v in json.loads(bytes(more["results.json"])).items() if k.startswith("train/")}
    arrays = data.load(given.data / "data-test.npz.xz") | data.load(given.data / "data-train.npz.xz")
    o = Outcomes(results, arrays, evaluation.Texts(given.data))
    names = list(evaluation.CHEAP)
    labels = [label for label in NAMES if given.more or label not in MORE]
    made: dict[str, Any] = {"cells": [cell(o, label, name) for label in labels for name in names]}
    made["duels"] = [duel(o, *pair, names) for pair in PAIRS if given.more or pair[0] not in MORE]
    made["untrained"] = untrained(json.loads(given.untrained.read_text())) if given.untrained else []
    made["training"] = {key.removeprefix("train/"): note for key, note in told.items() if key.startswith("train/")}
    made["engine"] = json.loads(OUT.read_text()).get("engine", {}) if OUT.exists() else {}  # methods.py writes it
    OUT.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()

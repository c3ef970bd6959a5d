"""The simulation of benchmarks/scale.md: formulas against runs, runs against the real catalogue, tables against results."""

from __future__ import annotations

import json
import runpy
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvilt.stores.blobs import MemoryBlobs
from kvilt.stores.catalogue import Catalogue
from kvilt.stores.entry import Entry

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def simulation() -> dict[str, Any]:
    """The names of the script."""
    return runpy.run_path(str(ROOT / "scripts" / "simulate_scale.py"))


@pytest.mark.parametrize("alpha", [0.7, 1.0])
def test_formulas_agree_with_what_is_run(simulation: dict[str, Any], alpha: float) -> None:
    """Danger: a hundred million documents are reckoned by a formula that is wrong for a thousand."""
    options = simulation["options"](["--accesses", "20"])
    made = simulation["checked"](options, 4000, alpha, (0.02, 0.2))
    for i in range(2):
        assert made["run"]["lru"][i] == pytest.approx(made["che"][i], abs=0.02)
        assert made["run"]["lru"][i] < made["run"]["greedy-dual"][i] < made["best"][i]
        assert made["run"]["lfu"][i] < made["best"][i]
    whole = simulation["popularity"](4000, alpha)
    binned = simulation["popularity"](4000, alpha, bins=100)
    assert whole[0].sum() == binned[0].sum() == 4000
    for rule in ("che", "best"):
        assert simulation[rule](*binned, 80.0) == pytest.approx(simulation[rule](*whole, 80.0), abs=0.01)


@pytest.mark.parametrize("policy", ["lru", "lfu", "greedy-dual"])
def test_the_run_evicts_as_the_catalogue_does(simulation: dict[str, Any], policy: str) -> None:
    """Danger: the simulation is of another policy than the one that stores have."""
    chance, count, room = np.random.default_rng(3), 60, 2000.0
    sizes = np.round(np.exp(chance.normal(4, 0.5, count)))
    tokens = np.round(sizes * chance.choice([0.2, 1.0], count)) + 1  # half of them are small for their tokens
    asked = simulation["trace"](count, 0.8, 1200, 0.0, chance)
    catalogue = Catalogue(MemoryBlobs(), policy=policy, budget=int(room), quota=int(room))  # a quota makes it exact
    hits = 0
    for now, document in enumerate(asked.tolist()):
        key = f"{document:064x}"
        if catalogue.contains([key]):
            hits += now >= 600
            catalogue.record([(key, time.time())], 0, None)
        else:
            entry = catalogue.next = Entry(key, int(sizes[document]), int(tokens[document]), used=time.time())
            catalogue.put(key, [memoryview(bytes(entry.bytes))])
    rate, _ = simulation["replay"](policy, asked, sizes, tokens, room)
    assert hits / 600 == pytest.approx(rate, abs=0.01)


def test_the_page_has_the_figures_of_its_results(simulation: dict[str, Any]) -> None:
    """Danger: benchmarks/scale.md says other figures than scale.json, or scale.json was made from other measurements."""
    made, page = (
        json.loads((ROOT / "benchmarks" / "scale.json").read_text()),
        (ROOT / "benchmarks" / "scale.md").read_text(),
    )
    for lines in simulation["tables"](made).values():
        assert "\n".join(lines) in page
    found = simulation["measured"](simulation["options"]([]))
    before = {name: m["prefill_s"] for name, m in made["machines"].items()}
    assert {name: m["prefill_s"] for name, m in found.items()} == before, "run: python scripts/simulate_scale.py"

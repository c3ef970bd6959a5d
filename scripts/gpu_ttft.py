"""Time to first token on a GPU with caches in host memory: python scripts/gpu_ttft.py OUT.json [SHAPE ...]

Ten documents of 500 tokens, bfloat16, random weights; every round asks in another order; two rounds warm up, seven count."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any, cast

import torch

from kvilt.engine.engine import Engine
from kvilt.lab.bench.subject import random_subject
from kvilt.registry import build
from kvilt.stores.store import Store
from kvilt.strategies.base import Strategy

SPECS = ("full", "block", "kvlink:links=5", "epic:tokens=16")
WARM, ROUNDS = 2, 7


def measure(shape: str) -> dict[str, Any]:
    """Seconds to the first token of every strategy, in turns."""
    subject, store = random_subject(shape, "bfloat16", "cuda"), cast(Store, build("store", "memory:budget=20GB"))
    documents = subject.documents(10)
    engines = {s: Engine(subject.model, subject.text, cast(Strategy, build("strategy", s)), store) for s in SPECS}
    engines["block"].encode(documents)
    times: dict[str, list[float]] = {spec: [] for spec in SPECS}
    steps: dict[str, dict[str, float]] = {}
    for turn in range(WARM + ROUNDS):
        for spec, engine in engines.items():
            torch.cuda.synchronize()
            order = documents[::-1] if turn % 2 else documents
            usage = engine.answer(subject.question, order, max_new_tokens=1).usage
            times[spec] += [usage.ttft_s] if turn >= WARM else []
            steps[spec] = usage.steps_s
    return {
        spec: {"median": statistics.median(t), "min": min(t), "max": max(t), "steps": steps[spec]}
        for spec, t in times.items()
    }


if __name__ == "__main__":
    made = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": "bfloat16", "documents": 10}
    for name in sys.argv[2:] or ["llama-1b", "llama-8b"]:
        made[name] = measure(name)  # type: ignore[assignment]
        Path(sys.argv[1]).write_text(json.dumps(made, indent=1) + "\n")

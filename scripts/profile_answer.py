"""Where the time of one answer goes: python scripts/profile_answer.py MODEL DOCUMENTS.jsonl [STRATEGY]

Ten documents of about 600 tokens are made of the texts of DOCUMENTS and encoded; then medians of 15 first tokens, each over
another order. Steps are timed by wrapping the functions that do them; what is left is Python, dispatch and small operations."""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvilt import Document, Engine
from kvilt.model import attention
from kvilt.model.model import Model
from kvilt.rows.rows import FileRows, Rotation

ROUNDS, WARM, TOKENS = 15, 3, 600
taken: dict[str, float] = defaultdict(float)
inside: list[str] = []


def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, its seconds added to a step; what a timed function calls counts as its own."""

    def wrapped(*given: Any, **named: Any) -> Any:
        if inside:
            return work(*given, **named)
        inside.append(name)
        began = time.perf_counter()
        try:
            return work(*given, **named)
        finally:
            taken[name] += time.perf_counter() - began
            inside.pop()

    return wrapped


def watch() -> None:
    """Time every step."""
    kernel = "flash" if hasattr(attention, "flash") else "_flash"
    setattr(attention, kernel, timed("attention", getattr(attention, kernel)))
    torch.nn.functional.linear = timed("matrices", torch.nn.functional.linear)
    FileRows.read = timed("reading rows", FileRows.read)  # type: ignore[method-assign]
    Rotation.rotate = timed("rotating keys", Rotation.rotate)  # type: ignore[method-assign]
    Model._marks = timed("is the model unchanged", Model._marks)  # type: ignore[method-assign]


def main() -> None:
    """Encode, measure, print."""
    model, texts = sys.argv[1], [json.loads(line)["text"] for line in Path(sys.argv[2]).read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine.load(model, (sys.argv[3:] or ["block:sink=system"])[0], f"disk:path={folder}")
        documents, text = list[Document](), ""
        for piece in texts:
            text += f" {piece}"
            if len(engine.text.document_ids(Document(text))) >= TOKENS:
                documents, text = [*documents, Document(text)], ""
            if len(documents) == 10:
                break
        engine.encode(documents)
        watch()
        rounds = []
        for number in range(ROUNDS + WARM):
            order = random.Random(number).sample(documents, len(documents))
            taken.clear()
            began = time.perf_counter()
            usage = engine.answer(f"What is number {number}?", order, max_new_tokens=1).usage
            rounds.append({**taken, "all": time.perf_counter() - began})
    steps = {name: statistics.median(r.get(name, 0.0) for r in rounds[WARM:]) for name in rounds[-1]}
    steps["the rest"] = 2 * steps["all"] - sum(steps.values())
    print(f"{usage.reused_tokens} reused and {usage.computed_tokens} computed tokens, {engine.model.shape.dtype}")
    for name, seconds in sorted(steps.items(), key=lambda step: -step[1]):
        print(f"| {name} | {1000 * seconds:.0f} |")


if __name__ == "__main__":
    main()

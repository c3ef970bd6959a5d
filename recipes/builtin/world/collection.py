"""The documents that ship with the package and the test questions about them."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

from builtin.world import contexts, stories
from builtin.world.samples import Page, Sample
from kvilt.builtin import Asked

SEED = 20_260


class Paper(TypedDict):
    """One line of collection.jsonl."""

    id: str
    title: str
    text: str


ORDERS = 7  # in how many orders of its pages a group is asked about


def make(groups: int = 75, tales: int = 25, per_kind: int = 500, seed: int = SEED) -> tuple[list[Paper], list[Asked]]:
    """Documents in groups that belong together, and up to `per_kind` questions of every kind, all of the test split."""
    rng = random.Random(seed)
    papers: dict[Page, Paper] = {}
    asked: dict[str, list[Asked]] = defaultdict(list)
    for _ in range(groups):
        for sample in _orders(rng):
            _add(papers, asked, sample, "p")
    for _ in range(tales):
        _add(papers, asked, stories.build(rng, "test", rng.randint(6, 10)), "s")
    chosen = [rng.sample(found, min(per_kind, len(found))) for _, found in sorted(asked.items())]
    return list(papers.values()), [question for found in chosen for question in found]


def _orders(rng: random.Random) -> list[Sample]:
    while True:
        builder = contexts.write(rng, "test", rng.randint(5, 8))
        if 5 <= builder.size() <= 10:
            return [contexts.arrange(builder) for _ in range(ORDERS)]


def _add(papers: dict[Page, Paper], asked: dict[str, list[Asked]], sample: Sample, letter: str) -> None:
    """Add the pages of one sample, and its questions with the pages they follow."""
    for page in sample.pages:
        number = len(papers)
        papers.setdefault(page, {"id": f"{letter}{number:04d}", "title": page.title, "text": page.text})
    for question in sample.questions:
        if question.after < min(5, len(sample.pages)):
            continue
        found = asked[question.kind]
        found.append(
            {
                "id": f"{question.kind}-{len(found):04d}",
                "kind": question.kind,
                "question": question.text,
                "answer": question.answer,
                "value": question.value,
                "documents": [papers[page]["id"] for page in sample.pages[: question.after]],
            }
        )


def write(folder: Path, papers: Iterable[Paper], questions: Iterable[Asked]) -> None:
    """Write both files, one JSON object a line."""
    for name, lines in (("collection.jsonl", papers), ("questions.jsonl", questions)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8")

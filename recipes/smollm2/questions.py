"""Held-out questions as files for `kvilt evaluate run qa:path=FILE`: several questions share a context, as readers of one page do.

    python recipes/smollm2/questions.py QA_FOLDER OUT.jsonl [--data squad_dev] [--documents 5] [--contexts 100] [--questions 5]

A context is some paragraphs of one article, shuffled; each question has its answer in one of them. The questions of a context are
one group: intervals are drawn over contexts."""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any


def made(
    rows: list[dict[str, Any]], documents: int, contexts: int, questions: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Lines in the layout of Kvilt's QA tasks, context after context."""
    draw = random.Random(seed)
    articles: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        articles[row["docs"][0]["title"]][row["docs"][0]["text"]].append(row)
    groups = []
    for title, paragraphs in articles.items():
        order = sorted(paragraphs)
        draw.shuffle(order)
        whole = len(order) - len(order) % documents
        groups += [(title, order[at : at + documents]) for at in range(0, whole, documents)]
    draw.shuffle(groups)
    lines = []
    for number, (title, texts) in enumerate(groups[:contexts]):
        some = [(row, text) for text in texts for row in articles[title][text]]
        for row, gold in draw.sample(some, min(questions, len(some))):
            docs = [{"title": title, "text": text, "gold": text == gold} for text in texts]
            about = {
                "id": row["id"],
                "question": row["question"],
                "answers": row["answers"],
                "group": f"context {number}",
            }
            lines.append({**about, "docs": docs})
    return lines


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", default="squad_dev")
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument("--contexts", type=int, default=100)
    parser.add_argument("--questions", type=int, default=5)
    given = parser.parse_args()
    with gzip.open(given.folder / f"{given.data}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    lines = made(rows, given.documents, given.contexts, given.questions)
    given.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} questions over {given.contexts} contexts: {given.out}")


if __name__ == "__main__":
    main()

"""Held-out questions as files for `kvilt evaluate run qa:path=FILE`, one file a set.

    python recipes/smollm2/questions.py QA_FOLDER OUT [--contexts 100] [--questions 5]

`squad5`, `squad10` and `squadshifts` are paragraphs of one article, shuffled, and several questions that share them, as readers
of one page do; `pieces` are two consecutive paragraphs, each cut into up to three documents, in their order. The questions of a
context are one group: intervals are drawn over contexts. `nq` is the gold passage at a place of its own among the nine best
retrieved others; `hotpotqa`, `2wiki` and `musique` need several of their documents, and come as they were published."""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from data import read, thirds

Row = dict[str, Any]


def contexts(
    rows: list[Row], documents: int, count: int, questions: int, cut: bool = False, seed: int = 0
) -> list[Row]:
    """Lines in the layout of Kvilt's QA tasks, context after context; `cut` keeps the article's order and cuts paragraphs."""
    draw = random.Random(seed)
    articles: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        articles[row["docs"][0]["title"]][row["docs"][0]["text"]].append(row)
    groups = []
    for title, paragraphs in articles.items():
        order = list(paragraphs) if cut else sorted(paragraphs)
        if not cut:
            draw.shuffle(order)
        whole = len(order) - len(order) % documents
        groups += [(title, order[at : at + documents]) for at in range(0, whole, documents)]
    draw.shuffle(groups)
    lines = []
    for number, (title, texts) in enumerate(groups[:count]):
        some = [(row, text) for text in texts for row in articles[title][text]]
        for row, gold in draw.sample(some, min(questions, len(some))):
            parts = [(part, text == gold) for text in texts for part in ((cut and thirds(text)) or [text])]
            docs = [{"title": title, "text": part, "gold": needed} for part, needed in parts]
            lines.append(line(row, docs, f"context {number}"))
    return lines


def line(row: Row, docs: list[Row], group: str | None = None) -> Row:
    """One question in the layout of Kvilt's QA tasks."""
    about = {"id": row["id"], "question": row["question"], "answers": row["answers"], "docs": docs}
    return about if group is None else {**about, "group": group}


def placed(rows: list[Row], others: int = 9) -> list[Row]:
    """The gold passage (the first one given) at the first, second ... place among the others, question after question."""
    lines = []
    for number, row in enumerate(rows):
        docs = row["docs"][1 : others + 1]
        docs.insert(number % (others + 1), row["docs"][0])
        lines.append(line(row, docs))
    return lines


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--contexts", type=int, default=100)
    parser.add_argument("--questions", type=int, default=5)
    given = parser.parse_args()

    def rows(*names: str) -> list[Row]:
        """Rows of files that may share some."""
        return list({row["id"]: row for name in names for row in read(given.folder / f"{name}.jsonl.gz")}.values())

    squad, shared = rows("squad_dev"), (given.contexts, given.questions)
    made = {
        "squad5": contexts(squad, 5, *shared),
        "squad10": contexts(squad, 10, *shared),
        "pieces": contexts(squad, 2, *shared, cut=True),
        "squadshifts": contexts(rows("squadshifts_wiki_test"), 5, *shared),
        "nq": placed(rows("nq_20docs")),
        "hotpotqa": [line(row, row["docs"]) for row in rows("hotpotqa_dev", "hotpotqa_dev_extra")],
        "2wiki": [line(row, row["docs"]) for row in rows("2wiki_dev", "2wiki_dev_extra")],
        "musique": [line(row, row["docs"]) for row in rows("musique_dev")],
    }
    given.out.mkdir(parents=True, exist_ok=True)
    for name, lines in made.items():
        text = "".join(json.dumps(one) + "\n" for one in lines)
        (given.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {len(lines)} questions, {len({one.get('group', one['id']) for one in lines})} contexts")


if __name__ == "__main__":
    main()

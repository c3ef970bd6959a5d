"""Training rows for the built-in model's methods: `python -m builtin.rows --out DIR [--babi FOLDER]` (in recipes/).

Writes biography.jsonl, stories.jsonl, babi.jsonl and copies.jsonl as `kvilt train` reads them, all of the training split."""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from builtin.world import babi, contexts, stories
from builtin.world.samples import Page, Question, Sample

SEED = 77  # the base model's own training draws from other seeds
PAGES = 18  # documents of a sample at most: as many slots as the tokenizer's reserved tokens give five links each


MORE = 9  # further questions of a row at most


def row(rng: random.Random, sample: Sample, question: Question) -> dict[str, Any]:
    """One JSON line; the order of the pages carries meaning, since chunks refer to what stands before them."""
    earlier = [q for q in sample.questions if q is not question and q.after <= question.after]
    further = [{"question": q.text, "answers": [q.answer], "documents": q.after} for q in mixed(rng, earlier)[:MORE]]
    asked = {"question": question.text, "answers": [question.answer], "further": further}
    return {"documents": documents(sample.pages[: question.after]), **asked, "ordered": True, "split": "train"}


def documents(pages: Iterable[Page]) -> list[dict[str, str] | str]:
    """Pages as `kvilt train` reads them."""
    return [{"title": p.title, "text": p.text} if p.title else p.text for p in pages]


def mixed(rng: random.Random, questions: list[Question]) -> list[Question]:
    """In random order, kinds by turns."""
    seen: Counter[str] = Counter()
    turns = []
    for question in rng.sample(questions, len(questions)):
        turns.append((seen[question.kind], len(turns), question))
        seen[question.kind] += 1
    return [question for _, _, question in sorted(turns, key=lambda turn: turn[:2])]


def biographies(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Biographies and companies in contexts of three to nine pages, as many questions of each kind."""
    for _ in range(count):
        sample = contexts.build(rng, "train", rng.randint(3, 9))
        kinds: dict[str, list[Question]] = defaultdict(list)
        for question in sample.questions:
            kinds[question.kind].append(question)
        if kinds and len(sample.pages) <= PAGES:
            yield row(rng, sample, rng.choice(kinds[rng.choice(sorted(kinds))]))


def tales(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Stories in which states change."""
    for _ in range(count):
        sample = stories.build(rng, "train", rng.randint(2, 10))
        if sample.questions:
            yield row(rng, sample, rng.choice(sample.questions))


def statements(rng: random.Random, count: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Questions of the six bAbI tasks, as many of each, the story cut anew."""
    per_task = {task: babi.load(folder, "train", rng.randrange(2**30), (task,)) for task in babi.TASKS}
    for index in range(count):
        sample = rng.choice(per_task[babi.TASKS[index % len(babi.TASKS)]])
        question = rng.choice(sample.questions)
        if question.after <= PAGES:
            yield row(rng, sample, question)


def copies(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Few documents that are to be said again: what anchors must learn before they are of use to any question."""
    for number in range(count):
        sample = stories.build(rng, "train", 3) if number % 4 == 3 else contexts.build(rng, "train", 3)
        pages = rng.sample(sample.pages, 1 if number % 2 else min(3, len(sample.pages)))
        asked = [(f"What does the page on {p.title} say?", p.text) for p in pages if p.title]
        if len(pages) == 1:
            asked = [("What does the page say?", pages[0].text)]
        if asked:
            first, *others = [{"question": question, "answers": [text]} for question, text in asked]
            further = [{**one, "documents": len(pages)} for one in others]
            yield {"documents": documents(pages), **first, "further": further, "ordered": True, "split": "train"}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--babi", type=Path, help="folder with bAbI en-10k")
    parser.add_argument("--count", type=int, default=6000, help="rows of a file at most; of copies four times as many")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)
    files = {"biography": biographies(rng, args.count), "stories": tales(rng, args.count)}
    if args.babi:
        files["babi"] = statements(rng, args.count, args.babi)
    files["copies"] = copies(random.Random(SEED + 1), 4 * args.count)
    for name, rows in files.items():
        text = "".join(json.dumps(found, ensure_ascii=False) + "\n" for found in rows)
        (args.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}.jsonl: {text.count(chr(10))} rows")


if __name__ == "__main__":
    main()

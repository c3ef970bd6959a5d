"""KVLink with 0, 1 and 5 link tokens on the same questions: does a link token more help?

Run: python recipes/smollm2/links.py TRAINED QUESTIONS.jsonl OUT [--limit 500], where TRAINED is train.py's OUT and QUESTIONS what
questions.py wrote; then python scripts/real_tables.py. Goes on where it was stopped."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ship

from kvilt.engine.engine import Engine
from kvilt.lab.evaluate import metrics
from kvilt.lab.evaluate.bootstrap import difference, interval
from kvilt.lab.evaluate.runner import choose
from kvilt.lab.evaluate.tasks.base import Task
from kvilt.registry import build

REAL = Path(__file__).parents[2] / "benchmarks" / "real.json"
LINKS = 0, 1, 5


def answered(model: Path, links: int, task: Task, limit: int, file: Path) -> dict[str, dict[str, Any]]:
    """Every question's group, and whether the answer holds an accepted one; one line each in `file`."""
    done = {r["id"]: r for r in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
    left = [s for s in choose(task, limit, 0) if s.id not in done]
    if left:
        engine = Engine.load(str(model), f"kvlink:links={links}", f"disk:path={file.parent / 'store'}")
        with file.open("a") as out:
            for sample in left:
                answer = engine.answer(sample.question, list(sample.documents), max_new_tokens=task.max_new_tokens)
                scored = metrics.score(task.metrics, task.extract(answer.text), sample.answers)[task.metrics[0]]
                done[sample.id] = {
                    "id": sample.id,
                    "group": sample.group,
                    "score": scored,
                    "charged": answer.usage.charged,
                }
                out.write(json.dumps(done[sample.id]) + "\n")
                out.flush()
    return done


def main() -> None:
    """Answer, and add the figures to real.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trained", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, default=500)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    task: Any = build("task", f"qa:path={given.questions},answer_tokens=14")
    found = {}
    for links in LINKS:
        model = given.out / f"kvlink{links}"
        if not model.exists():
            ship.kvlink(given.trained / f"kvlink{links}.safetensors", model)
        found[links] = answered(model, links, task, given.limit, given.out / f"kvlink{links}.jsonl")
    ids = sorted(set.intersection(*(set(done) for done in found.values())))
    groups = [found[0][i]["group"] for i in ids]
    pairs = {links: [tuple(done[i]["score"]) for i in ids] for links, done in found.items()}
    percent = lambda made: [round(100 * v, 1) for v in made]  # noqa: E731
    made = json.loads(REAL.read_text())
    made["links"] = {
        "n": len(ids),
        "right": {str(links): percent(interval(each, groups)) for links, each in pairs.items()},
        "difference": {
            f"{b} - {a}": percent(difference(pairs[b], pairs[a], groups)) for a, b in ((0, 1), (1, 5), (0, 5))
        },
    }
    REAL.write_text(json.dumps(made, indent=1) + "\n")
    print(json.dumps(made["links"]))


if __name__ == "__main__":
    main()

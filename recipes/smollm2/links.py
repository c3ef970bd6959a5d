"""KVLink's own models, with 0, 1 and 5 link tokens, on the sets of real.py.

    python recipes/smollm2/links.py TRAINED QUESTIONS OUT [--sets squad5 ...] [--links 0 1 5] [--babi FOLDER] [--limit N]

TRAINED is train.py's OUT, QUESTIONS and OUT what real.py was given: beside its records lie `kvlink:links=N.json`, a line a
question. Goes on where it was stopped. Then: methods.py."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ship
from real import sets

from kvilt.engine.engine import Engine
from kvilt.lab.evaluate import metrics
from kvilt.lab.evaluate.runner import choose
from kvilt.lab.evaluate.tasks.base import Task
from kvilt.lab.evaluate.tasks.qa import SYSTEM
from kvilt.registry import build


def answered(engine: Engine, task: Task, limit: int | None, file: Path) -> None:
    """Ask every question that has no line in `file` yet: its id, group, points and charged compute.

    Left out are questions about more documents than the model has link tokens for."""
    done = {json.loads(line)["id"] for line in file.read_text().splitlines()} if file.exists() else set()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        for sample in choose(task, limit, 0, first=True):
            if sample.id in done or len(sample.documents) > ship.SLOTS:
                continue
            documents = list(sample.documents)
            engine.encode(documents)
            answer = engine.answer(sample.question, documents, max_new_tokens=task.max_new_tokens)
            points = metrics.score(task.metrics, task.extract(answer.text), sample.answers)
            usage = {"charged": answer.usage.charged, "computed_tokens": answer.usage.computed_tokens}
            usage |= {"bytes_loaded": answer.usage.bytes_loaded, "ttft_s": answer.usage.ttft_s}
            out.write(json.dumps({"id": sample.id, "group": sample.group, "metrics": points, "usage": usage}) + "\n")
            out.flush()


def main() -> None:
    """Answer every set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trained", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sets", nargs="*", default=["squad5"])
    parser.add_argument("--links", nargs="*", type=int, default=[0, 1, 5])
    parser.add_argument("--babi", type=Path)
    parser.add_argument("--limit", type=int)
    given = parser.parse_args()
    known = sets(given.questions, given.babi)
    for links in given.links:
        model = given.out / "models" / f"kvlink{links}"
        if not model.exists():
            ship.kvlink(given.trained / f"kvlink{links}.safetensors", model)
        engine = Engine.load(str(model), f"kvlink:links={links}", "memory:budget=1GB", system=SYSTEM)
        for name in given.sets:
            task = build("task", known[name].task)
            answered(engine, task, given.limit or known[name].limit, given.out / name / f"kvlink:links={links}.json")
            print(links, name, flush=True)


if __name__ == "__main__":
    main()

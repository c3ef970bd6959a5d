"""The table of benchmarks/real.md: every strategy on every set of held-out questions, as the engine runs it.

    python recipes/smollm2/real.py QUESTIONS OUT [--sets squad5 hotpotqa ...] [--babi FOLDER] [--limit N]

QUESTIONS is the folder that questions.py wrote, OUT gets a folder a set (what `kvilt evaluate run --out` writes). A second call
goes on where the first one stopped. Samples are asked in the order of their file, context after context, so that a small store in
memory is enough. Two processes of one thread each, with sets of their own, are faster than one of two threads. Then: methods.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from kvilt.engine.engine import Engine
from kvilt.lab.evaluate.runner import run
from kvilt.lab.evaluate.tasks.qa import SYSTEM

ALL = (
    "naive", "block:sink=4", "block:sink=system", "prompt_cache", "ape", "epic:tokens=16", "epic:tokens=16,sink=system",
    "cacheblend:ratio=0.15", "prophetkv:ratio=0.2", "sam_kv", "ranked:ratio=0.15",
    "writer", "kv_packet", "linked_packet", "query_lora",
)  # fmt: skip
SOME = "naive", "block:sink=system", "cacheblend:ratio=0.15", "prophetkv:ratio=0.2", "writer"
LINKED = (*SOME, "linked_packet")
SEVERAL = "hotpotqa", "2wiki", "musique"  # their gold documents and the first others, five in all
OWN = {"squad5": ALL, "pieces": LINKED}


class Set(NamedTuple):
    """One set of questions: the task's name and options, strategies, how many questions at most."""

    task: str
    strategies: tuple[str, ...]
    limit: int | None = None
    compress: tuple[str, ...] = ("",)
    shuffle: bool = False


def sets(questions: Path, babi: Path | None) -> dict[str, Set]:
    """All sets by name."""
    files = {f.stem: f"qa:path={f},answer_tokens=14" for f in sorted(questions.glob("*.jsonl"))}
    found = {name: Set(task, SOME, 500) for name, task in files.items()}
    found |= {name: Set(f"{files[name]},documents=5", LINKED, 500) for name in SEVERAL if name in files}
    found |= {name: Set(files[name], chosen, 500) for name, chosen in OWN.items() if name in files}
    if "squad5" in files:
        found["squad5 int8"] = Set(files["squad5"], ("writer", "prophetkv:ratio=0.2"), 500, ("int8",))
        found["gold"] = Set(f"{files['squad5']},documents=1", (), 500)  # how well the model reads, others left out
        found["shuffled"] = Set(files["squad5"], (), 500, shuffle=True)  # what full recompute keeps of its own answers
    if babi:
        for number in (1, 2, 3, 15):
            found[f"babi{number}"] = Set(f"babi:path={babi},task={number},split=test,answer_tokens=6", SOME, 500)
    for tokens, limit in ((2000, 100), (6000, 24)):
        found[f"needle{tokens}"] = Set(f"niah:characters={tokens * 9 // 2},chunk=2000,answer_tokens=14", SOME, limit)
    return found


def main() -> None:
    """Run the sets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sets", nargs="*")
    parser.add_argument("--babi", type=Path)
    parser.add_argument("--limit", type=int)
    given = parser.parse_args()
    known = sets(given.questions, given.babi)
    for name in given.sets or known:
        one = known[name]
        engine = Engine.load("smollm2-qa", store="memory:budget=2GB", system=SYSTEM)
        done = lambda n, total, name=name: print(f"\r{name}: {n} of {total}", end="", flush=True)  # noqa: E731
        folder = given.out / name.split()[0]
        limit = given.limit or one.limit
        more = {"first": True, "shuffle": one.shuffle, "compressions": one.compress}
        run(engine, one.strategies, one.task, folder, limit, 0, done, **more)
        print()


if __name__ == "__main__":
    main()

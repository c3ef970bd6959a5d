"""KVLink's trainings: `python recipes/kvlink.py mixture|qa-only|blocks --model MODEL --data DIR --out OUT`.

DIR holds one file for each kind of data that is at hand: qa.jsonl, multi-turn.jsonl, summary.jsonl, qa-standard.jsonl,
sft.jsonl, text.jsonl (docs/training.md says what their rows look like), each also as .jsonl.gz. The same command under
`accelerate launch` or `torchrun` uses many GPUs."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvilt.lab.train.data import Source
from kvilt.lab.train.kinds import MIXTURE, source, weighted
from kvilt.lab.train.kvlink import KVLinkConfig, train_kvlink
from kvilt.lab.train.loop import Progress

SYSTEMS = (  # several, so that the links do not depend on one
    "Answer the question from the documents.",
    "You are a helpful assistant. Use the documents to answer, and say so when they do not hold the answer.",
    "Read the documents with care and answer the question in a few words.",
    "Answer truthfully. Rely on the given documents where there are any.",
)


@dataclass(frozen=True)
class Recipe:
    """Settings and the weight of every kind of data."""

    config: KVLinkConfig
    weights: dict[str, float] = field(default_factory=lambda: MIXTURE)


RECIPES = {
    # The paper's run, section 2.4: 6,000 steps of 64 samples on eight H100.
    "mixture": Recipe(KVLinkConfig(systems=SYSTEMS)),
    # Its ablation: 600 steps of questions alone. Better on most question sets, worse on MuSiQue and summaries.
    "qa-only": Recipe(KVLinkConfig(steps=600, systems=SYSTEMS), {"qa": 50, "qa-standard": 50}),
    # Block-Attention on the same data: neither links nor markers.
    "blocks": Recipe(KVLinkConfig(links=0, markers=False, systems=SYSTEMS)),
}


def sources(folder: Path, weights: dict[str, float]) -> tuple[Source, ...]:
    """The files that are there; weights of missing kinds go to the others."""
    found = []
    for kind in weights:
        files = [f for suffix in (".jsonl", ".jsonl.gz") if (f := folder / f"{kind}{suffix}").is_file()]
        found += [source(f"{kind}:{file}") for file in files]
        if not files:
            print(f"no {kind}.jsonl in {folder}: trained without it", file=sys.stderr)
    return weighted(found, weights)


def show(progress: Progress) -> None:
    """A line for every tenth step."""
    if progress.step % 10 == 0:
        print(
            f"{progress.step}/{progress.steps} loss {progress.loss:.4f} held out {progress.held_out}", file=sys.stderr
        )


def main() -> None:
    """Run one recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="fewer steps, to try it out")
    given = parser.parse_args()
    recipe = RECIPES[given.recipe]
    config = replace(recipe.config, steps=given.steps or recipe.config.steps)
    print(train_kvlink(given.model, sources(given.data, recipe.weights), config, given.out, on_progress=show))


if __name__ == "__main__":
    main()

"""KV Packet's trainings, and ours: `python recipes/packet.py NAME --model MODEL --out OUT DATA...`.

DATA are JSONL files of questions over documents (docs/training.md), with @weight for a mixture."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from kvilt.engine.engine import Engine
from kvilt.lab.train.kinds import source
from kvilt.lab.train.loop import Progress
from kvilt.lab.train.packet import PacketConfig, train_packet

# Steps are epochs * samples / 64 of the authors' configurations; learning rates are theirs for Llama-3.1-8B.
RECIPES = {
    "biography": PacketConfig(steps=120, lr=5e-4, answer_tokens=64),
    "hotpotqa": PacketConfig(steps=80, lr=1e-3, answer_tokens=512),
    "musique": PacketConfig(steps=80, lr=5e-4, answer_tokens=256),
    "niah": PacketConfig(steps=240, lr=5e-4, answer_tokens=128),
    "mixture": PacketConfig(steps=210, lr=5e-4, answer_tokens=512),
    # Ours: link vectors after every document, or all of them after the last; the learning rate follows the model.
    "linked": PacketConfig(links=4),
    "linked-tail": PacketConfig(links=8, layout="tail"),
}


def show(progress: Progress) -> None:
    """A line for every tenth step."""
    if progress.step % 10 == 0 or progress.stage != "train":
        print(
            f"{progress.stage} {progress.step}/{progress.steps} {progress.loss:.4f} {progress.held_out}",
            file=sys.stderr,
        )


def main() -> None:
    """Run one recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("data", nargs="+", metavar="DATA")
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", default="", help="a trained wrapper to start from")
    parser.add_argument("--steps", type=int, help="fewer steps, to try it out")
    given = parser.parse_args()
    config = RECIPES[given.recipe]
    config = replace(config, start=given.start, steps=given.steps or config.steps)
    engine = Engine.load(given.model, "block", "memory")
    print(train_packet(engine, [source(d) for d in given.data], config, given.out, on_progress=show).metadata["best"])


if __name__ == "__main__":
    main()

"""Put what was trained into the package.

`python -m builtin.ship --model OUT/model` (in recipes/) ships the base model with its documents and questions,
`python -m builtin.ship --trained TRAINED` what methods.sh has made of it."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from builtin.world.collection import make, write
from kvilt.strategies.kvlink import DESCRIPTION

PACKAGE = Path(__file__).parents[2] / "src" / "kvilt" / "builtin"
LIMIT = 12_000_000  # bytes of weights that the package may carry, all models together
CHECKPOINTS = {"kvlink0": "model-kvlink0", "kvlink5": "model-kvlink5"}
WRAPPERS = {"packet": "packet", "linked_tail": "linked"}


def ship(model: Path, place: Path) -> None:
    """A model's files with weights in half precision: what is evaluated is what is shipped."""
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16).save_pretrained(place)
    AutoTokenizer.from_pretrained(model).save_pretrained(place)
    if (model / DESCRIPTION).is_file():
        shutil.copy(model / DESCRIPTION, place)


def main() -> None:
    """Copy the models' files, write documents and questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the trained base model")
    parser.add_argument("--trained", type=Path, help="folder of wrappers and fine-tuned models")
    parser.add_argument("--package", type=Path, default=PACKAGE)
    args = parser.parse_args()
    if args.model:
        ship(args.model, args.package / "model")
        papers, questions = make()
        write(args.package, papers, questions)
        print(f"{len(papers)} documents, {len(questions)} questions")
    if args.trained:
        for name, wrapper in WRAPPERS.items():
            shutil.copy(args.trained / name / "wrapper.safetensors", args.package / "model" / f"{wrapper}.safetensors")
        for name, place in CHECKPOINTS.items():
            ship(args.trained / name, args.package / place)
    weights = sum(file.stat().st_size for file in args.package.rglob("*.safetensors"))
    print(f"{weights:,} bytes of weights")
    if weights > LIMIT:
        raise SystemExit(f"the package carries at most {LIMIT:,} bytes of weights")


if __name__ == "__main__":
    main()

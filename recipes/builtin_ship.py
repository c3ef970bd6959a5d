"""Put a trained model, its documents and questions into the package: `python recipes/builtin_ship.py --model OUT/model`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from kvilt.builtin.collection import make, write

PACKAGE = Path(__file__).parents[1] / "src" / "kvilt" / "builtin"
LIMIT = 12_000_000  # bytes of weights that the package may carry


def main() -> None:
    """Copy the model's files and write both lists."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--package", type=Path, default=PACKAGE)
    args = parser.parse_args()
    weights = args.model / "model.safetensors"
    if weights.stat().st_size > LIMIT:
        raise SystemExit(f"{weights} has {weights.stat().st_size:,} bytes; the package carries at most {LIMIT:,}")
    shutil.copytree(args.model, args.package / "model", dirs_exist_ok=True)
    papers, questions = make()
    write(args.package, papers, questions)
    print(f"{len(papers)} documents, {len(questions)} questions")


if __name__ == "__main__":
    main()

"""Questions that the model asks itself about documents, for data without any."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kvilt.engine.engine import Engine
from kvilt.errors import TrainError
from kvilt.lab.train.data import Sample, Source
from kvilt.lab.train.dense import parts_of, row_of
from kvilt.lab.train.teacher import FULL, generate

REQUEST = "Write one short question that the text above answers. Reply with the question only."
GROUP = (2, 6)  # single documents are put together in prompts of so many
BATCH = 16


def with_questions(
    engine: Engine, sources: Sequence[Source], folder: Path, seed: int, tokens: int = 32
) -> tuple[Source, ...]:
    """Give every sample that has no question one of the model's own, kept in `folder` for inspection and the next run.

    Raises TrainError when the model asks nothing at all."""
    return tuple(
        _asked(engine, s, folder / f"questions-{i}.jsonl", f"{seed}/{i}", tokens) for i, s in enumerate(sources)
    )


def _asked(engine: Engine, source: Source, memo: Path, seed: str, tokens: int) -> Source:
    bare = [s for s in source.samples if not s.question and not s.plain]
    if not bare:
        return source
    grouped = _grouped(bare, random.Random(f"group/{seed}"))
    known = _known(memo)
    made = []
    for first in range(0, len(grouped), BATCH):
        batch = grouped[first : first + BATCH]
        if not all(s.digest in known for s in batch):
            questions = _ask(engine, batch, f"{seed}/{first}", tokens)
            known |= {s.digest: q for s, q in zip(batch, questions, strict=True)}
            _remember(memo, [s.digest for s in batch], known)
        made += [replace(s, question=known[s.digest]) for s in batch if known[s.digest]]
    if not made:
        raise TrainError(
            f"{source.name or 'the data'}: the model asked no question about its documents; give questions."
        )
    return replace(source, samples=(*(s for s in source.samples if s.question or s.plain), *made))


def _grouped(samples: Sequence[Sample], rng: random.Random) -> list[Sample]:
    """Single documents put together with others; the question will be about one of a sample's documents."""
    single = [s.documents[0] for s in samples if len(s.documents) == 1]
    made = [s for s in samples if len(s.documents) > 1]
    for document in single:
        others = rng.sample([d for d in single if d is not document], min(len(single) - 1, rng.randint(*GROUP) - 1))
        made.append(Sample((document, *others), gold=(0,), where=document.title or document.text[:40]))
    return [s if s.gold else replace(s, gold=(rng.randrange(len(s.documents)),)) for s in made]


def _ask(engine: Engine, samples: Sequence[Sample], seed: str, tokens: int) -> list[str]:
    """Sampled, so that like documents get unlike questions."""
    about = [replace(s, documents=tuple(s.documents[i] for i in s.gold), question=REQUEST) for s in samples]
    prompts = [row_of(FULL, parts_of(engine.text, s), torch.empty(0, dtype=torch.long)) for s in about]
    generator = torch.Generator().manual_seed(random.Random(f"ask/{seed}").getrandbits(60))
    answers = generate(engine.model, prompts, tokens, 0.7, generator)
    return [next(iter(engine.text.decode(tuple(a.tolist())).splitlines()), "").strip() for a in answers]


def _known(memo: Path) -> dict[str, str]:
    if not memo.is_file():
        return {}
    whole = [
        line for line in memo.read_text().splitlines(keepends=True) if line.endswith("\n")
    ]  # the last may be cut off
    return {row["sample"]: row["question"] for row in map(json.loads, whole)}


def _remember(memo: Path, digests: Sequence[str], known: dict[str, str]) -> None:
    memo.parent.mkdir(parents=True, exist_ok=True)
    with memo.open("a") as file:
        file.writelines(json.dumps({"sample": d, "question": known[d]}) + "\n" for d in digests)

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
from kvilt.rows.files import json_lines, replacing, text_lines

REQUEST = "Write one short question that the text above answers. Reply with the question only."
GROUP = (2, 6)  # single documents are put together in prompts of so many
BATCH, TOKENS = 16, 32  # documents asked about at once, tokens of a question


def with_questions(engine: Engine, sources: Sequence[Source], folder: Path, seed: int) -> tuple[Source, ...]:
    """Give every sample that has no question one of the model's own, kept in `folder` for inspection and the next run.

    Raises TrainError when the model asks nothing at all."""
    return tuple(_asked(engine, s, folder, seed, i) for i, s in enumerate(sources))


def _asked(engine: Engine, source: Source, folder: Path, seed: int, number: int) -> Source:
    memo = folder / f"questions-{number}.jsonl"
    bare = [s for s in source.samples if not s.question and not s.plain]
    if not bare:
        return source
    grouped, known = _grouped(bare, random.Random(f"group/{seed}/{number}")), _known(memo)
    for first in range(0, len(grouped), BATCH):
        batch = grouped[first : first + BATCH]
        if not all(s.digest in known for s in batch):
            asked = zip(batch, _ask(engine, batch, f"{seed}/{number}/{first}"), strict=True)
            known |= {s.digest: question for s, question in asked}
            memo.parent.mkdir(parents=True, exist_ok=True)
            with replacing(memo) as file:
                file.write_text("".join(json.dumps({"sample": d, "question": q}) + "\n" for d, q in known.items()))
    made = [replace(s, question=known[s.digest]) for s in grouped if known[s.digest]]
    if not made:
        name = source.name or "the data"
        raise TrainError(f"{name}: the model asked no question about its documents; give questions.")
    return replace(source, samples=(*(s for s in source.samples if s.question or s.plain), *made))


def _grouped(samples: Sequence[Sample], rng: random.Random) -> list[Sample]:
    """Single documents put together with others; the question will be about one of a sample's documents."""
    single = [s.documents[0] for s in samples if len(s.documents) == 1]
    made = [s for s in samples if len(s.documents) > 1]
    for document in single:
        others = rng.sample([d for d in single if d is not document], min(len(single) - 1, rng.randint(*GROUP) - 1))
        made.append(Sample((document, *others), gold=(0,), where=document.title or document.text[:40]))
    return [s if s.gold else replace(s, gold=(rng.randrange(len(s.documents)),)) for s in made]


def _ask(engine: Engine, samples: Sequence[Sample], seed: str) -> list[str]:
    """Sampled, so that like documents get unlike questions."""
    about = [replace(s, documents=tuple(s.documents[i] for i in s.gold), question=REQUEST) for s in samples]
    prompts = [row_of(FULL, parts_of(engine.text, s), torch.empty(0, dtype=torch.long)) for s in about]
    generator = torch.Generator().manual_seed(random.Random(f"ask/{seed}").getrandbits(60))
    answers = generate(engine.model, prompts, TOKENS, 0.7, generator)
    return [next(iter(engine.text.decode(tuple(a.tolist())).splitlines()), "").strip() for a in answers]


def _known(memo: Path) -> dict[str, str]:
    rows = json_lines(text_lines(memo), str(memo)) if memo.is_file() else ()
    return {row["sample"]: row["question"] for _, row in rows}

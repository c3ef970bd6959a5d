"""A tiny model, tiny questions, and short settings: a training of a second."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

import zoo
from kvilt import registry
from kvilt.engine.engine import Engine
from kvilt.engine.text import TextFormat
from kvilt.lab.train.data import Sample
from kvilt.lab.train.job import PacketConfig
from kvilt.lab.train.kvlink import KVLinkConfig
from kvilt.model.identity import tokenizer_digest
from kvilt.model.model import Model
from kvilt.types import Document

QUICK = PacketConfig(
    header=2,
    trailer=2,
    steps=6,
    batch=4,
    micro_batch=3,
    answer_tokens=6,
    views=2,
    evaluate_every=2,
    held_out=0.25,
    lr=0.05,
    top_k=16,
)
LINKED = KVLinkConfig(
    links=2,
    slots=4,
    steps=6,
    batch=4,
    micro_batch=2,
    lr=1e-3,
    evaluate_every=2,
    held_out=0.25,
    max_tokens=512,
)
WORDS = ["oak", "elm", "ash", "fir", "yew"]


def engine(seed: int = 1, family: str = "llama") -> Engine:
    """A random model behind the byte tokenizer."""
    model = Model(zoo.hf_model(family, seed), tokenizer_digest(zoo.tokenizer()))
    return Engine(
        model,
        TextFormat.of(zoo.tokenizer(), "S."),
        registry.build("strategy", "block"),
        registry.build("store", "memory"),
    )


def samples(count: int = 8, documents: int = 3) -> list[Sample]:
    """Questions over very short documents, with answers."""
    rng = random.Random(0)
    return [
        Sample(
            tuple(Document(f"{rng.choice(WORDS)} {i}{k}") for k in range(documents)),
            f"Which {rng.choice(WORDS)}{i}?",
            (f"{rng.choice(WORDS)}",),
            gold=(i % documents,),
            where=f"made:{i}",
        )
        for i in range(count)
    ]


def write(path: Path, rows: list[dict]) -> str:
    """A JSONL file."""
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def rows(count: int = 8) -> list[dict]:
    """The same samples as rows of a file."""
    return [
        {
            "question": s.question,
            "documents": [d.text for d in s.documents],
            "answers": list(s.answers),
            "gold": list(s.gold),
        }
        for s in samples(count)
    ]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

"""A tiny model, tiny questions, and short settings: a training of a second."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import torch

import zoo
from kvilt import registry
from kvilt.engine.engine import Engine
from kvilt.engine.text import TextFormat
from kvilt.lab.train.data import Sample
from kvilt.lab.train.kvlink import KVLinkConfig
from kvilt.lab.train.loop import Progress
from kvilt.lab.train.packet import PacketConfig
from kvilt.model.identity import tokenizer_digest
from kvilt.model.model import Model
from kvilt.types import Document

SHORT = {"steps": 4, "batch": 4, "evaluate_every": 2, "held_out": 0.25}
QUICK = PacketConfig(header=2, trailer=2, micro_batch=3, answer_tokens=6, views=2, lr=0.05, top_k=16, **SHORT)
LINKED = KVLinkConfig(dtype="float32", links=2, slots=4, micro_batch=2, lr=1e-3, max_tokens=512, **SHORT)
WORDS = ["oak", "elm", "ash", "fir", "yew"]


@functools.cache
def shared(family: str = "llama") -> Engine:
    """An engine that no test changes."""
    return engine(family=family)


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


def killed(work: Callable[[Callable[[Progress], None]], object], at: int) -> None:
    """Do the work in a process of its own, which is killed when it reports this step."""

    def deadly(progress: Progress) -> None:
        if progress.stage == "train" and progress.step == at:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            work(deadly)
        finally:
            os._exit(1)  # it should not have come so far
    assert os.waitpid(child, 0)[1] == signal.SIGKILL

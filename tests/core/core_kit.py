"""Plans and engines made by hand for the tests of the core."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from kvilt.stores.base import CacheStore
from kvilt.stores.memory import MemoryStore
from torch import Tensor

import zoo
from kvilt.engine.engine import Engine
from kvilt.engine.text import TextFormat
from kvilt.model.model import Model
from kvilt.plan import Layout, Plan
from kvilt.registry import build
from kvilt.strategies.wrapper import Wrapper
from kvilt.types import CacheKey, Document, DocumentCache, Encoding, Prompt, TensorLayers, digest_of

TOLERANCE = 1e-4  # relative to the largest value, float32
FIRST = len(zoo.SPECIAL)  # the first id that is a byte

DOCUMENTS = [
    Document("Ada Lorn was born in Tavik. She left it young.", title="Ada", id="ada"),
    Document("Brint Labs is in Orsa.", id="brint"),
    Document("The river Sel runs from Orsa to the sea, slowly.", title="Sel", id="sel"),
]
QUESTION = "Where was Ada Lorn born?"


def ids(count: int, seed: int = 0) -> Tensor:
    """Random ids of ordinary bytes, (count,)."""
    return torch.randint(FIRST, zoo.VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def fake(tokens: Sequence[int], offsets: Sequence[int] | None = None, dropped: int = 0) -> DocumentCache:
    """A cache of zeros, for plans that are looked at and never run."""
    run = torch.tensor(tokens, dtype=torch.long)
    kept = torch.tensor(list(offsets) if offsets is not None else range(len(run) - dropped), dtype=torch.long)
    rows = torch.zeros(1, len(kept), 2)
    key = CacheKey("model", "tokenizer", "rope", "float32", "encoding", "", digest_of(run))
    return DocumentCache(run, kept, len(run) - dropped, key, TensorLayers((rows,), (rows,)), dropped)


def bare(tokens: Tensor) -> DocumentCache:
    """A document that was tokenised only."""
    return dataclasses.replace(fake(tokens.tolist()), layers=None)


def prompt(question: Tensor, *documents: DocumentCache, system: DocumentCache | None = None) -> Prompt:
    """A prompt whose system part is empty unless one is given."""
    return Prompt(system or bare(torch.zeros(0, dtype=torch.long)), documents, question)


def layout(question: Tensor, *documents: DocumentCache) -> Layout:
    """A layout with nothing in it yet."""
    return Layout(prompt(question, *documents))


def cache_of(model: Model, tokens: Tensor, encoding: Encoding | None = None) -> DocumentCache:
    """One document, encoded now."""
    return model.encode([tokens], encoding or Encoding())[0]


def pruned(cache: DocumentCache, keep: Tensor) -> DocumentCache:
    """The cache with the rows at the places `keep` alone, as a compressor would leave it."""
    assert isinstance(cache.layers, TensorLayers)
    rows = torch.isin(cache.offsets, keep).nonzero()[:, 0]
    parts = (tuple(t[:, rows] for t in side) for side in (cache.layers.keys, cache.layers.values))
    return dataclasses.replace(cache, offsets=cache.offsets[rows], layers=TensorLayers(*parts))


def off(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest wanted value."""
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def off_dense(model: Model, plan: Plan) -> float:
    """How far all computed logits of a plan are from one ordinary pass under its mask."""
    found = model.score(plan, len(plan.computed_rows))
    return off(found, model.dense(plan.dense(), plan.learned))


def wrapper_file(folder: Path, links: int = 0) -> Path:
    """Random learned vectors for the tiny models."""
    path = folder / "wrapper.safetensors"
    made = torch.Generator().manual_seed(5)
    parts = [torch.randn(n, 64, generator=made) * 0.4 for n in (8, 8, links)]
    Wrapper(parts[0], parts[1], links=parts[2] if links else None).save(path)
    return path


def engine_of(
    spec: str = "block", store: CacheStore | None = None, family: str = "llama", system: str | None = None
) -> Engine:
    """An engine over a tiny model; stores in memory unless told otherwise."""
    text = TextFormat.of(zoo.tokenizer(), system)
    return Engine(zoo.model_of(family), text, build("strategy", spec), store or MemoryStore())  # type: ignore[arg-type]

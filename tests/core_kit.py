"""Plans, caches and engines made by hand, for the tests of every room."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import zoo
from kvilt.engine.engine import Engine
from kvilt.engine.text import TextFormat
from kvilt.model.model import Model
from kvilt.plan import Layout, Plan
from kvilt.registry import build
from kvilt.rows import adapter
from kvilt.rows.rows import TensorRows, whole
from kvilt.stores.store import Store
from kvilt.strategies.wrapper import Wrapper
from kvilt.types import Adapter, Answer, CacheKey, Document, DocumentCache, Encoding, Prompt, Rows, digest_of

TOLERANCE = 1e-4  # relative to the largest value, float32
FIRST = len(zoo.SPECIAL)  # the first id that is a byte

DOCUMENTS = [
    Document("Ada Lorn was born in Tavik. She left it young.", title="Ada", id="ada"),
    Document("Brint Labs is in Orsa.", id="brint"),
    Document("The river Sel runs from Orsa to the sea, slowly.", title="Sel", id="sel"),
]
QUESTION = "Where was Ada Lorn born?"


# Every strategy in every shape that may matter: a new one is one line here. WRAPPER stands for a file of learned vectors,
# WRAPPER.lora for one of an adapter.
MATRIX = [
    "full",
    "block",
    "block:sink=system",
    "block:sink=4",
    "naive",
    "auto",
    "kvlink:links=0",
    "kvlink:links=1",
    "kvlink:links=5",
    "anchors:chunk=8,anchors=2",
    "anchors:chunk=8,anchors=2,links=5",
    "kv_packet:wrapper=WRAPPER",
    "linked_packet:wrapper=WRAPPER,layout=slots",
    "linked_packet:wrapper=WRAPPER,layout=tail",
    "prompt_cache:slot=64",
    "prompt_cache:consecutive=true",
    "epic:tokens=0",
    "epic:tokens=3",
    "epic:tokens=16,sink=system",
    "ape",
    "ape:temperature=0.8,scale=0.9",
    "random:ratio=0.3,seed=1",
    "ranked",
    "ranked:ratio=0.4,join=0,sink=none",
    "cacheblend",
    "cacheblend:ratio=0.4,stages=3",
    "cacheblend:ratio=0.3,score=v,sink=4",
    "a3:ratio=0.3",
    "prophetkv",
    "prophetkv:ratio=0.5,sink=system",
    "infoflow:boundary=2",
    "infoflow:ratio=0.3,reorder=true",
    "sam_kv",
    "sam_kv:init=2,local=4,block=4",
    "sam_kv:init=2,local=4,block=3,update=fusion",
    "sam_kv:init=4,local=4,block=4,layers=1-2,update=fusion,theta=0.4,sink=system",
    "turborag",
    "turborag:start=7,end=9,positions=composite",
    "writer:adapter=WRAPPER.lora",
    "writer:adapter=WRAPPER.lora,wrapper=WRAPPER",
    "query_lora:adapter=WRAPPER.lora",
    "query_lora:adapter=WRAPPER.lora,writer=WRAPPER.lora,wrapper=WRAPPER",
]


def ids(count: int, seed: int = 0) -> Tensor:
    """Random ids of ordinary bytes, (count,)."""
    return torch.randint(FIRST, zoo.VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


class Bytes:
    """A blob in memory that counts what is read."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size, self.asked = bytearray(data), len(data), 0

    @property
    def identity(self) -> object:
        return id(self)

    def read(self, offset: int, into: Sequence[memoryview]) -> None:
        for piece in into:
            if offset + len(piece) > len(self.data):
                raise EOFError
            piece[:] = self.data[offset : offset + len(piece)]
            offset, self.asked = offset + len(piece), self.asked + len(piece)

    def close(self) -> None:
        pass


def make_key(run: Tensor, **other: str) -> CacheKey:
    """The key of a document that no model has made."""
    key = CacheKey("model", "tokenizer", "rope", "float32", "encoding", "", digest_of(run))
    return dataclasses.replace(key, **other)  # type: ignore[arg-type]


def fake(tokens: Sequence[int], offsets: Sequence[int] | None = None, dropped: int = 0) -> DocumentCache:
    """A cache of zeros, for plans that are looked at and never run."""
    run = torch.tensor(tokens, dtype=torch.long)
    kept = torch.tensor(list(offsets) if offsets is not None else range(len(run) - dropped), dtype=torch.long)
    rows = TensorRows(torch.zeros(1, 2, 1, len(kept), 2))
    return DocumentCache(run, kept, len(run) - dropped, make_key(run), rows, dropped)


def bare(tokens: Tensor) -> DocumentCache:
    """A document that was tokenised only."""
    return dataclasses.replace(fake(tokens.tolist()), rows=None)


def prompt(question: Tensor, *documents: DocumentCache, system: DocumentCache | None = None) -> Prompt:
    """A prompt whose system part is empty unless one is given."""
    return Prompt(system or bare(torch.zeros(0, dtype=torch.long)), documents, question)


def layout(question: Tensor, *documents: DocumentCache) -> Layout:
    """A layout with nothing in it yet."""
    return Layout(prompt(question, *documents))


def cache_of(model: Model, tokens: Tensor, encoding: Encoding | None = None) -> DocumentCache:
    """One document, encoded now."""
    return model.encode([tokens], encoding or Encoding())[0]


def rows_of(cache: DocumentCache) -> Tensor:
    """All keys (without rotation) and values of a cache, (layers, 2, heads, rows, head_dim)."""
    assert cache.rows is not None
    return whole(cache.rows)


def pruned(cache: DocumentCache, keep: Tensor) -> DocumentCache:
    """The cache with the rows at the places `keep` alone, as a compressor would leave it."""
    at = torch.isin(cache.offsets, keep).nonzero()[:, 0]
    return dataclasses.replace(cache, offsets=cache.offsets[at], rows=TensorRows(rows_of(cache)[..., at, :]))


@dataclasses.dataclass(frozen=True, eq=False)
class Watched:
    """Rows that do something before they are read, and count how often that is."""

    inner: Rows
    on_read: Callable[[range], None] = lambda layers: None
    reads: list[range] = dataclasses.field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.inner.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def read(self, layers: slice, out: Tensor) -> None:
        self.reads.append(range(self.shape[0])[layers])
        self.on_read(self.reads[-1])
        self.inner.read(layers, out)


def watched(cache: DocumentCache, on_read: Callable[[range], None] = lambda layers: None) -> DocumentCache:
    """The cache with rows that are watched."""
    assert cache.rows is not None
    return dataclasses.replace(cache, rows=Watched(cache.rows, on_read))


def run(model: Model, plan: Plan, **options: Any) -> Tensor:
    """Logits of a plan's last token, (vocab,)."""
    with model.run(plan, **options) as made:
        return made.logits


def placed_rows(model: Model, plan: Plan, **options: Any) -> Tensor:
    """A copy of what the buffer holds after a plan's pass, keys rotated, (layers, 2, heads, rows, head_dim)."""
    with model.run(plan, **options) as made:
        return made.placed.buffer[:, :, :, : made.placed.length].clone()


def rotated(model: Model, keys: Tensor, positions: Tensor) -> Tensor:
    """Keys (..., rows, head_dim) without rotation, rotated to positions (rows,)."""
    return model.rotation.rotate(keys, model.rotation.angles(positions))


def off(found: Tensor | None, wanted: Tensor | None) -> float:
    """Largest difference, relative to the largest wanted value."""
    assert found is not None
    assert wanted is not None
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def off_dense(model: Model, plan: Plan) -> float:
    """How far all computed logits of a plan are from one ordinary pass under its mask."""
    return off(model.score(plan), model.dense(plan.dense(), plan.learned))


def lora(layers: int = 4, seed: int = 6, rank: int = 3, **kinds: tuple[int, int]) -> Adapter:
    """Random low-rank changes of some matrices (kind: (in, out)), strong enough to show; as a file holds them."""
    made = torch.Generator().manual_seed(seed)
    pairs = {}
    for kind, (inside, out) in (kinds or {"self_attn.q_proj": (64, 64)}).items():
        sizes = (layers, inside, rank), (layers, rank, out)
        a, b = (torch.randn(size, generator=made) * 0.3 for size in sizes)
        pairs[kind] = (a, b)
    return Adapter(f"lora {seed} {sorted(pairs)}", pairs)


def wrapper_file(folder: Path, links: int = 0) -> Path:
    """Random learned vectors for the tiny models, and beside them an adapter that fits every family."""
    path = folder / "wrapper.safetensors"
    adapter.save(lora(), f"{path}.lora")
    made = torch.Generator().manual_seed(5)
    parts = [torch.randn(n, 64, generator=made) * 0.4 for n in (8, 8, links)]
    Wrapper(parts[0], parts[1], links=parts[2] if links else None).save(path)
    return path


def store_of(spec: str = "memory") -> Store:
    """A store from its specification."""
    return cast(Store, build("store", spec))


@functools.cache
def text_format(system: str | None = None) -> TextFormat:
    """The format of the tiny models' tokenizer, made once."""
    return TextFormat.of(zoo.tokenizer(), system)


def engine_of(
    spec: str = "block", store: Store | None = None, family: str = "llama", system: str | None = None, **options: Any
) -> Engine:
    """An engine over a tiny model; stores in memory unless told otherwise."""
    strategy: Any = build("strategy", spec)
    keep = store_of() if store is None else store
    return Engine(zoo.model_of(family), text_format(system), strategy, keep, **options)


def ask(engine: Engine, documents: Sequence[Document] = DOCUMENTS, tokens: int = 1, **options: Any) -> Answer:
    """A short answer to the question."""
    return engine.answer(QUESTION, documents, max_new_tokens=tokens, **options)

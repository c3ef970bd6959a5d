"""The nouns: documents, their caches, and the plan of a prompt. Imports nothing of ours."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from blake3 import blake3
from torch import Tensor

T = TypeVar("T")


def cached(function: Callable[[Any], T]) -> functools.cached_property[T]:
    """A property that is computed once, without the lock of Python 3.11: a forked child may find it locked for ever."""
    made = functools.cached_property(function)
    vars(made)["lock"] = contextlib.nullcontext()
    return made


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor: its own memory where it is contiguous and on the CPU, else a copy."""
    flat = tensor.detach().cpu().contiguous().flatten()  # flat first: a 0-d tensor cannot change its item size
    return memoryview(flat.view(torch.uint8).numpy().data)


def digest_of(*parts: bytes | str | Tensor) -> str:
    """A BLAKE3 content digest (64 hex digits); every part is length-prefixed, so no two lists of parts collide."""
    hasher = blake3()
    for part in parts:
        data = part.encode() if isinstance(part, str) else bytes_of(part) if isinstance(part, Tensor) else part
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.hexdigest()


@dataclass(frozen=True)
class Document:
    """A text that can stand in any prompt. With `store=False` it is computed in every prompt and never stored.

    `ids` are its tokens, where they are known already; then the text may be empty."""

    text: str
    title: str | None = None
    id: str | None = None
    store: bool = True
    ids: tuple[int, ...] = ()

    @property
    def content(self) -> str:
        """The text as the model reads it: title line (if any), text, newline."""
        return f"{self.title}\n{self.text}\n" if self.title else f"{self.text}\n"


@dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank changes of a model's matrices that act only where somebody says so.

    `matrices` holds for each kind of matrix ("self_attn.q_proj") two factors, stacked over layers: (layers, in, rank) and
    (layers, rank, out); what is added to its output is x @ a @ b. `model` is the digest of the weights it was trained for."""

    digest: str  # of the matrices
    matrices: Mapping[str, tuple[Tensor, Tensor]]
    model: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Encoding:
    """What stands around a document while it is encoded, and whether its rows are kept.

    Ids below zero are learned vectors: id -1 is row 0 of `learned`, id -2 row 1, and so on. With `chunk` > 0, `anchors`
    follow every `chunk` tokens of the document, and their rows alone are kept of it; an incomplete last chunk gets its
    share of them, rounded up. `adapter` acts on every token while documents are encoded, and nowhere else. `ranked`
    documents carry an order of their places.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    keep: bool = False
    learned: Tensor | None = None  # (vectors, hidden)
    chunk: int = 0
    anchors: tuple[int, ...] = ()
    adapter: Adapter | None = None
    ranked: bool = False

    @cached
    def digest(self) -> str:
        """Content digest of everything that shapes the document's cache; vectors that stand elsewhere are left out."""
        frame = [self.before, self.after, self.keep, *([self.chunk, self.anchors] if self.chunk else [])]
        frame += ["ranked"] if self.ranked else []
        around = [-1 - i for i in (*self.before, *self.after) if i < 0]
        vectors = b"" if self.learned is None else self.learned[around].float()
        return digest_of(json.dumps(frame), vectors, *([self.adapter.digest] if self.adapter else []))

    @cached
    def label(self) -> str:
        """The encoding as cache keys name it, in words for people and with its digest: "plain", "43 before 1a2b..."."""
        around = [f"{len(ids)} {where}" for ids, where in ((self.before, "before"), (self.after, "after")) if ids]
        around += [f"{len(self.anchors)} anchors every {self.chunk}"] if self.chunk else []
        around += ["ranked"] if self.ranked else []
        around += ["adapted"] if self.adapter else []
        return f"{', '.join(around)}{' kept' if self.keep else ''} {self.digest}" if around else "plain"

    def anchors_of(self, tokens: int) -> int:
        """How many anchors a document of so many tokens gets."""
        return -(-tokens * len(self.anchors) // self.chunk) if self.chunk else 0

    def cache(self, ids: Tensor, key: CacheKey) -> DocumentCache:
        """What encoding a document's ids (tokens,) gives, without its keys and values."""
        parts: list[tuple[Tensor | tuple[int, ...], int]] = [(self.before, 0)]
        for number, piece in enumerate(torch.split(ids, self.chunk or max(1, len(ids))), 1):
            parts += [(piece, number), (self.anchors[: self.anchors_of(len(piece))], -number)]
        parts += [(self.after, 0)] if self.keep else []  # nothing that stays sees what is dropped after it
        run = torch.cat([torch.as_tensor(tokens, dtype=torch.long) for tokens, _ in parts])
        chunks = torch.cat([torch.full((len(tokens),), n) for tokens, n in parts]) if self.chunk else None
        first = 0 if self.keep else len(self.before)
        offsets = torch.arange(len(run) - first)
        offsets = offsets if chunks is None else offsets[chunks[first:] <= 0]
        return DocumentCache(run, offsets, len(run) - first, key, None, first, chunks)


@dataclass(frozen=True)
class CacheKey:
    """A content address over what was *run*; two documents share a key only if their caches are the same."""

    model: str  # digest of the weights, adapters included
    tokenizer: str
    rope: str
    dtype: str  # of the stored rows, whatever the computation's is
    encoding: str
    compression: str
    tokens: str  # digest of the document's token ids
    namespace: str = "shared"  # a salt: what one namespace stores, no other finds

    @cached
    def digest(self) -> str:
        """The key as 64 hex digits; file names and indexes use it."""
        return digest_of(json.dumps(vars(self), sort_keys=True))


class Rows(Protocol):
    """Keys and values of one document, layer by layer, wherever they lie. Keys carry no rotation."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(layers, heads, rows, head_dim)."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which `read` loses nothing."""

    @property
    def nbytes(self) -> int:
        """Bytes of the rows as they are stored."""

    def read(self, layers: slice, out: Tensor) -> None:
        """Write some layers' keys and values into `out` (layers, 2, heads, rows, head_dim), keys first.

        `out` may have any dtype, device and strides. Raises DamagedCache if what is stored is not what was written."""


@dataclass(frozen=True, eq=False)
class DocumentCache:
    """Keys and values of one document, encoded alone.

    `tokens` holds every token that was run; the first `dropped` of them stood before the document and left no rows.
    `offsets` names the place of each kept row, so pruned caches need no special case anywhere.
    `chunks`, where the document was encoded in chunks, holds for each run token the number of its chunk, counted from 1:
    negative for an anchor, 0 for what stood around the document. A token saw its own chunk and what is not positive.
    `order`, of ranked documents, holds places of the document: those first whose rows depend most on what stands before it.
    `rows` is None when the document was tokenised only (full recompute, `store=False`).
    """

    tokens: Tensor  # (run,) int64
    offsets: Tensor  # (rows,) int64, ascending
    length: int  # positions the document takes in a prompt
    key: CacheKey
    rows: Rows | None = None
    dropped: int = 0
    chunks: Tensor | None = None  # (run,) int64
    order: Tensor | None = None  # (places,) int64

    @cached
    def placed_tokens(self) -> Tensor:
        """The token at each place of the document, (length,)."""
        return self.tokens[self.dropped : self.dropped + self.length]

    @cached
    def own_tokens(self) -> Tensor:
        """The document's tokens as the ordinary prompt has them, without learned vectors and anchors, (tokens,)."""
        own = self.placed_tokens >= 0
        if self.chunks is not None:
            own &= self.chunks[self.dropped : self.dropped + self.length] >= 0
        return self.placed_tokens[own]

    @property
    def is_lossless(self) -> bool:
        """Whether the rows are all that encoding gave: none left out, none quantised."""
        return not self.key.compression and len(self.offsets) == self.length

    @property
    def nbytes(self) -> int:
        """Bytes of the key and value rows as they are stored."""
        return 0 if self.rows is None else self.rows.nbytes


@dataclass(frozen=True)
class ModelInfo:
    """What a strategy may know of a model: numbers and ids, never weights."""

    digest: str  # of the weights
    hidden_size: int
    vocab_size: int
    num_layers: int
    linear_cost: float  # FLOPs of a token's matrices / FLOPs of attending to one key
    projection_share: float = 0.0  # share of a layer's matrices that make queries, keys and values
    system: tuple[int, ...] = ()  # the tokens in front of the documents
    sink: int | None = None  # BOS, or what serves as one
    reserved: tuple[int, ...] = ()  # reserved special tokens of the tokenizer, in order
    embedding_stats: tuple[float, float] = (0.0, 0.02)
    directory: str | None = None


@dataclass(frozen=True, eq=False)
class Prompt:
    """System text, documents and question, tokenised, with the caches that were found or made."""

    system: DocumentCache
    documents: tuple[DocumentCache, ...]
    question: Tensor  # (tokens,) int64
    names: tuple[str, ...] = ()  # document ids, for strategies with named slots
    saved: int = 0  # tokens left out of the documents' texts, which full recompute would compute


class Clock:
    """Seconds since the start, and of every step."""

    def __init__(self) -> None:
        self.start = self._last = time.perf_counter()
        self.steps: dict[str, float] = {}
        self.first = 0.0

    def lap(self, step: str) -> None:
        """Charge the time since the last lap to a step."""
        now = time.perf_counter()
        self.steps[step] = self.steps.get(step, 0.0) + now - self._last
        self._last = now

    def mark_first(self) -> None:
        """The first token is there."""
        self.first = time.perf_counter() - self.start


@dataclass(frozen=True)
class Usage:
    """What one answer took. Times in seconds, `charged` in units of full recompute."""

    reused_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    charged: float = 0.0
    hits: int = 0
    misses: int = 0
    damaged: int = 0
    bytes_loaded: int = 0
    ttft_s: float = 0.0
    steps_s: dict[str, float] = field(default_factory=dict)
    note: str = ""  # why the strategy chose this plan


@dataclass(frozen=True, eq=False)
class Answer:
    """A generated text and what it took."""

    text: str
    tokens: tuple[int, ...]
    usage: Usage
    strategy: str
    logits: Tensor | None = None  # (vocab,) of the first token, float32

    def as_dict(self) -> dict[str, object]:
        """Plain data for `--json` and HTTP."""
        return {"text": self.text, "strategy": self.strategy, "usage": asdict(self.usage)}

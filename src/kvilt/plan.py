"""The plan of a prompt: what is reused, what is computed, and where each token stands."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvilt.types import Adapter, DocumentCache, Prompt, cached

ASKING = ("question", "answer")  # segments that a plan's `reader` acts on


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of consecutive positions; `fresh` marks the tokens to compute, the others come from the cache."""

    tokens: Tensor  # (length,) int64, below zero: learned vectors
    start: int
    cache: DocumentCache | None = None
    fresh: Tensor | None = None  # (length,) bool
    name: str = ""

    @property
    def length(self) -> int:
        return len(self.tokens)

    @cached
    def stored(self) -> Tensor:
        """Which places have a row in the cache, (length,) bool."""
        mask = torch.zeros(self.length, dtype=torch.bool)
        if self.cache is not None:
            mask[self.cache.offsets] = True
        return mask

    @cached
    def computed(self) -> Tensor:
        """Which places are computed, (length,) bool."""
        if self.fresh is not None:
            return self.fresh
        return torch.full((self.length,), self.cache is None)

    @cached
    def reused(self) -> Tensor:
        """Which places are reused, (length,) bool; a pruned place is neither reused nor computed."""
        return self.stored & ~self.computed

    @cached
    def places(self) -> Tensor:
        """The places that have a row when the plan is run, ascending."""
        return (self.stored | self.computed).nonzero()[:, 0]


@dataclass(frozen=True)
class ContextScaling:
    """Computed tokens attend to context rows more or less sharply, and weigh them more or less against all other rows.

    Scores of context rows are divided by `temperature`; their log-sum-exp is multiplied by `scale * temperature` before
    the two parts are merged. 1 and 1 is plain attention."""

    temperature: float = 1.0
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Dense:
    """A plan as one ordinary forward pass: the definition of right, and what trainers train under."""

    tokens: Tensor  # (rows,) int64
    positions: Tensor  # (rows,) int64, below zero where a dropped prefix stood
    mask: Tensor  # (rows, rows) bool: row may see column; every row sees itself
    computed: Tensor  # rows that the plan computes
    context: Tensor | None = None  # (rows, rows) bool: where `scaling` acts
    scaling: ContextScaling | None = None
    twins: Tensor | None = None  # of each computed row the encoded one that it is mixed with, or -1, (computed,)
    blend: float = 1.0
    adapters: tuple[tuple[Adapter | None, Tensor], ...] = ()  # and the rows that each acts on, (rows,) bool


@dataclass(frozen=True, eq=False)
class Plan:
    """One prompt, ready to run.

    Every segment's rows lie in the order of the segments; a computed token sees every row whose position is not later.
    With `blend` below 1, a computed token's keys and values become blend * fresh + (1 - blend) * stored in every layer,
    wherever its place has a stored row.
    """

    segments: tuple[Segment, ...]
    baseline: int  # tokens of the ordinary prompt, which full recompute would compute
    learned: Tensor | None = None  # (vectors, hidden): the learned vectors that negative ids name
    overhead: float = 0.0  # what probing has cost already, in units of full recompute
    context: ContextScaling | None = None  # of the reused rows of segments named "document"
    note: str = ""  # why this plan, for the usage
    blend: float = 1.0
    writer: Adapter | None = None  # that documents were encoded with
    reader: Adapter | None = None  # that acts on the question and what follows it

    @property
    def end(self) -> int:
        """The first free position: where the answer begins."""
        return max(s.start + s.length for s in self.segments)

    @cached
    def positions(self) -> Tensor:
        """Position of every row, (rows,)."""
        return torch.cat([s.start + s.places for s in self.segments])

    @cached
    def bases(self) -> list[int]:
        """First row of every segment."""
        sizes = [0, *(len(s.places) for s in self.segments)]
        return torch.tensor(sizes).cumsum(0)[:-1].tolist()

    @cached
    def computed_rows(self) -> Tensor:
        """Rows that the pass computes, ascending, (computed,)."""
        return torch.cat([s.computed[s.places] for s in self.segments]).nonzero()[:, 0]

    @cached
    def computed_tokens(self) -> Tensor:
        """Tokens that the pass computes, in row order, (computed,)."""
        return torch.cat([s.tokens[s.computed] for s in self.segments])

    @property
    def reused_count(self) -> int:
        """Tokens whose keys and values are reused."""
        return len(self.positions) - len(self.computed_rows)

    def loaded(self, segment: Segment) -> Tensor:
        """The places of a segment whose stored rows the pass needs, (length,) bool."""
        return segment.stored if self.blend < 1 else segment.reused

    @cached
    def blended(self) -> Tensor | None:
        """Computed tokens whose fresh rows are mixed with their stored ones, (computed,) bool; None: `blend` is 1."""
        return torch.cat([s.stored[s.computed] for s in self.segments]) if self.blend < 1 else None

    @cached
    def context_rows(self) -> Tensor | None:
        """Rows that `context` acts on, (rows,) bool; None where attention is plain."""
        if self.context in (None, ContextScaling()):
            return None
        return torch.cat([s.reused[s.places] & (s.name == "document") for s in self.segments])

    @cached
    def is_suffix(self) -> bool:
        """Whether every computed token stands after every reused one, in rows and in position.

        Then ordinary causal attention will do: no mask, any flash kernel, any engine with prefix injection (where
        `context` and `blend` ask for nothing else)."""
        first = int(self.computed_rows[0])
        reused, computed = self.positions[:first], self.positions[first:]
        in_order = len(computed) == len(self.computed_rows) and bool((computed.diff() > 0).all())
        return in_order and (first == 0 or int(reused.max()) < int(computed[0]))

    @cached
    def asking(self) -> Tensor:
        """Computed tokens that `reader` acts on, (computed,) bool."""
        return torch.cat([torch.full((int(s.computed.sum()),), s.name in ASKING) for s in self.segments])

    def visible(self) -> Tensor:
        """Which rows each computed token sees, (computed, rows) bool."""
        return self.positions[None] <= self.positions[self.computed_rows][:, None]

    def charged(self, linear: float = math.inf) -> float:
        """Compute in units of full recompute, probe passes and the encoding of misses included.

        `linear` is the cost of a token's matrices in units of attending to one key (`ModelInfo.linear_cost`);
        infinity counts tokens alone. charged = overhead + sum(linear + keys seen) / sum(linear + i, i = 1..baseline)."""
        if math.isinf(linear):
            return self.overhead + len(self.computed_rows) / self.baseline
        at = self.positions[self.computed_rows]
        seen = torch.searchsorted(self.positions.sort().values, at, right=True).sum()
        return self.overhead + (len(at) * linear + float(seen)) / prefill_cost(self.baseline, linear)

    def dense(self) -> Dense:
        """The plan as one pass: each reused document once as it was encoded, plus every computed token."""
        rows = [part for i, s in enumerate(self.segments) for part in _dense_rows(i, s, self.loaded(s))]
        tokens, positions, segment, encoded, shown, chunks = (torch.cat(column) for column in zip(*rows, strict=True))
        own = encoded[:, None] & encoded[None] & (segment[:, None] == segment[None]) & encoding_mask(chunks)
        live = ~encoded[:, None] & shown[None] & (positions[None] <= positions[:, None])
        documents = torch.tensor([s.name == "document" for s in self.segments])
        context = live & (encoded & documents[segment])[None] if self.context else None
        computed = (~encoded).nonzero()[:, 0]
        twins = None
        if self.blended is not None:
            same = (segment[computed, None] == segment[None]) & (positions[computed, None] == positions[None]) & encoded
            twins = same.int().argmax(1).masked_fill(~self.blended, -1)
        asking = torch.tensor([s.name in ASKING for s in self.segments])
        adapters = (self.writer, encoded & documents[segment]), (self.reader, ~encoded & asking[segment])
        return Dense(tokens, positions, own | live, computed, context, self.context, twins, self.blend, adapters)


def prefill_cost(tokens: int, linear: float) -> float:
    """Compute of an ordinary pass over so many tokens, in units of attending to one key."""
    return tokens * linear + tokens * (tokens + 1) / 2


def encoding_mask(chunks: Tensor) -> Tensor:
    """Which token sees which while a document is encoded, (..., run, run) bool, from `DocumentCache.chunks` (..., run)."""
    order = torch.arange(chunks.shape[-1], device=chunks.device)
    seen = chunks[..., None, :]
    return (order[None] <= order[:, None]) & ((seen <= 0) | (seen == chunks.abs()[..., :, None]))


def _dense_rows(index: int, s: Segment, loaded: Tensor) -> list[tuple[Tensor, ...]]:
    """Columns (token, position, segment, encoded?, shown to computed tokens?, chunk) of one segment."""
    parts = []
    if s.cache is not None and loaded.any():
        places = torch.arange(len(s.cache.tokens)) - s.cache.dropped
        inside = (places >= 0) & (places < s.length)
        shown = torch.zeros(len(places), dtype=torch.bool)
        shown[inside] = s.reused[places[inside]]
        chunks = torch.zeros_like(places) if s.cache.chunks is None else s.cache.chunks
        parts.append((s.cache.tokens, s.start + places, torch.ones_like(shown), shown, chunks))
    at = s.computed.nonzero()[:, 0]
    no, yes = torch.zeros(len(at), dtype=torch.bool), torch.ones(len(at), dtype=torch.bool)
    parts.append((s.tokens[at], s.start + at, no, yes, torch.zeros_like(at)))
    return [(t, p, torch.full_like(p, index), e, v, c) for t, p, e, v, c in parts]


class Layout:
    """Builds a plan from left to right."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.segments: list[Segment] = []
        self.at = 0

    def reuse(
        self, cache: DocumentCache, fresh: Tensor | None = None, at: int | None = None, name: str = "document"
    ) -> Layout:
        """Place a document's cache at `at` (default: after what is there); `fresh` marks places to compute instead."""
        usable = cache if cache.rows is not None else None
        start = self.at if at is None else at
        return self._add(Segment(cache.placed_tokens, start, usable, fresh if usable else None, name))

    def compute(self, tokens: Tensor, at: int | None = None, name: str = "tokens") -> Layout:
        """Compute tokens at `at` (default: after what is there)."""
        return self._add(Segment(tokens, self.at if at is None else at, name=name)) if len(tokens) else self

    def ask(self) -> Layout:
        """Compute the question after everything else."""
        return self.compute(self.prompt.question, name="question")

    def _add(self, segment: Segment) -> Layout:
        self.segments.append(segment)
        self.at = max(self.at, segment.start + segment.length)
        return self

    def plan(self, learned: Tensor | None = None, overhead: float = 0.0, context: ContextScaling | None = None) -> Plan:
        """The finished plan."""
        prompt = self.prompt
        documents = sum(len(d.own_tokens) for d in prompt.documents)
        baseline = prompt.system.length + documents + len(prompt.question) + prompt.saved
        return Plan(tuple(self.segments), baseline, learned, overhead, context)

"""A strategy's plan as vLLM can run it: every row in a slot, reused ones loaded, the others computed in holes.

vLLM gives the token in slot s the position s and lets it see every slot up to its own. A plan fits where its computed
tokens see the same rows in that order, and stand everywhere equally far from their slots: keys of reused rows are then
rotated as if the whole prompt had been shifted by that distance, which attention cannot tell (it sees differences of
positions alone). So pruned documents, gaps between documents and documents side by side are served too, as long as
nothing but the end of the prompt is computed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kvilt.errors import PromptError
from kvilt.plan import Plan
from kvilt.types import CacheKey, digest_of

PLACEHOLDER = 0  # the id that stands in the prompt where a learned vector's row lies


@dataclass(frozen=True)
class Piece:
    """Stored rows of a document, one after another, in slots one after another."""

    key: CacheKey
    first: int  # the first stored row
    count: int
    slot: int  # of the first row
    base: int  # a row's key is rotated to base + its offset

    def above(self, slot: int) -> Piece | None:
        """What of it lies in `slot` and after it."""
        cut = slot - self.slot
        if cut <= 0:
            return self
        return Piece(self.key, self.first + cut, self.count - cut, slot, self.base) if cut < self.count else None

    def below(self, slot: int) -> Piece | None:
        """What of it lies before `slot`."""
        keep = slot - self.slot
        if keep >= self.count:
            return self
        return Piece(self.key, self.first, keep, self.slot, self.base) if keep > 0 else None


@dataclass(frozen=True, eq=False)
class Soft:
    """Learned vectors that are computed: input embeddings of some slots."""

    slots: Tensor  # (vectors,) int64
    vectors: Tensor  # (vectors, hidden)

    def among(self, start: int, end: int) -> tuple[Tensor, list[bool]] | None:
        """Embeddings of the slots up to and including `end`, (end + 1, hidden), and which of them are ordinary tokens.

        None where the slots from `start` up to `end` hold no vectors."""
        inside = (self.slots >= start) & (self.slots < end)
        if not bool(inside.any()):
            return None
        embeddings = torch.zeros(end + 1, self.vectors.shape[1], dtype=self.vectors.dtype)
        embeddings[self.slots[inside]] = self.vectors[inside]
        ordinary = torch.ones(end + 1, dtype=torch.bool).index_fill(0, self.slots[inside], False)
        return embeddings, ordinary.tolist()


@dataclass(frozen=True, eq=False)
class Placed:
    """A prompt in slots: what is loaded, what is computed in holes, and the tail that vLLM computes itself."""

    tokens: tuple[int, ...]
    pieces: tuple[Piece, ...]  # ascending, without overlaps
    holes: tuple[tuple[int, int], ...]  # runs of computed slots before the tail
    tail: int  # the first slot of the last run, which ends with the prompt
    soft: Soft | None  # learned vectors among the computed slots
    charged: float
    fingerprint: str  # of everything that shapes the rows, beside the tokens

    def holes_in(self, start: int, end: int) -> list[tuple[int, int]]:
        """The runs to compute from slot `start` up to slot `end`."""
        cut = ((max(a, start), min(b, end)) for a, b in self.holes)
        return [(a, b) for a, b in cut if a < b]

    def between(self, start: int, end: int) -> list[Piece]:
        """What is loaded from slot `start` up to slot `end`."""
        above = (p.above(start) for p in self.pieces)
        return [piece for p in above if p and (piece := p.below(end))]

    def reused(self, start: int = 0) -> int:
        """Rows that are loaded from slot `start` on."""
        return sum(piece.count for piece in self.between(start, self.tail))


@dataclass(frozen=True, eq=False)
class _Rows:
    """A plan's rows in slot order, (rows,) each."""

    positions: Tensor
    computed: Tensor  # bool
    tokens: Tensor
    segments: Tensor
    stored: Tensor  # which row of its segment's cache, -1 where computed

    @classmethod
    def of(cls, plan: Plan) -> _Rows:
        """Every row of the plan; reused rows in the plan's order, each before the computed tokens that see it."""
        stored = []
        for s in plan.segments:
            numbers = torch.full((s.length,), -1)
            if s.cache is not None:
                numbers[s.cache.offsets] = torch.arange(len(s.cache.offsets))
            stored.append(numbers.masked_fill(s.computed, -1)[s.places])
        numbers = torch.cat(stored)
        computed = torch.cat([s.computed[s.places] for s in plan.segments])
        tokens = torch.cat([s.tokens[s.places] for s in plan.segments])
        segments = torch.cat([torch.full((len(s.places),), i) for i, s in enumerate(plan.segments)])
        seen_from = torch.searchsorted(plan.positions[computed].sort().values, plan.positions)  # the first that sees it
        order = (2 * seen_from + computed).argsort(stable=True)
        return cls(*(column[order] for column in (plan.positions, computed, tokens, segments, numbers)))


def place(plan: Plan, linear: float) -> Placed:
    """Lay a plan into slots. `linear` is `ModelInfo.linear_cost`. Raises PromptError for a plan that vLLM cannot run."""
    if plan.blend < 1 or plan.context_rows is not None or plan.reader is not None:
        raise PromptError("this plan mixes or weighs rows, or adapts the question, in a way that vLLM cannot.")
    rows = _Rows.of(plan)
    shift = _shift(rows)
    tail = _tail(rows)
    pieces = tuple(_pieces(plan, rows, shift, tail))
    holes = [run for run in _runs(rows.computed) if run[0] < tail]
    soft = _soft(plan, rows)
    tokens = rows.tokens.clamp(min=-1)
    keyed = [(p.key.digest, p.first, p.count, p.slot, p.base) for p in pieces]
    fingerprint = digest_of(json.dumps([keyed, holes, shift]), b"" if soft is None else soft.vectors)
    return Placed(
        tokens=tuple(torch.where(tokens < 0, PLACEHOLDER, tokens).tolist()),
        pieces=pieces,
        holes=tuple((a, min(b, tail)) for a, b in holes),
        tail=tail,
        soft=soft,
        charged=plan.charged(linear),
        fingerprint=fingerprint,
    )


def _shift(rows: _Rows) -> int:
    """How far the computed tokens' positions are from their slots. Raises PromptError where they differ in that."""
    away = (rows.positions - torch.arange(len(rows.positions)))[rows.computed]
    if not len(away):
        return int(rows.positions[-1]) - len(rows.positions) + 1
    if bool((away != away[0]).any()):
        raise PromptError(
            "tokens are computed on both sides of a gap in the positions, which vLLM does not have: "
            "use documents with all their rows (no press), or a strategy that computes nothing between them."
        )
    return int(away[0])


def _tail(rows: _Rows) -> int:
    """The first slot of what is left to vLLM: the computed run at the end, ordinary tokens only, one at least."""
    ordinary = rows.computed & (rows.tokens >= 0)
    others = (~ordinary).nonzero()[:, 0]
    tail = int(others[-1]) + 1 if len(others) else 0
    if tail == len(ordinary):
        if int(rows.tokens[-1]) < 0:
            raise PromptError("the prompt ends with a learned vector: ask a question after the documents.")
        return tail - 1
    return tail


def _runs(marks: Tensor) -> list[tuple[int, int]]:
    """Where runs of True begin and end."""
    padded = torch.nn.functional.pad(marks.int(), (1, 1))
    edges = padded.diff()
    return list(zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True))


def _pieces(plan: Plan, rows: _Rows, shift: int, tail: int) -> Iterator[Piece]:
    """Reused rows before the tail, cut where the document or the order of its rows changes."""
    order = torch.stack([rows.segments, rows.stored - torch.arange(len(rows.stored))]).masked_fill(rows.computed, -1)
    cuts = (order[:, 1:] != order[:, :-1]).any(0).nonzero()[:, 0] + 1
    for start, end in pairwise([0, *cuts.tolist(), len(rows.stored)]):
        end = min(end, tail)
        segment = plan.segments[int(rows.segments[start])]
        if start < end and not rows.computed[start] and segment.cache is not None:
            yield Piece(segment.cache.key, int(rows.stored[start]), end - start, start, segment.start - shift)


def _soft(plan: Plan, rows: _Rows) -> Soft | None:
    """The learned vectors among the computed slots; None where there are none."""
    slots = (rows.computed & (rows.tokens < 0)).nonzero()[:, 0]
    if plan.learned is None or not len(slots):
        return None
    return Soft(slots, plan.learned.float()[-1 - rows.tokens[slots]])

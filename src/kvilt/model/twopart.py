"""Attention that scales a part of its rows, as APE asks for: the part and the rest each by themselves, then merged."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvilt.model.attention import flash, mixed, scores, seen
from kvilt.plan import ContextScaling

SCORES = 1 << 24  # float32 attention scores held at a time


@dataclass(frozen=True, eq=False)
class Part:
    """Some of the rows, and what each computed token sees of them."""

    rows: slice | Tensor | None = None  # None: there are none
    hidden: Tensor | None = None  # added to the scores, (computed, rows): 0 or -inf; None where every token sees all
    blind: Tensor | None = None  # tokens that see none of them, (computed,) bool; None where there are no such tokens

    @classmethod
    def of(cls, allowed: Tensor, inside: Tensor, like: Tensor) -> Part:
        """From what each computed token sees, (computed, rows) bool, and which rows are inside, (rows,) bool."""
        rows = inside.nonzero()[:, 0]
        if not len(rows):
            return cls()
        first, end = int(rows[0]), int(rows[-1]) + 1
        at = slice(first, end) if end - first == len(rows) else rows
        some = allowed[:, at]
        if bool(some.all()):
            return cls(at)
        blind = ~some.any(1)
        return cls(at, like.new_zeros(some.shape).masked_fill_(~some & ~blind[:, None], -torch.inf), blind)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """Attention over these rows alone, and its log-sum-exps: the lowest number where a token sees none of them."""
        lowest = torch.finfo(torch.float32).min
        if self.rows is None:
            return torch.zeros_like(query), query.new_full(query.shape[:-1], lowest, dtype=torch.float32)
        out, sums = _summed(query, key[:, :, self.rows], value[:, :, self.rows], self.hidden, scaling)
        return out, sums if self.blind is None else sums.masked_fill(self.blind, lowest)


@dataclass(eq=False)
class TwoPart:
    """A hook: attention over context rows and over all others, each by itself, merged by their log-sum-exps in float32.

    What tokens see is worked out once for all layers of a pass."""

    scaling: ContextScaling
    context: Tensor  # bool, at least as many as there are rows
    _seen: tuple[Tensor | None, int, int] = (None, 0, 0)  # mask, computed tokens and rows of the last call
    _parts: list[Part] = field(default_factory=list)

    def __call__(
        self, _: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
    ) -> Tensor:
        computed, rows = query.shape[2], key.shape[2]
        if self._seen[0] is not mask or self._seen[1:] != (computed, rows):
            allowed, inside, self._seen = seen(mask, query, key), self.context[:rows], (mask, computed, rows)
            self._parts = [Part.of(allowed, some, query) for some in (inside, ~inside)]
        scale, t = query.shape[-1] ** -0.5 if scaling is None else scaling, self.scaling.temperature
        (a, sums), (b, others) = (
            p.attend(query, key, value, by) for p, by in zip(self._parts, (scale / t, scale), strict=True)
        )
        shares = torch.stack([self.scaling.scale * t * sums, others]).softmax(0)[..., None]
        return (shares[0] * a.float() + shares[1] * b.float()).to(query.dtype)


def _summed(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """`flash` on any device, with `hidden` (computed, rows)."""
    if query.device.type != "cpu":
        return _pieced(query, key, value, hidden, scaling)
    group = query.shape[1] // key.shape[1]
    return flash(query, key, value, None if hidden is None else hidden.repeat(group, 1), scaling)


def _pieced(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """The same of few tokens at a time, because all their scores are held."""
    size, found = max(1, SCORES // (query.shape[1] * key.shape[2])), []
    for first in range(0, query.shape[2], size):
        scored = scores(query[:, :, first : first + size], key, scaling)
        scored = scored if hidden is None else scored + hidden[first : first + size]
        sums = scored.logsumexp(-1)
        found.append((mixed((scored - sums[..., None]).exp(), value, query.dtype), sums.flatten(0, 1)[None]))
    return torch.cat([out for out, _ in found], 2), torch.cat([sums for _, sums in found], 2)

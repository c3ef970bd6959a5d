"""Ranked recompute, Kvilt's own: tokens are chosen when documents are encoded, not when they are asked about.

Methods that select tokens look at the prompt first; a scheduler such as vLLM's has no model to look with. What a document's
rows owe to what stands before it can be measured once (`engine.ranking`), and is stored with it. CacheTune
(arXiv 2605.24022) selects offline too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from kvilt.errors import SpecError
from kvilt.plan import Plan
from kvilt.strategies.base import Plain, Probe, begin, has_exact_prefix
from kvilt.types import DocumentCache, ModelInfo, Prompt


@dataclass(frozen=True)
class Ranked(Plain):
    """The share `ratio` of every document's tokens is recomputed in place: those that depend most on what stands before.

    Gaps of up to `join` tokens between them are computed too, as part of that share: few long runs cost an engine less
    than many short ones. `sink` is the prompt's system part unless it is given."""

    sink: str = "system"
    ratio: float = 0.15
    join: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise SpecError(f"option ratio wants a share from 0 to 1, not {self.ratio}.")
        if self.join < 0:
            raise SpecError(f"option join wants 0 or more, not {self.join}.")

    def bind(self, info: ModelInfo) -> Self:
        """Resolve the sink; documents carry an order."""
        bound = super().bind(info)
        return replace(bound, encoding=bound.encoding and replace(bound.encoding, ranked=True))

    def plan(self, prompt: Prompt, probe: Probe) -> Plan:
        """The first places of each document's order and the question are computed, all else is reused."""
        layout, exact = begin(prompt), has_exact_prefix(prompt)
        for number, document in enumerate(prompt.documents):
            layout.reuse(document, None if exact and number == 0 else self._fresh(document))
        return layout.ask().plan()

    def _fresh(self, document: DocumentCache) -> Tensor:
        """The places to compute, (length,) bool."""
        fresh, left = [False] * document.length, round(self.ratio * document.length)
        for place in [] if document.order is None else document.order.tolist():
            if left <= 0:
                break
            if not fresh[place]:
                added = [place, *self._gap(fresh, place, -1), *self._gap(fresh, place, 1)]
                left -= len(added)
                for i in added:
                    fresh[i] = True
        return torch.tensor(fresh, dtype=torch.bool)

    def _gap(self, fresh: list[bool], place: int, step: int) -> range:
        """The places between one and the next that is computed, where they are few enough."""
        for distance in range(1, self.join + 2):
            other = place + step * distance
            if not 0 <= other < len(fresh):
                break
            if fresh[other]:
                return range(min(place, other) + 1, max(place, other))
        return range(0)

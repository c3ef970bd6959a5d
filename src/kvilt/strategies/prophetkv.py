"""ProphetKV (arXiv 2602.02579, ICML 2026): the tokens that the question attends to most, over all layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvilt.strategies.base import Probe
from kvilt.strategies.selection import Selective, asked
from kvilt.types import Prompt


@dataclass(frozen=True)
class ProphetKV(Selective):
    """A pass of the question alone over the reused caches scores tokens (stage I); the best are recomputed (stage II).

    The score is the mean attention over question tokens, heads and layers."""

    ratio: float = 0.2

    def scores(self, prompt: Prompt, probe: Probe) -> Tensor:
        """Mean attention from the question over all layers."""
        return asked(prompt, probe, range(self.depth))

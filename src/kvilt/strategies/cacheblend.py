"""CacheBlend (arXiv 2405.16444, EuroSys 2025): the tokens whose keys and values differ most from the reused ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvilt.errors import SpecError
from kvilt.rows.rows import whole
from kvilt.strategies.base import Probe
from kvilt.strategies.selection import Selective, candidates, lay, recomputable, share, split, top
from kvilt.types import DocumentCache, Prompt

SCORES = {"kv": (0, 1), "v": (1,)}  # sides of the rows: keys, values
STEP = 0.1  # gradual filtering: each stage before the last keeps this share of `ratio` more


@dataclass(frozen=True)
class CacheBlend(Selective):
    """Tokens are scored by |dK|^2 + |dV|^2 in layer 1, where reused rows first differ from fresh ones.

    `score="v"` leaves the keys out, as the released prototype does. `stages=n` filters gradually: stage i measures what is
    left in layer i, with only that computed below, and keeps ratio * (1 + 0.1 * (n - i)). In the paper a dropped token
    keeps the fresh rows of the layers before; here it keeps its stored ones in every layer."""

    score: str = "kv"
    stages: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in SCORES:
            raise SpecError(f"option score wants {' or '.join(SCORES)}, not {self.score!r}.")
        if self.stages < 1:
            raise SpecError(f"option stages wants 1 or more, not {self.stages}.")

    def select(self, prompt: Prompt, probe: Probe) -> Tensor:
        """The tokens that deviate most, (places,) bool."""
        if self.ratio == 1:
            return recomputable(prompt)
        among = kept = candidates(prompt)
        for stage in range(1, self.stages + 1):
            count = share(min(1.0, self.ratio * (1 + STEP * (self.stages - stage))), among)
            if count == 0:
                return among & False
            if count < int(kept.sum()):
                kept = top(self._deviation(prompt, probe, kept, stage), kept, count)
        return kept

    def _deviation(self, prompt: Prompt, probe: Probe, fresh: Tensor, layer: int) -> Tensor:
        """How far the fresh rows of a layer are from the stored ones, (places,) float32."""
        seen = probe.layers(lay(prompt, fresh).ask().plan(), layer + 1)[1:]  # without the system part
        parts = zip(seen, prompt.documents, split(prompt, fresh), strict=False)  # nor the question
        return torch.cat([distance(f, d, SCORES[self.score]) if m.any() else m.float() for f, d, m in parts])


def distance(fresh: DocumentCache, document: DocumentCache, sides: tuple[int, ...]) -> Tensor:
    """Squared distance of each place's fresh row from its stored one in the highest layer of `fresh`, (length,) float32."""
    distances = torch.zeros(document.length)
    if fresh.rows is None or document.rows is None:
        return distances
    layer = fresh.rows.shape[0] - 1
    new, old = (whole(rows, slice(layer, layer + 1))[0].float().cpu() for rows in (fresh.rows, document.rows))
    chosen = list(sides)  # of (2, heads, rows, head_dim)
    distances[document.offsets] = (new[chosen] - old[chosen]).square().sum((0, 1, 3))
    return distances

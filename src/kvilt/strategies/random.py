"""Random recompute: the control that every way of selecting tokens has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvilt.strategies.base import Probe
from kvilt.strategies.selection import Selective
from kvilt.types import Prompt, digest_of


@dataclass(frozen=True)
class RandomRecompute(Selective):
    """A random share of the documents' tokens is recomputed; the same one for the same seed and documents in this order."""

    seed: int = 0

    def scores(self, prompt: Prompt, probe: Probe) -> Tensor:
        """Random numbers drawn from the seed and the documents' keys."""
        digest = digest_of(str(self.seed), *(d.key.digest for d in prompt.documents))
        generator = torch.Generator().manual_seed(int(digest[:15], 16))
        return torch.rand(sum(d.length for d in prompt.documents), generator=generator)

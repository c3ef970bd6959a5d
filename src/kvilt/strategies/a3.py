"""A3 (attention-aware recompute, arXiv 2511.17560): the tokens that the question attends to most in layer 0."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvilt.strategies.base import Probe
from kvilt.strategies.selection import Selective, asked
from kvilt.types import Prompt


@dataclass(frozen=True)
class A3(Selective):
    """Tokens are scored by the attention they get from the question in layer 0, over its tokens and heads.

    The paper computes layer 0 for all tokens; the score is the same without that (see `selection`), and looking takes the
    question's queries and keys of one layer."""

    def scores(self, prompt: Prompt, probe: Probe) -> Tensor:
        """Attention from the question in layer 0."""
        return asked(prompt, probe, range(1))

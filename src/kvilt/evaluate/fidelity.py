"""How close a strategy's answers are to full recompute on the same prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvilt.evaluate.metrics import normalise


def divergence(full: Tensor, strategy: Tensor) -> float:
    """Mean KL(full || strategy) in nats over positions, both (tokens, vocab) logits."""
    p, q = full.float().log_softmax(-1), strategy.float().log_softmax(-1)
    terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))  # a token that full rules out weighs nothing
    return max(0.0, float(terms.sum(-1).mean()))


def same_text(a: str, b: str) -> bool:
    """Whether two answers are the same after SQuAD normalisation."""
    return normalise(a) == normalise(b)


def same_first_token(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two answers begin with the same token."""
    return list(a[:1]) == list(b[:1])

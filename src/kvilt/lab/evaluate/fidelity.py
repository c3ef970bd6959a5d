"""How close a strategy's answers are to full recompute on the same prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvilt.errors import ModelError
from kvilt.lab.evaluate.metrics import normalise


def divergence(full: Tensor, strategy: Tensor) -> float:
    """Mean KL(full || strategy) in nats over positions, both (tokens, vocab) logits. Raises ModelError for NaN."""
    p, q = full.float().log_softmax(-1), strategy.float().log_softmax(-1)
    terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))  # a token that full rules out weighs nothing
    mean = float(terms.sum(-1).mean())
    if math.isnan(mean):
        raise ModelError("the model's logits are not numbers (NaN): check its weights and dtype.")
    return mean if mean > 0 else 0.0  # rounding may leave it just below


def same_text(a: str, b: str) -> bool:
    """Whether two answers are the same after SQuAD normalisation."""
    return normalise(a) == normalise(b)


def same_first_token(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two answers begin with the same token."""
    return list(a[:1]) == list(b[:1])

"""How close a strategy's answers are to full recompute on the same prompt."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from kvilt.errors import ModelError
from kvilt.lab.evaluate.metrics import normalise
from kvilt.model.placing import Run


class Following(Run):
    """A run that knows its next steps as long as the answer follows a draft, which is run in one pass first.

    What an answer is does not change. `scores` (draft, vocab) predict the draft's tokens, `given` are the logits of every
    step that was taken, and `seconds` is what the draft took."""

    def __init__(self, run: Run, draft: Sequence[int] = ()) -> None:
        super().__init__(run.placed, run.logits, run.after)
        began, room = time.perf_counter(), run.placed.capacity - run.placed.length
        self.draft = list(draft[:room])
        ahead = [run.peek(torch.tensor(self.draft[:-1]))] if len(self.draft) > 1 else []
        self.scores = torch.cat([run.logits[None], *ahead])
        self.given, self._at, self._left = [run.logits[None]], 0, not ahead
        float(self.scores[-1, 0])  # waits for a CUDA device
        self.seconds = time.perf_counter() - began

    def step(self, token: Tensor) -> Tensor:
        """Append one token (1, 1); logits of the next, (1, vocab) float32."""
        if not self._left and self._at + 1 < len(self.draft) and int(token) == self.draft[self._at]:
            self._at += 1
            row = self.scores[self._at : self._at + 1]
        else:
            if not self._left:
                self.placed.advance(self._at)
            self._left, row = True, super().step(token)
        self.given.append(row)
        return row


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

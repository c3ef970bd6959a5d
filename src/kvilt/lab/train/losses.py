"""Distances between student and teacher, summed over the tokens of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kvilt.lab.train.dense import IGNORE


@dataclass(frozen=True, eq=False)
class TopK:
    """A teacher's most likely tokens at each place, and the log-probability of all others together."""

    ids: Tensor  # (..., k) int64
    logp: Tensor  # (..., k) float32
    rest: Tensor  # (...,) float32

    @classmethod
    def of(cls, logits: Tensor, k: int) -> TopK:
        """Keep the k largest of (..., vocab) logits."""
        logp, ids = logits.float().log_softmax(-1).topk(min(k, logits.shape[-1]), -1)
        return cls(ids, logp, rest_of(logits, ids))

    @classmethod
    def pad(cls, several: Sequence[TopK], length: int) -> TopK:
        """Several answers (tokens, k) as one (batch, length, k), aligned at their ends."""
        missing = [length - len(t.ids) for t in several]
        ids = [F.pad(t.ids, (0, 0, n, 0)) for t, n in zip(several, missing, strict=True)]
        logp = [F.pad(t.logp, (0, 0, n, 0)) for t, n in zip(several, missing, strict=True)]
        rest = [F.pad(t.rest, (n, 0)) for t, n in zip(several, missing, strict=True)]
        return cls(torch.stack(ids), torch.stack(logp), torch.stack(rest))


def rest_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of all tokens but `ids` together, (...,); exact also when it is tiny."""
    others = logits.float().scatter(-1, ids, float("-inf"))
    return others.logsumexp(-1) - logits.float().logsumexp(-1)


def divergence(student: Tensor, teacher: Tensor | TopK, valid: Tensor) -> Tensor:
    """Sum over valid places of KL(teacher || student) in nats, both (batch, tokens, vocab) logits.

    From the top k the tokens outside it count as one: never more than the full divergence."""
    if isinstance(teacher, TopK):
        logp = torch.cat([teacher.logp, teacher.rest[..., None]], -1)
        logq = torch.cat(
            [student.log_softmax(-1).gather(-1, teacher.ids), rest_of(student, teacher.ids)[..., None]], -1
        )
    else:
        logp, logq = teacher.log_softmax(-1), student.log_softmax(-1)
    p = logp.exp()
    terms = torch.where(p > 0, p * (logp - logq), 0.0).sum(-1)
    return torch.where(valid, terms, 0.0).sum()


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p(label) over (batch, tokens) labels that are not IGNORE."""
    return F.cross_entropy(student.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")


@dataclass(frozen=True)
class Fidelity:
    """How close the student comes to its teacher on held-out answers."""

    kl: float  # nats per token
    agreement: float  # share of tokens that both find most likely
    same_answers: float  # share of answers whose tokens all agree: greedy decoding gives the same text

    def __str__(self) -> str:
        return f"KL {self.kl:.4f}, tokens agree {self.agreement:.1%}, same answers {self.same_answers:.1%}"


@dataclass
class Tally:
    """Adds up fidelity over batches."""

    kl: float = 0.0
    tokens: int = 0
    agreed: int = 0
    answers: int = 0
    same: int = 0

    def add(self, student: Tensor, teacher: Tensor | TopK, valid: Tensor) -> None:
        """Count one batch."""
        best = teacher.ids[..., 0] if isinstance(teacher, TopK) else teacher.argmax(-1)
        equal = (student.argmax(-1) == best) | ~valid
        self.kl += float(divergence(student, teacher, valid))
        self.tokens += int(valid.sum())
        self.agreed += int((equal & valid).sum())
        self.answers += len(valid)
        self.same += int(equal.all(-1).sum())

    def result(self) -> Fidelity:
        """The means."""
        return Fidelity(self.kl / self.tokens, self.agreed / self.tokens, self.same / self.answers)

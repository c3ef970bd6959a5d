"""What is learned: the teacher's distribution at every token of an answer, or the answer's own tokens."""

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
        sized = [(t, length - len(t.ids)) for t in several]
        wide = [(F.pad(t.ids, (0, 0, n, 0)), F.pad(t.logp, (0, 0, n, 0)), F.pad(t.rest, (n, 0))) for t, n in sized]
        return cls(*map(torch.stack, zip(*wide, strict=True)))

    def to(self, device: torch.device) -> TopK:
        """The same on another device."""
        return TopK(self.ids.to(device), self.logp.to(device), self.rest.to(device))


def rest_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of all tokens but `ids` together, (...,); exact also when it is tiny."""
    others = logits.float().scatter(-1, ids, float("-inf"))
    return others.logsumexp(-1) - logits.float().logsumexp(-1)


def divergence(student: Tensor, teacher: TopK, valid: Tensor) -> Tensor:
    """Sum over valid places of KL(teacher || student) in nats, from (batch, tokens, vocab) logits of the student.

    The tokens outside the teacher's top k count as one: never more than the full divergence."""
    logp = torch.cat([teacher.logp, teacher.rest[..., None]], -1)
    logq = torch.cat([student.log_softmax(-1).gather(-1, teacher.ids), rest_of(student, teacher.ids)[..., None]], -1)
    p = logp.exp()
    terms = torch.where(p > 0, p * (logp - logq), 0.0).sum(-1)
    return torch.where(valid, terms, 0.0).sum()


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p(label) over (batch, tokens) labels that are not IGNORE."""
    return F.cross_entropy(student.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def objective(student: Tensor, labels: Tensor, teacher: TopK | None) -> Tensor:
    """What a training makes small, summed over the labels: KL to the teacher, or without one cross-entropy."""
    if teacher is None:
        return cross_entropy(student, labels)
    return divergence(student, teacher, labels != IGNORE)


@dataclass(frozen=True)
class Fidelity:
    """How close held-out answers come to what is learned."""

    loss: float  # nats per token: KL to the teacher, or cross-entropy on the data's answers
    agreement: float  # share of tokens that the student, too, finds most likely
    same_answers: float  # share of samples in which all do: greedy decoding gives the same text

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, tokens agree {self.agreement:.1%}, same answers {self.same_answers:.1%}"


def tally(student: Tensor, labels: Tensor, teacher: TopK | None) -> Tensor:
    """A batch's sums for `fidelity`: loss, tokens, tokens agreed, samples, samples alike, (5,) float64."""
    valid, wanted = labels != IGNORE, labels if teacher is None else teacher.ids[..., 0]
    equal = (student.argmax(-1) == wanted) | ~valid
    counts = [valid.sum(), (equal & valid).sum(), torch.tensor(len(valid)), equal.all(-1).sum()]
    return torch.stack([objective(student, labels, teacher).cpu(), *(c.cpu() for c in counts)]).double()


def fidelity(sums: Tensor) -> Fidelity:
    """The means of added up `tally`s."""
    loss, tokens, agreed, samples, same = sums.tolist()
    return Fidelity(loss / tokens, agreed / tokens, same / samples)

"""Presses: which rows of an encoded document may go, decided without any question, once, when it is encoded.

The papers drop other rows in every head; a document cache has the same rows in all heads and layers, so scores are
normalised per head and averaged (KVzip's: the highest). Sinks, title, header and trailer are never dropped."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from kvilt.compress.base import Made
from kvilt.errors import DocumentError, SpecError
from kvilt.plan import Plan, Segment
from kvilt.rows.rows import TensorRows
from kvilt.types import DocumentCache, digest_of

RIDGE = 0.01  # of the mean eigenvalue: with fewer rows than channels every plain leverage score would be 1
CHUNK = 2048  # tokens that KVzip lets the model repeat at a time (section 3.4)


@dataclass(frozen=True)
class Press(ABC):
    """Keeps the share `keep` of a document's tokens, among them the first `sinks` and the title's."""

    kind: ClassVar[str] = "rows"
    keep: float = 0.5
    sinks: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise SpecError(f"option keep wants a share above 0 and up to 1, not {self.keep}.")
        if self.sinks < 0:
            raise SpecError(f"option sinks wants 0 or more, not {self.sinks}.")

    @abstractmethod
    def scores(self, made: Made) -> Tensor:
        """What each row is worth, (rows,)."""

    def press(self, made: Made) -> DocumentCache:
        """The cache with its best rows."""
        cache, places = made.cache, made.cache.offsets
        if self.keep == 1:
            return cache
        first, end = made.around[0], cache.length - made.around[1]
        own = (places >= first) & (places < end)
        fixed = ~own | (places < first + max(self.sinks, made.title))
        count = int((~own).sum()) + max(int((fixed & own).sum()), math.ceil(self.keep * int(own.sum())))
        worth = self.scores(made).double().masked_fill(fixed, torch.inf)
        best = worth.argsort(descending=True, stable=True)[:count].sort().values  # (kept,) ascending
        return replace(cache, offsets=places[best], rows=TensorRows(made.rows[..., best, :]))


class PerLayer(Press):
    """A press that looks at the rows themselves, layer by layer."""

    @abstractmethod
    def worth(self, keys: Tensor, values: Tensor, made: Made) -> Tensor:
        """Scores of one layer's keys (without rotation) and values (heads, rows, head_dim), (heads, rows)."""

    def scores(self, made: Made) -> Tensor:
        """The mean over layers and heads."""
        layers = made.rows.float()
        return torch.stack([self.worth(keys, values, made).double().mean(0) for keys, values in layers]).mean(0)


@dataclass(frozen=True)
class KeyDiff(PerLayer):
    """Keeps the keys least similar (cosine) to the mean of all normalised keys (KeyDiff, arXiv 2504.15364)."""

    def worth(self, keys: Tensor, values: Tensor, made: Made) -> Tensor:
        keys = made.rotate(keys, made.cache.offsets)  # the paper compares keys as the cache holds them
        similar: Tensor = cosine_similarity(keys, normalize(keys, dim=-1).mean(1, keepdim=True), dim=-1)
        return -similar


@dataclass(frozen=True)
class KNorm(PerLayer):
    """Keeps the keys of smallest L2 norm (arXiv 2406.11430)."""

    def worth(self, keys: Tensor, values: Tensor, made: Made) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(keys, dim=-1)
        return -norms / norms.mean(1, keepdim=True)


@dataclass(frozen=True)
class Leverage(PerLayer):
    """Keeps the rows of highest statistical leverage in the matrix of un-rotated keys (Compactor, arXiv 2507.08143)."""

    def worth(self, keys: Tensor, values: Tensor, made: Made) -> Tensor:
        return leverage(keys)


@dataclass(frozen=True)
class Cur(PerLayer):
    """Keeps the rows of highest leverage in keys and values, multiplied (CurDKV, arXiv 2509.15038)."""

    def worth(self, keys: Tensor, values: Tensor, made: Made) -> Tensor:
        both = leverage(keys) * leverage(values)
        return both / both.sum(1, keepdim=True)


def leverage(rows: Tensor) -> Tensor:
    """Ridge leverage scores x (X'X + r I)^-1 x' of (heads, rows, dim), each head's sum 1, (heads, rows) float64."""
    x = rows.double()
    gram = x.mT @ x
    ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + 1e-12
    found: Tensor = (x * torch.linalg.solve(gram + ridge * torch.eye(x.shape[-1], dtype=x.dtype), x.mT).mT).sum(-1)
    return found / found.sum(1, keepdim=True)


@dataclass(frozen=True)
class KVzip(Press):
    """Lets the model repeat the document from its own cache: a row is worth the most attention that it gets meanwhile.

    KVzip, arXiv 2505.23416: one more pass over the document. The highest of all heads and layers: what one of them
    needs must stay."""

    def scores(self, made: Made) -> Tensor:
        cache, worth = made.cache, torch.zeros(len(made.cache.offsets))
        asked = made.tokenize("\nRepeat the previous context:\n")
        room = min(CHUNK, made.context - cache.length - len(asked))
        if room < 1:
            held = f"a document of {cache.length} tokens leaves no room to repeat it in {made.context}"
            raise DocumentError(f"kvzip: {held}, the model's context.")
        for chunk in torch.split(cache.own_tokens, room):
            again = Segment(torch.cat([asked, chunk]), cache.length, name="repetition")
            plan = Plan((Segment(cache.placed_tokens, 0, cache, name="document"), again), cache.length)
            seen = made.attention(plan, range(len(made.rows)), "max", len(chunk) + 1)
            worth = torch.maximum(worth, seen[:, : len(worth)].amax(0))
        return worth


@dataclass(frozen=True)
class Random(Press):
    """Keeps random rows, always the same ones of the same tokens: the control."""

    seed: int = 0

    def scores(self, made: Made) -> Tensor:
        drawn = int(digest_of(made.cache.tokens, str(self.seed))[:15], 16)
        return torch.rand(len(made.cache.offsets), generator=torch.Generator().manual_seed(drawn))

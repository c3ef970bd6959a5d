"""Training samples as ordinary forward passes under a plan's own mask: what is trained is what is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvilt.engine.text import TextFormat
from kvilt.errors import TrainError
from kvilt.lab.train.data import Sample
from kvilt.model.model import Model
from kvilt.plan import Plan, Segment
from kvilt.rows.rows import TensorRows
from kvilt.strategies.base import Strategy
from kvilt.strategies.full import FullRecompute
from kvilt.types import CacheKey, DocumentCache, Encoding, Prompt, digest_of

IGNORE = -100
ENCODED, ASKED = 1, 2  # rows of documents encoded alone, and of question and answer; 0: all others
NOWHERE = CacheKey("", "", "", "", "", "", "")  # caches that are only planned have no address


def planned(ids: Tensor, encoding: Encoding) -> DocumentCache:
    """The cache that encoding `ids` (tokens,) would give, without its keys and values."""
    nothing = TensorRows(torch.zeros(0, 2, 0, 0, 0))  # plans only ask whether there are any
    return replace(encoding.cache(ids, NOWHERE), rows=nothing)


@dataclass(frozen=True, eq=False)
class Parts:
    """Token ids of one sample, each part tokenised alone as the engine does it."""

    system: Tensor
    documents: tuple[Tensor, ...]
    question: Tensor
    answer: Tensor  # the data's own answer and EOS; empty without one
    sample: Sample

    @property
    def size(self) -> int:
        """Tokens of the prompt and of the data's answer."""
        return sum(map(len, (self.system, *self.documents, self.question, self.answer)))

    @property
    def digest(self) -> str:
        """Content digest of all token ids."""
        return digest_of(self.system, self.question, self.answer, *self.documents)

    def prompt(self, strategy: Strategy) -> Prompt:
        """The prompt with planned caches, or with bare tokens where the strategy reuses nothing."""
        if strategy.encoding is None:
            return Prompt(_bare(self.system), tuple(map(_bare, self.documents)), self.question)
        system = planned(self.system, Encoding()) if len(self.system) else _bare(self.system)
        encoding = strategy.encoding
        return Prompt(system, tuple(planned(d, encoding) for d in self.documents), self.question)

    def plan(self, strategy: Strategy) -> Plan:
        """The plan that serves this sample. Raises TrainError for strategies that must look at the model first."""
        return strategy.plan(self.prompt(strategy), NoProbe())


def _bare(ids: Tensor) -> DocumentCache:
    return DocumentCache(ids, torch.arange(len(ids)), len(ids), NOWHERE)


class NoProbe:
    """Refuses to look: what is trained is a fixed plan."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TrainError("a strategy that probes the model has no fixed mask to train under.")

    layers = attention = queries = keys = _refuse


def parts_of(text: TextFormat, sample: Sample) -> Parts:
    """Tokenise a sample. Raises DocumentError and PromptError for empty parts."""
    documents = tuple(text.document_ids(d) for d in sample.documents)
    answer = answer_ids(text, sample.answers[0]) if sample.answers else torch.empty(0, dtype=torch.long)
    if sample.plain:
        start = text.tokenizer.bos_token_id
        bos = torch.tensor([] if start is None else [start], dtype=torch.long)
        return Parts(bos, (), torch.empty(0, dtype=torch.long), answer, sample)
    return Parts(text.system_ids(), documents, text.question_ids(sample.question), answer, sample)


def answer_ids(text: TextFormat, answer: str) -> Tensor:
    """An answer as the model would generate it, EOS included, (tokens,); markers of control in it are ordinary text."""
    gap = " " if text.tail.endswith(":") else ""  # "Answer:" of base models is followed by a space
    end = [] if text.tokenizer.eos_token_id is None else [text.tokenizer.eos_token_id]
    return torch.cat([text.plain_ids(gap + answer), torch.tensor(end, dtype=torch.long)])


@dataclass(frozen=True, eq=False)
class Row:
    """Samples as one ordinary pass; its last len(labels) rows predict the labels."""

    tokens: Tensor  # (rows,) int64, below zero: learned vectors
    positions: Tensor  # (rows,)
    mask: Tensor  # (rows, rows) bool
    labels: Tensor  # (last,) int64, IGNORE where nothing is learned; empty to predict one token freely
    roles: Tensor | None = None  # (rows,) int64: ENCODED, ASKED or 0; none: all 0


def row_of(strategy: Strategy, parts: Parts, answer: Tensor) -> Row:
    """A sample with a forced answer under the strategy's plan; also prompts alone, with an empty answer."""
    if parts.sample.plain:
        return _plain(torch.cat([parts.system, answer]))
    chosen = strategy if parts.sample.reuse else FullRecompute()
    plan = parts.plan(chosen)
    if len(answer) > 1:
        forced = Segment(answer[:-1], plan.end, name="answer")
        plan = replace(plan, segments=(*plan.segments, forced))
    dense = plan.dense()
    (_, encoded), (_, asking) = dense.adapters
    roles = ENCODED * encoded.long() + ASKED * asking.long()
    return Row(dense.tokens, dense.positions, dense.mask, answer, roles)


def _plain(ids: Tensor) -> Row:
    places = torch.arange(len(ids) - 1)
    return Row(ids[:-1], places, places[None] <= places[:, None], ids[1:], torch.full_like(places, ASKED))


def merged(rows: Sequence[Row]) -> Row:
    """Rows that begin alike as one: behind the longest stands what the others do not share with it, unseen by each other."""
    base, *others = sorted(rows, key=lambda row: -len(row.tokens))
    cuts = [_alike(row, base) for row in others]
    sizes = [len(row.tokens) - cut for row, cut in zip(others, cuts, strict=True)]
    at, total = len(base.tokens), len(base.tokens) + sum(sizes)
    mask = torch.zeros(total, total, dtype=torch.bool)
    mask[:at, :at] = base.mask
    for row, cut, size in zip(others, cuts, sizes, strict=True):
        mask[at : at + size, :cut] = row.mask[cut:, :cut]
        mask[at : at + size, at : at + size] = row.mask[cut:, cut:]
        at += size

    def joined(column: Callable[[Row], Tensor]) -> Tensor:
        return torch.cat([column(base), *(column(row)[cut:] for row, cut in zip(others, cuts, strict=True))])

    labels = [_left(row.labels, size, IGNORE) for row, size in zip(others, sizes, strict=True)]
    columns = joined(lambda row: row.tokens), joined(lambda row: row.positions)
    return Row(*columns, mask, torch.cat([base.labels, *labels]), joined(_roles))


def _roles(row: Row) -> Tensor:
    return torch.zeros_like(row.tokens) if row.roles is None else row.roles


def _alike(a: Row, b: Row) -> int:
    """How many rows both begin with: the same tokens at the same positions, none of which predicts a label."""
    size = min(len(a.tokens) - len(a.labels), len(b.tokens) - len(b.labels))
    same = (a.tokens[:size] == b.tokens[:size]) & (a.positions[:size] == b.positions[:size])
    return size if bool(same.all()) else int(same.long().argmin())


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows padded on the left, so that all answers end in the last column; a pad sees itself alone."""

    tokens: Tensor  # (batch, rows)
    positions: Tensor  # (batch, rows)
    mask: Tensor  # (batch, 1, rows, rows) bool
    labels: Tensor  # (batch, answer), IGNORE where a shorter answer has nothing to predict
    roles: Tensor  # (batch, rows)

    @property
    def keep(self) -> int:
        """How many last columns predict labels."""
        return self.labels.shape[1]


def collate(rows: Sequence[Row]) -> Batch:
    """Pad rows to one batch."""
    longest, answer = max(len(r.tokens) for r in rows), max(1, *(len(r.labels) for r in rows))
    mask = torch.eye(longest, dtype=torch.bool).repeat(len(rows), 1, 1, 1)  # (batch, 1, rows, rows)
    for i, row in enumerate(rows):
        first = longest - len(row.tokens)
        mask[i, 0, first:, first:] = row.mask
    columns = (
        (_left(r.tokens, longest, 0), _left(r.positions, longest, 0), _left(_roles(r), longest, 0)) for r in rows
    )
    tokens, positions, roles = map(torch.stack, zip(*columns, strict=True))
    return Batch(tokens, positions, mask, torch.stack([_left(r.labels, answer, IGNORE) for r in rows]), roles)


def _left(values: Tensor, size: int, fill: int) -> Tensor:
    return F.pad(values, (size - len(values), 0), value=fill)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as numbers to add: made once for all layers, where attention would convert a bool mask in each."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def logits_of(model: Model, batch: Batch, learned: Tensor | None = None) -> Tensor:
    """One pass, differentiable in `learned` (vectors, hidden): float32 logits (batch, keep, vocab) of the end."""
    device = model.shape.device
    out = model.hf(
        inputs_embeds=model.embed(batch.tokens, learned),
        position_ids=batch.positions.to(device),
        attention_mask=additive(batch.mask.to(device), model.shape.dtype),
        use_cache=False,
        logits_to_keep=batch.keep,
    )
    return torch.as_tensor(out.logits).float()

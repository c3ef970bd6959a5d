"""SAM-KV (arXiv 2508.11661, AAAI 2026): each document keeps its ends and its best blocks, recomputed; the rest is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from kvilt.errors import SpecError
from kvilt.plan import Layout, Plan
from kvilt.rows.rows import select
from kvilt.strategies.base import Plain, Probe, begin
from kvilt.strategies.selection import candidates, layer_range, split
from kvilt.types import DocumentCache, ModelInfo, Prompt

STABLE = (0.75, 1.0)  # of the depth: the layers whose queries and keys decide
UPDATES = ("overwrite", "fusion")


@dataclass(frozen=True)
class SamKV(Plain):
    """The first `init` and last `local` tokens of a document are its anchors; between them lie blocks of `block` tokens.

    A block's score is its mean key times the document's own query: the question's, run over all anchors, plus what the
    other documents' last tokens ask, as far as they resemble it. Blocks above the anchors' own score are kept, the best
    of all documents first, for every layer of `layers`. Queries and keys are compared without rotation: what stands
    where would else decide, and means over rotated vectors mean little. At most the share `most` of the blocks is kept.
    `update="fusion"` makes a kept row theta * fresh + (1 - theta) * stored."""

    init: int = 8
    local: int = 16
    block: int = 8
    most: float = 0.5
    layers: str = ""
    update: str = "overwrite"
    theta: float = 0.9
    depth: int = field(default=1, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.init < 0 or self.local < 1 or self.block < 1:
            given = f"{self.init}, {self.local}, {self.block}"
            raise SpecError(f"sam_kv wants init >= 0, local >= 1 and block >= 1, not {given}.")
        if self.update not in UPDATES:
            raise SpecError(f"option update wants {' or '.join(UPDATES)}, not {self.update!r}.")
        if not 0 < self.theta <= 1 or not 0 <= self.most <= 1:
            raise SpecError(f"sam_kv wants 0 < theta <= 1 and 0 <= most <= 1, not {self.theta}, {self.most}.")
        layer_range(self.layers, self.depth, STABLE)

    def bind(self, info: ModelInfo) -> Self:
        """Resolve the sink; note how deep the model is."""
        return replace(super().bind(info), depth=info.num_layers)

    def plan(self, prompt: Prompt, probe: Probe) -> Plan:
        """Kept tokens and the question are computed, dropped ones leave their places empty."""
        stored = [d for d in prompt.documents if d.rows is not None]
        kept = iter(self._kept(prompt, stored, probe))
        layout = begin(prompt)
        for document, recomputable in zip(prompt.documents, split(prompt, candidates(prompt)), strict=True):
            part = select(document, next(kept).nonzero()[:, 0]) if document.rows is not None else document
            fresh = torch.zeros_like(recomputable).index_fill(0, part.offsets, True) & recomputable
            layout.reuse(part, fresh)
        return replace(layout.ask().plan(), blend=self.theta if self.update == "fusion" else 1.0)

    def _kept(self, prompt: Prompt, documents: Sequence[DocumentCache], probe: Probe) -> list[Tensor]:
        """Which stored rows of each document are kept, (rows,) bool each."""
        groups = [self._groups(len(d.offsets)) for d in documents]
        looked_at = len(prompt.question) + sum(min(self.local, len(g)) for g in groups)
        if sum(int(g.count_nonzero()) for g in groups) <= looked_at:  # looking costs more than dropping can save
            return [torch.ones_like(g, dtype=torch.bool) for g in groups]
        wanted = layer_range(self.layers, self.depth, STABLE)
        asked = self._asked(prompt, groups, probe, wanted)
        own = [self._asks(prompt, d, probe, wanted) for d in documents]
        found = []  # per layer, per document (groups,): the anchors' score and the blocks'
        for i, layer in enumerate(wanted):
            queries = personal(asked[i], [q[i] for q in own])
            rows = [inner(probe.keys(d, layer), q) for d, q in zip(documents, queries, strict=True)]
            found.append([means(r, g) for r, g in zip(rows, groups, strict=True)])
        chosen = best_blocks(found, self.most)
        return [torch.cat([torch.ones(1, dtype=torch.bool), c])[g] for c, g in zip(chosen, groups, strict=True)]

    def _groups(self, rows: int) -> Tensor:
        """The number of each row's block, from 1 on; 0 for anchors. (rows,)"""
        at = torch.arange(rows)
        return ((at - self.init) // self.block + 1).masked_fill((at < self.init) | (at >= rows - self.local), 0)

    def _asked(self, prompt: Prompt, groups: Sequence[Tensor], probe: Probe, layers: range) -> list[Tensor]:
        """The question's mean query over the anchors of all documents, (heads, head_dim) per layer."""
        layout, at, rest = begin(prompt), prompt.system.length, iter(groups)
        for document in prompt.documents:
            if document.rows is not None:
                layout.reuse(select(document, (next(rest) == 0).nonzero()[:, 0]), at=at)
            at += document.length
        plan = layout.compute(prompt.question, at=at).plan()
        return [q.float().mean(1) for q in probe.queries(plan, layers)]

    def _asks(self, prompt: Prompt, document: DocumentCache, probe: Probe, layers: range) -> list[Tensor]:
        """The mean query of a document's last tokens within it, (heads, head_dim) per layer."""
        last = torch.zeros(document.length, dtype=torch.bool).index_fill(0, document.offsets[-self.local :], True)
        plan = Layout(prompt).reuse(document, last, at=0).plan()
        return [q.float().mean(1) for q in probe.queries(plan, layers)]


def personal(asked: Tensor, own: Sequence[Tensor]) -> list[Tensor]:
    """Each document's query: the question's plus the mean of the others' own, each weighed by |cosine|, per head."""
    weighed = torch.stack([torch.cosine_similarity(q, asked, dim=-1).abs()[:, None] * q for q in own])
    return [asked + (weighed.sum(0) - w) / max(1, len(own) - 1) for w in weighed]


def inner(keys: Tensor, query: Tensor) -> Tensor:
    """Keys (kv_heads, rows, head_dim) times a query (heads, head_dim), summed over heads, (rows,)."""
    grouped = query.view(len(keys), -1, query.shape[-1]).sum(1)
    return torch.einsum("hrd,hd->r", keys, grouped)


def means(rows: Tensor, groups: Tensor) -> Tensor:
    """Mean of each group's rows, (groups,)."""
    empty = torch.zeros(int(groups.max()) + 1)
    return empty.index_add(0, groups, rows) / empty.index_add(0, groups, torch.ones_like(rows)).clamp(min=1)


def keep_share(scores: Tensor) -> float:
    """The share of a document's blocks to keep, from the anchors' score and the blocks', (1 + blocks,)."""
    anchor, *blocks = scores.tolist()
    low, high = min(blocks, default=anchor), max(blocks, default=anchor)
    return float((high - anchor) / (high - low)) if low < anchor <= high else 0.0


def best_blocks(found: Sequence[Sequence[Tensor]], most: float) -> list[Tensor]:
    """The blocks to keep of each document, (blocks,) bool each: as many as all shares add up to, in any of the layers.

    Where that is more than the share `most` of all blocks, fewer in every layer."""
    sizes = [len(s) - 1 for s in found[0]]
    shares = [sum(map(keep_share, scores)) / len(found) for scores in zip(*found, strict=True)]
    count = sum(int(share * size) for share, size in zip(shares, sizes, strict=True))
    orders = [torch.cat([s[1:] for s in layer]).sort(descending=True, stable=True).indices for layer in found]
    place = torch.stack([order.argsort() for order in orders]).amin(0)  # each block's best among the layers, 0 is first
    limit = round(most * len(place))
    count = min([count, *place.sort().values[limit : limit + 1].tolist()])
    return list(torch.split_with_sizes(place < count, sizes))

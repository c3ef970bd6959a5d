"""Which tokens of a document depend most on what stands before it, found once, when it is encoded.

CacheTune (arXiv 2605.24022) selects offline too, by the frequencies of a token's features; here the document is encoded a
second time behind a neutral text, and its places are ordered by how far their keys and values have moved in all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvilt.model.model import Model
from kvilt.rows.rows import whole
from kvilt.types import DocumentCache, Encoding

NEUTRAL = """The library opens at nine in the morning and closes at six in the evening. Members may borrow up to ten books at \
a time, for three weeks. Books that are late cost a small fee for every day.
A river begins high in the mountains, where snow melts in spring. It passes two villages and an old mill, grows wider in the \
plain, and reaches the sea near a harbour with a white lighthouse.
"""


def ranked(model: Model, caches: Sequence[DocumentCache], encoding: Encoding, neutral: Tensor) -> list[DocumentCache]:
    """Documents as they were encoded, with the order of their places; `neutral` are the ids of the text, (tokens,)."""
    free = model.context_length - max(len(c.tokens) for c in caches)
    before = (*encoding.before, *neutral[: max(0, free)].tolist())
    again = model.encode([c.placed_tokens for c in caches], Encoding(before=before))
    return [replace(c, order=_order(c, other)) for c, other in zip(caches, again, strict=True)]


def _order(alone: DocumentCache, behind: DocumentCache) -> Tensor:
    """Places by how much their rows have moved, the furthest first, (places,)."""
    mine, other = alone.rows, behind.rows
    assert mine is not None
    assert other is not None
    moved = torch.zeros(mine.shape[2])
    for layer in range(mine.shape[0]):
        before, after = (whole(rows, slice(layer, layer + 1))[0].float() for rows in (mine, other))
        size = after.square().sum((1, 3)).clamp(min=1e-12)  # (keys and values, rows)
        moved += ((before - after).square().sum((1, 3)) / size).sum(0)
    return alone.offsets[moved.sort(descending=True, stable=True).indices]

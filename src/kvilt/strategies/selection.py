"""What methods that recompute a share of the documents' tokens have in common.

They run a cheap probe pass, score every token, and compute the best ones at their places in the prompt, in one pass through
all layers with the question. Papers that compute "layer 0 for all tokens" first get the same: keys and values of layer 0
depend on a token and its position alone, so those of a moved document are exact already, and no selected token reads more
of layer 0 than that. A document that is the prompt's exact prefix is never recomputed.

A score is a tensor over the places of all documents, one document after another, (places,)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor

from kvilt.errors import SpecError
from kvilt.plan import Layout, Plan
from kvilt.strategies.base import Plain, Probe, begin, has_exact_prefix, reuse_all
from kvilt.types import ModelInfo, Prompt


@dataclass(frozen=True)
class Selective(Plain):
    """A method that recomputes the share `ratio` of the tokens that could be, those with the highest score."""

    ratio: float = 0.15
    depth: int = field(default=1, repr=False, compare=False, kw_only=True)  # layers of the model

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise SpecError(f"option ratio wants a share from 0 to 1, not {self.ratio}.")

    def bind(self, info: ModelInfo) -> Self:
        """Resolve the sink; note how deep the model is."""
        return replace(super().bind(info), depth=info.num_layers)

    def scores(self, prompt: Prompt, probe: Probe) -> Tensor:
        """How much each place of the documents is worth computing, (places,)."""
        raise NotImplementedError

    def select(self, prompt: Prompt, probe: Probe) -> Tensor:
        """The places to compute, (places,) bool; nothing is looked at where that decides nothing."""
        if self.ratio == 1:
            return recomputable(prompt)
        among = candidates(prompt)
        count = share(self.ratio, among)
        if count in (0, int(among.sum())):
            return among & (count > 0)
        return top(self.scores(prompt, probe), among, count)

    def plan(self, prompt: Prompt, probe: Probe) -> Plan:
        """The selected tokens and the question are computed, all else is reused."""
        return lay(prompt, self.select(prompt, probe)).ask().plan()


def recomputable(prompt: Prompt) -> Tensor:
    """The places of stored documents that recomputing can make better, (places,) bool.

    No learned vectors, and not the prompt's exact prefix; places whose rows a press has dropped are among them."""
    masks = [(d.placed_tokens >= 0) & (d.rows is not None) for d in prompt.documents]
    if has_exact_prefix(prompt):
        masks[0] = torch.zeros_like(masks[0])
    return torch.cat([torch.zeros(0, dtype=torch.bool), *masks])


def candidates(prompt: Prompt) -> Tensor:
    """The recomputable places that have a row to be better than, (places,) bool."""
    stored = [s.stored for s in reuse_all(prompt).segments[1:]]
    return recomputable(prompt) & torch.cat([torch.zeros(0, dtype=torch.bool), *stored])


def share(ratio: float, among: Tensor) -> int:
    """A share of the marked places as a count, rounded to the nearest."""
    return round(ratio * int(among.sum()))


def top(score: Tensor, among: Tensor, count: int) -> Tensor:
    """The `count` places with the highest score among the marked ones; of equals the earlier. (places,) bool."""
    order = score.float().masked_fill(~among, -torch.inf).sort(descending=True, stable=True).indices
    return torch.zeros_like(among).index_fill(0, order[:count], True)


def split(prompt: Prompt, places: Tensor) -> list[Tensor]:
    """A tensor over all places, cut into the documents' own parts, (length,) each."""
    return list(torch.split_with_sizes(places, [d.length for d in prompt.documents]))


def lay(prompt: Prompt, fresh: Tensor) -> Layout:
    """System part and documents one after the other, the marked places computed."""
    layout = begin(prompt)
    for document, marks in zip(prompt.documents, split(prompt, fresh), strict=True):
        layout.reuse(document, marks)
    return layout


def asked(prompt: Prompt, probe: Probe, layers: range, pool: Literal["mean", "norm"] = "mean") -> Tensor:
    """Attention that the documents get from the question over the reused caches, mean over layers, (places,)."""
    plan = reuse_all(prompt).ask().plan()
    rows = probe.attention(plan, layers, pool, last=len(prompt.question)).mean(0)  # (rows,)
    found = [rows.new_zeros(s.length) for s in plan.segments]
    for values, segment, base in zip(found, plan.segments, plan.bases, strict=True):
        values[segment.places] = rows[base : base + len(segment.places)]
    return torch.cat([rows[:0], *found[1 : 1 + len(prompt.documents)]])


def layer_range(text: str, depth: int, default: tuple[float, float]) -> range:
    """The layers "first-last", or from one share of the depth to another; cut to the model's depth."""
    first, _, last = text.partition("-")
    if text and not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise SpecError(f"option layers wants a range like 22-25, not {text!r}.")
    ends = (int(first), int(last)) if text else [round(share * depth) for share in default]
    return range(min(ends[0], depth - 1), min(ends[1], depth - 1) + 1)

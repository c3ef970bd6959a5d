"""What a strategy may look at before it decides, and what looking has cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from kvilt.model.attention import Hook, using, weights
from kvilt.model.begun import decoder_layers, entering
from kvilt.model.model import Model
from kvilt.model.placed import PlacedCache, StopAtLayer
from kvilt.plan import Begun, Plan
from kvilt.types import DocumentCache, Encoding, ModelInfo

Pool = Literal["mean", "max", "norm"]
CHUNK = 64  # computed tokens whose attention is held at a time
Look = Callable[[int, Tensor, Tensor, Tensor | None, float | None], Tensor]  # layer, query, key, mask, scale


class ModelProbe:
    """Runs plans in part for a strategy. `charged` adds up what that took, in units of full recompute.

    A pass stops in the highest layer asked for, once that layer's keys and values (`layers`) or its attention are there."""

    def __init__(self, model: Model, info: ModelInfo) -> None:
        self.model, self.info, self.charged = model, info, 0.0
        self._begun: Begun | None = None

    def layers(self, plan: Plan, count: int) -> list[DocumentCache]:
        """What the lowest `count` layers hold for each of the plan's segments, keys moved back to position 0."""
        count = min(count, self.info.num_layers)
        key = self.model.key(plan.computed_tokens, Encoding(), f"probe of {count} layers")
        second = decoder_layers(self.model.hf)[1][min(1, self.info.num_layers - 1)]
        with torch.no_grad(), entering(second) as states, self._run(plan, count - 1, None, stop=count) as placed:
            if count > 1 and plan.begun is None:
                rows = plan.computed_rows
                kept = placed.buffer[:1, :, :, rows.to(placed.buffer.device)]
                self._begun = Begun(states[0][0], kept, plan.positions[rows], 1 / self.info.num_layers)
            return [placed.seen(s, base, count, key) for s, base in zip(plan.segments, plan.bases, strict=True)]

    def begun(self, plan: Plan) -> Plan:
        """The plan without layer 0's work where the first look through `layers` has done it for all its computed tokens.

        Right for plans that place the same tokens as that look: what layer 0 gives depends on tokens and positions alone."""
        return replace(plan, begun=self._begun and self._begun.at(plan.positions[plan.computed_rows]))

    def attention(self, plan: Plan, layers: Sequence[int], pool: Pool = "mean", last: int | None = None) -> Tensor:
        """How much attention every row of the plan gets in some layers, (layers, rows) float32.

        Of the last `last` computed tokens (default: all), pooled over them and the heads: "mean", "max", or "norm", the
        L2 norm over tokens of the mean over heads."""

        def look(_: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
            return received(query, key, mask, scaling, pool, last)

        return torch.stack(self._watch(plan, layers, look))

    def queries(self, plan: Plan, layers: Sequence[int]) -> list[Tensor]:
        """The plan's computed tokens' queries in some layers, moved to position 0, (heads, computed, head_dim) each."""
        back = -plan.positions[plan.computed_rows]
        return self._watch(plan, layers, lambda _, query, *__: self.model.rope.move(query[0].cpu(), back))

    def seconds(self, plan: Plan) -> float:
        """Predicted seconds to the plan's first token, from rates measured once per model; not charged."""
        return self.model.pace.seconds(self.model, plan, self.info.linear_cost)

    def keys(self, cache: DocumentCache, layer: int) -> Tensor:
        """A document's stored keys of a layer, each moved to position 0, (kv_heads, rows, head_dim) float32.

        Not charged: a rotation per row, thousands of times cheaper than computing one."""
        assert cache.layers is not None
        return self.model.rope.move(cache.layers.fetch(layer, "keys").float().cpu(), -cache.offsets)

    def _watch(self, plan: Plan, layers: Sequence[int], look: Look) -> list[Tensor]:
        wanted = sorted({layer % self.info.num_layers for layer in layers})
        found: dict[int, Tensor] = {}

        def hook(layer: int, query: Tensor, key: Tensor, _: Tensor, mask: Tensor | None, scaling: float | None) -> None:
            if layer in wanted:
                found[layer] = look(layer, query, key, mask, scaling).cpu()
            if layer == wanted[-1]:
                raise StopAtLayer

        with torch.no_grad(), self._run(plan, wanted[-1], hook):
            pass
        return [found[layer] for layer in wanted]

    @contextmanager
    def _run(self, plan: Plan, top: int, hook: Hook | None, stop: int | None = None) -> Iterator[PlacedCache]:
        """Run a plan up to the queries, keys and values of layer `top`; its rows are there until the context ends."""
        depth = top + self.info.projection_share - (len(plan.begun.rows) if plan.begun else 0)
        self.charged += replace(plan, begun=None).charged(self.info.linear_cost) * depth / self.info.num_layers
        placed = PlacedCache(plan, self.model.pool.take(len(plan.positions)), self.model.rope, stop=stop)
        try:
            with suppress(StopAtLayer), using(hook):
                self.model.forward(plan, placed, logits_to_keep=1)
            yield placed
        finally:
            self.model.pool.give(placed.buffer)


def received(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None, pool: Pool, last: int | None = None
) -> Tensor:
    """Attention that every row gets from the last `last` computed tokens, pooled as `ModelProbe.attention` says, (rows,)."""
    computed, rows = query.shape[2], key.shape[2]
    count = computed if last is None else min(last, computed)
    out = torch.zeros(rows, device=query.device)
    for first in range(computed - count, computed, CHUNK):
        end = min(first + CHUNK, computed)
        seen = key if mask is not None else key[:, :, : rows - computed + end]
        part = weights(query[:, :, first:end], seen, None if mask is None else mask[..., first:end, :], scaling)
        width = part.shape[-1]
        if pool == "max":
            out[:width] = torch.maximum(out[:width], part.amax((0, 1)))
        else:
            out[:width] += part.mean(0).square().sum(0) if pool == "norm" else part.mean(0).sum(0) / count
    return out.sqrt() if pool == "norm" else out

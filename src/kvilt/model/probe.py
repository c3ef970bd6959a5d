"""Probe passes: what a strategy may ask of the model before it decides, and what that has cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvilt.model.attention import Hook, using, weights
from kvilt.model.model import Model
from kvilt.model.placing import PlacedCache, StopAtLayer
from kvilt.plan import Plan
from kvilt.rows.rows import whole
from kvilt.types import DocumentCache, Encoding, ModelInfo

Pool = Literal["mean", "max", "norm"]
CHUNK = 64  # computed tokens whose attention is held at a time
Watch = Callable[[Tensor, Tensor, Tensor | None, float | None], Tensor]  # query, key, mask, scale


@dataclass(eq=False)
class ModelProbe:
    """Runs plans in part for a strategy.

    `charged` adds up what that took, in units of full recompute, `bytes_loaded` the bytes of stored rows that were read. A
    pass stops in the highest layer asked for, once that layer's keys and values (`layers`) or its attention are there."""

    model: Model
    info: ModelInfo
    charged: float = 0.0
    bytes_loaded: int = 0

    def layers(self, plan: Plan, count: int) -> list[DocumentCache]:
        """What the lowest `count` layers hold for each of the plan's segments, as caches of their own."""
        count = min(count, self.info.num_layers)
        key = self.model.key(plan.computed_tokens, Encoding(), f"probe of {count} layers")
        with self._pass(plan, count - 1, None, stop=count) as placed:
            return [placed.taken(s, base, count, key) for s, base in zip(plan.segments, plan.bases, strict=True)]

    def attention(self, plan: Plan, layers: Sequence[int], pool: Pool = "mean", last: int | None = None) -> Tensor:
        """How much attention every row of the plan gets in some layers, (layers, rows) float32.

        Of the last `last` computed tokens (default: all), pooled over them and the heads: "mean", "max", or "norm", the
        L2 norm over tokens of the mean over heads."""

        def watch(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
            return received(query, key, mask, scaling, pool, last)

        return torch.stack(self._watched(plan, layers, watch))

    def queries(self, plan: Plan, layers: Sequence[int]) -> list[Tensor]:
        """The plan's computed tokens' queries in some layers without rotation, (heads, computed, head_dim) each."""
        rotation = self.model.rotation
        angles = rotation.angles(plan.positions[plan.computed_rows], torch.device("cpu"))
        return self._watched(plan, layers, lambda query, *_: rotation.rotate(query[0].cpu(), angles, back=True))

    def keys(self, cache: DocumentCache, layer: int) -> Tensor:
        """A document's stored keys of a layer, without rotation, (kv_heads, rows, head_dim) float32. Nothing is computed."""
        rows = cache.rows
        if rows is None:
            raise ValueError("a document that was tokenised only has no keys")
        self.bytes_loaded += rows.nbytes // rows.shape[0]
        return whole(rows, slice(layer, layer + 1))[0, 0].float()

    def _watched(self, plan: Plan, layers: Sequence[int], watch: Watch) -> list[Tensor]:
        wanted = sorted({layer % self.info.num_layers for layer in layers})
        seen: dict[int, Tensor] = {}

        def hook(layer: int, query: Tensor, key: Tensor, _: Tensor, mask: Tensor | None, scaling: float | None) -> None:
            if layer in wanted:
                seen[layer] = watch(query, key, mask, scaling).cpu()
            if layer == wanted[-1]:
                raise StopAtLayer

        with torch.no_grad(), self._pass(plan, wanted[-1], hook):
            pass
        return [seen[layer] for layer in wanted]

    @contextmanager
    def _pass(self, plan: Plan, top: int, hook: Hook | None, stop: int | None = None) -> Iterator[PlacedCache]:
        """Run a plan up to the queries, keys and values of layer `top`; its rows are there until the context ends."""
        depth = top + self.info.projection_share
        self.charged += plan.charged(self.info.linear_cost) * depth / self.info.num_layers
        with self.model.placed(plan, stop=stop, depth=top + 1) as placed:
            self.bytes_loaded += placed.bytes_loaded * (top + 1) // self.info.num_layers
            with suppress(StopAtLayer), using(hook):
                self.model.forward(plan, placed, 1)
            yield placed


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

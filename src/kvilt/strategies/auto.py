"""The best strategy that a model has weights for: a default for those who do not want to choose."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

from kvilt.plan import Plan
from kvilt.strategies.anchors import Anchors
from kvilt.strategies.base import Probe, Strategy, beside
from kvilt.strategies.block import BlockAttention
from kvilt.strategies.kvlink import KVLink, LinkTokens
from kvilt.strategies.writer import Writer
from kvilt.types import ModelInfo, Prompt

UNTRAINED = BlockAttention(sink="system")  # see docs/strategies.md for the questions this was chosen on


@dataclass(frozen=True)
class Auto(Strategy):
    """A writer, or KVLink (or anchors), where its files lie beside the model's weights, else the best without training."""

    method: Strategy | None = field(default=None, repr=False, compare=False, kw_only=True)

    def bind(self, info: ModelInfo) -> Self:
        """Choose, and make the chosen strategy ready."""
        written = beside("", info, "writer.safetensors")
        method = (Writer() if written else self._chosen(LinkTokens.trained(info))).bind(info)
        return replace(self, encoding=method.encoding, method=method)

    def _chosen(self, trained: LinkTokens | None) -> Strategy:
        if trained is None:
            return UNTRAINED
        links = len(trained.ids[0]) if trained.ids else 0
        return Anchors(links=links) if trained.chunk else KVLink(links=links)

    def plan(self, prompt: Prompt, probe: Probe) -> Plan:
        """The chosen strategy's plan, and which that is."""
        method = self.method or UNTRAINED
        return replace(method.plan(prompt, probe), note=str(method))

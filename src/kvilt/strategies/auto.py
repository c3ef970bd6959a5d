"""The best strategy that a model has weights for: a default for those who do not want to choose."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

from kvilt.plan import Plan
from kvilt.strategies.base import Probe, Strategy
from kvilt.strategies.block import BlockAttention
from kvilt.strategies.kvlink import KVLink, LinkTokens
from kvilt.types import ModelInfo, Prompt

UNTRAINED = BlockAttention(sink="system")  # see docs/strategies.md for the questions this was chosen on


@dataclass(frozen=True)
class Auto(Strategy):
    """KVLink where trained link tokens lie beside the model's weights, else the best strategy without training."""

    method: Strategy | None = field(default=None, repr=False, compare=False, kw_only=True)

    def bind(self, info: ModelInfo) -> Self:
        """Choose, and make the chosen strategy ready."""
        trained = LinkTokens.described(info)
        chosen = UNTRAINED if trained is None else KVLink(links=len(trained.ids[0]) if trained.ids else 0)
        method = chosen.bind(info)
        return replace(self, encoding=method.encoding, method=method)

    def plan(self, prompt: Prompt, probe: Probe) -> Plan:
        """The chosen strategy's plan, and which that is."""
        method = self.method or UNTRAINED
        return replace(method.plan(prompt, probe), note=str(method))

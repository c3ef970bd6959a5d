"""EPIC / LegoLink (arXiv 2410.15332, ICML 2025): recompute the first tokens of every document."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch

from kvilt.errors import SpecError
from kvilt.plan import Plan
from kvilt.strategies.base import Plain, Probe, begin, has_exact_prefix, sink_tokens
from kvilt.types import Encoding, ModelInfo, Prompt

LEGOLINK_0_SINK = "4"  # LegoLink-0 encodes behind four dummy tokens instead of recomputing


@dataclass(frozen=True)
class Epic(Plain):
    """LegoLink-k: the first `tokens` tokens of every document that is not the prompt's exact prefix are recomputed.

    LegoLink-0 recomputes nothing and encodes every document behind four BOS tokens, whose rows are dropped."""

    tokens: int = 16

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise SpecError(f"option tokens wants 0 or more, not {self.tokens}.")

    def bind(self, info: ModelInfo) -> Self:
        """Resolve the sink; LegoLink-0 has one of its own."""
        sink = LEGOLINK_0_SINK if self.tokens == 0 and self.sink == "none" else self.sink
        return replace(self, encoding=Encoding(before=sink_tokens(sink, info)))

    def plan(self, prompt: Prompt, probe: Probe) -> Plan:
        """The first tokens of every document and the question are computed."""
        layout, exact = begin(prompt), has_exact_prefix(prompt)
        for number, document in enumerate(prompt.documents):
            first = torch.arange(document.length) < self.tokens
            layout.reuse(document, fresh=None if exact and number == 0 else first)
        return layout.ask().plan()

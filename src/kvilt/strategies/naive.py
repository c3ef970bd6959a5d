"""Reuse without any repair: the "no recompute" control of the papers."""

from __future__ import annotations

from dataclasses import dataclass

from kvilt.plan import Plan
from kvilt.strategies.base import Probe, Strategy, begin
from kvilt.types import Prompt


@dataclass(frozen=True)
class Naive(Strategy):
    """Documents encoded with nothing in front, moved to their places, on a model that was never trained for it."""

    def plan(self, prompt: Prompt, probe: Probe) -> Plan:
        """System and documents are reused, the question is computed."""
        layout = begin(prompt)
        for document in prompt.documents:
            layout.reuse(document)
        return layout.ask().plan()

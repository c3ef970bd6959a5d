"""Reuse without any repair: the "no recompute" control of the papers."""

from __future__ import annotations

from dataclasses import dataclass

from kvilt.plan import Plan
from kvilt.strategies.base import Probe, Strategy, reuse_all
from kvilt.types import Prompt


@dataclass(frozen=True)
class Naive(Strategy):
    """Documents encoded with nothing in front, moved to their places, on a model that was never trained for it."""

    def plan(self, prompt: Prompt, probe: Probe) -> Plan:
        """System and documents are reused, the question is computed."""
        return reuse_all(prompt).ask().plan()

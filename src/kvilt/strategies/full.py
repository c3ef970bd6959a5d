"""Full recompute: the reference that every method is measured against."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvilt.plan import Layout, Plan
from kvilt.strategies.base import Probe, Strategy
from kvilt.types import Encoding, Prompt


@dataclass(frozen=True)
class FullRecompute(Strategy):
    """Compute the whole prompt with ordinary attention; reuse nothing."""

    encoding: Encoding | None = field(default=None, repr=False, compare=False, kw_only=True)

    def plan(self, prompt: Prompt, probe: Probe) -> Plan:
        """Everything is computed."""
        return recompute(prompt)


def recompute(prompt: Prompt) -> Plan:
    """The plan of the ordinary prompt; what stands around documents that were encoded is left out."""
    layout = Layout(prompt).compute(prompt.system.placed_tokens, name="system")
    for document in prompt.documents:
        layout.compute(document.own_tokens, name="document")
    return layout.ask().plan()

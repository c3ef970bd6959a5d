"""Block-Attention (arXiv 2409.15355): every document attends to itself, the question to everything. Also KVLink-0."""

from __future__ import annotations

from dataclasses import dataclass

from kvilt.plan import Plan
from kvilt.strategies.base import Plain, Probe, reuse_all
from kvilt.types import Prompt


@dataclass(frozen=True)
class BlockAttention(Plain):
    """Reuse every document at its place in the prompt; best with weights fine-tuned for it (section 2.3 of the paper)."""

    def plan(self, prompt: Prompt, probe: Probe) -> Plan:
        """System and documents are reused, the question is computed."""
        return reuse_all(prompt).ask().plan()

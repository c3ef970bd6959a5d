"""Block-Attention (arXiv 2409.15355): every document attends to itself, the question to everything. Also KVLink-0."""

from __future__ import annotations

from dataclasses import dataclass

from kvilt.strategies.base import Plain


@dataclass(frozen=True)
class BlockAttention(Plain):
    """Reuse every document at its place in the prompt; best with weights fine-tuned for it (section 2.3 of the paper)."""

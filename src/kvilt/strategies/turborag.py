"""TurboRAG (arXiv 2410.07590, EMNLP 2025): documents between markers, encoded alone, on weights fine-tuned for it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Self

from kvilt.errors import SpecError
from kvilt.plan import Plan
from kvilt.strategies.base import Probe, Strategy, begin
from kvilt.types import Encoding, ModelInfo, Prompt

POSITIONS = ("reordered", "composite")

logger = logging.getLogger("kvilt")


@dataclass(frozen=True)
class TurboRAG(Strategy):
    """A start and an end marker are encoded and stored with every document; nothing but the question is computed.

    `start` and `end` are token ids (default: the tokenizer's first two reserved tokens). `positions="reordered"` places
    documents one after the other, "composite" lets each begin right after the system part (section 3 of the paper)."""

    start: int | None = None
    end: int | None = None
    positions: str = "reordered"

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise SpecError(f"option positions wants {' or '.join(POSITIONS)}, not {self.positions!r}.")

    @property
    def shares_positions(self) -> bool:
        return self.positions == "composite"

    def bind(self, info: ModelInfo) -> Self:
        """Resolve the markers."""
        given, free = (self.start, self.end), info.reserved[:2]
        if None in given and len(free) < 2:
            raise SpecError("turborag: this tokenizer has no two reserved tokens for markers; give start= and end=.")
        start, end = (own if own is not None else other for own, other in zip(given, free or given, strict=True))
        for name, marker in (("start", start), ("end", end)):
            if marker is None or not 0 <= marker < info.vocab_size:
                raise SpecError(f"option {name} wants a token id below {info.vocab_size}, not {marker}.")
        assert start is not None
        assert end is not None
        logger.warning("turborag: only a model that was fine-tuned with these markers knows what they mean")
        return replace(self, start=start, end=end, encoding=Encoding((start,), (end,), keep=True))

    def plan(self, prompt: Prompt, probe: Probe) -> Plan:
        """Documents are reused with their markers; those never stored, and the question, are computed.

        Markers are no part of the ordinary prompt that costs are counted in. With composite positions a document that
        is never stored stands after the others."""
        layout, composite = begin(prompt), self.positions == "composite"
        for document in sorted(prompt.documents, key=lambda d: composite and d.rows is None):
            if document.rows is None:
                around = (self.encoding or Encoding()).cache(document.placed_tokens, document.key)
                layout.compute(around.tokens, name="document")
            else:
                layout.reuse(document, at=prompt.system.length if composite else None)
        markers = 2 * sum(d.rows is not None for d in prompt.documents)
        plan = layout.ask().plan()
        return replace(plan, baseline=plan.baseline - markers)

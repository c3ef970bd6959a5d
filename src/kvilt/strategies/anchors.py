"""AnLLM's anchors (arXiv 2402.07616, ACL 2024) as KVLink has them: of every chunk of a document only anchor rows are kept."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Self

from kvilt.errors import SpecError
from kvilt.strategies.kvlink import DESCRIPTION, KVLink, LinkTokens
from kvilt.types import Encoding, ModelInfo

CHUNK, ANCHORS = 100, 25  # KVLink's, keeping a quarter; for models that say nothing of their own
TRAIN = "Train one for yours: kvilt train kvlink --set anchors=N --set chunk=N."

logger = logging.getLogger("kvilt")


@dataclass(frozen=True)
class Anchors(KVLink):
    """After every `chunk` tokens of a document stand `anchors` anchor tokens; their rows alone are stored.

    While a document is encoded a token sees its own chunk and earlier anchors; the question and the `links` link tokens
    see anchors only. Anchors keep the places they had among the document's tokens. Needs a checkpoint trained for it; 0
    stands for the numbers it was trained with."""

    links: int = 0
    chunk: int = 0
    anchors: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.chunk, self.anchors) < 0:
            raise SpecError(f"options chunk and anchors want 0 or more, not {self.chunk} and {self.anchors}.")

    def bind(self, info: ModelInfo) -> Self:
        """Find the checkpoint's anchor and link tokens."""
        return self.holding(super().bind(info).tokens)

    def holding(self, tokens: LinkTokens) -> Self:
        """The strategy with these tokens. Raises SpecError when they were trained for other anchors or chunks."""
        there = replace(self, chunk=tokens.chunk, anchors=len(tokens.anchors), tokens=tokens)
        if not tokens.chunk or self.chunk not in (0, there.chunk) or self.anchors not in (0, there.anchors):
            raise SpecError(f"{self!r}: this checkpoint has chunk={there.chunk}, anchors={there.anchors}. {TRAIN}")
        return replace(there, encoding=Encoding(chunk=tokens.chunk, anchors=tokens.anchors))

    def _undescribed(self, info: ModelInfo) -> LinkTokens:
        logger.warning("anchors: no %s beside this model: its anchor tokens are untrained", DESCRIPTION)
        wanted = self.anchors or ANCHORS
        links = LinkTokens.of(replace(info, reserved=info.reserved[:-wanted]), self.links)
        free = links.free(info.reserved)[:wanted]
        if len(free) < wanted:
            raise SpecError(f"anchors={wanted}: this tokenizer has {len(free)} reserved tokens for them. {TRAIN}")
        return replace(links, anchors=free, chunk=self.chunk or CHUNK)

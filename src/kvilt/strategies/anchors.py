"""AnLLM's anchors (arXiv 2402.07616, ACL 2024) as KVLink has them: of every chunk of a document only anchor rows are kept."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Self

from kvilt.errors import SpecError
from kvilt.strategies.kvlink import DESCRIPTION, KVLink, LinkTokens
from kvilt.types import Encoding, ModelInfo

CHUNK, ANCHORS = 100, 25  # KVLink's, keeping a quarter; for models that say nothing of their own

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
        for name in ("chunk", "anchors"):
            if getattr(self, name) < 0:
                raise SpecError(f"option {name} wants 0 or more, not {getattr(self, name)}.")

    def bind(self, info: ModelInfo) -> Self:
        """Find the checkpoint's anchor and link tokens."""
        return self.holding(super().bind(info).tokens)

    def holding(self, tokens: LinkTokens) -> Self:
        """The strategy with these tokens. Raises SpecError when they were trained for other anchors or chunks."""
        trained = {"chunk": tokens.chunk, "anchors": len(tokens.anchors)}
        for name, value in trained.items():
            if not value:
                raise SpecError(f"anchors: this checkpoint was trained without anchors. {_train(self)}")
            if getattr(self, name) not in (0, value):
                raise SpecError(
                    f"anchors:{name}={getattr(self, name)}: this checkpoint was trained with {name}={value}."
                )
        encoding = Encoding(chunk=tokens.chunk, anchors=tokens.anchors)
        return replace(self, tokens=tokens, encoding=encoding, chunk=tokens.chunk, anchors=len(tokens.anchors))

    def _tokens(self, info: ModelInfo) -> LinkTokens:
        if (described := LinkTokens.described(info)) is not None:
            return described
        logger.warning("anchors: no %s beside this model: its anchor tokens are untrained", DESCRIPTION)
        wanted = self.anchors or ANCHORS
        links = LinkTokens.of(replace(info, reserved=info.reserved[:-wanted]), self.links)
        free = links.free(info.reserved)[:wanted]
        if len(free) < wanted:
            raise SpecError(
                f"anchors:anchors={wanted}: this tokenizer has {len(free)} reserved tokens for them. {_train(self)}"
            )
        return replace(links, anchors=free, chunk=self.chunk or CHUNK)


def _train(wanted: Anchors) -> str:
    chunk, anchors = wanted.chunk or CHUNK, wanted.anchors or ANCHORS
    return f"Train it for them first: kvilt train kvlink --set anchors={anchors} --set chunk={chunk}."

"""Multi-News (Fabbri et al. 2019): JSON rows of {document, summary}, or alexfabbri/multi_news on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from kvilt.lab.evaluate.tasks.base import Sample, require
from kvilt.lab.evaluate.tasks.summary import SummaryTask
from kvilt.types import Document

_BETWEEN = "|||||"


@dataclass(frozen=True)
class MultiNews(SummaryTask):
    """Summaries of several articles on one event.

    `mode` is "examples" (KVLink: two examples are the documents) or "articles" (the articles are the documents)."""

    NAME: ClassVar[str] = "multinews"
    ALIASES: ClassVar[tuple[str, ...]] = ("multi", "dev", "train", "test", "val")
    HUB: ClassVar[tuple[str, str | None]] = ("alexfabbri/multi_news", None)
    FIELDS: ClassVar[tuple[str, str]] = ("document", "summary")
    KIND: ClassVar[str] = "Articles"

    split: str = "dev"
    answer_tokens: int = 300
    mode: str = "examples"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.mode in ("examples", "articles"), f"multinews: unknown mode {self.mode!r}: examples or articles.")

    def _samples(self, split: str) -> Iterator[Sample]:
        if self.mode == "examples":
            yield from super()._samples(split)
            return
        for pair in self.pairs(split):
            documents = tuple(Document(article) for article in pair.text.split("\n\n"))
            yield Sample(pair.id, "Summarise the articles above in one text.", documents, (pair.summary,))

    def clean(self, text: str) -> str:
        """The articles, an empty line between them."""
        articles = (" ".join(article.split()) for article in text.split(_BETWEEN))
        return "\n\n".join(article for article in articles if article)

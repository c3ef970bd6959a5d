"""Summaries in the manner of a few examples: Multi-News and SAMSum (Gliwa et al. 2019), from JSON rows or the hub."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from kvilt.errors import DocumentError, UserError
from kvilt.lab.evaluate.tasks.base import Sample, Task, require
from kvilt.lab.evaluate.tasks.files import Row, hub_rows, rows
from kvilt.types import Document

BETWEEN = "|||||"  # articles of Multi-News


@dataclass(frozen=True)
class Pair:
    """A text with its reference summary."""

    id: str
    text: str
    summary: str


@dataclass(frozen=True)
class SummaryTask(Task):
    """Each in-context example is a document; the text to summarise stands in the question.

    The examples come from the file `examples`, or else are the first `shots` rows, which are then not asked."""

    ALIASES: ClassVar[tuple[str, ...]] = ()
    HUB: ClassVar[tuple[str, str | None]]
    FIELDS: ClassVar[tuple[str, str]]  # of the text and of its summary
    KIND: ClassVar[str]  # what a text is called in the prompt

    path: str | None = None
    shots: int = 2
    examples: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.shots > 0, f"{self.NAME}: shots must be at least 1; the examples are the documents.")

    @property
    def metrics(self) -> tuple[str, ...]:
        """ROUGE-L, as in KVLink."""
        return ("rouge_l",)

    def _samples(self, split: str) -> Iterator[Sample]:
        pairs = self.pairs(split)
        source = pairs if self.examples is None else self._read(rows(self.examples, self.ALIASES, "train"))
        shots = list(itertools.islice(source, self.shots))
        if len(shots) < self.shots:
            raise UserError(f"{self.NAME}: found {len(shots)} rows for {self.shots} examples. Set shots= lower.")
        documents = tuple(Document(f"{self._asked(shot)} {shot.summary}") for shot in shots)
        for pair in pairs:
            rule = f"Summarise the {self.KIND.lower()} below in the manner of the examples above."
            yield Sample(pair.id, f"{rule}\n\n{self._asked(pair)}", documents, (pair.summary,))

    def pairs(self, split: str) -> Iterator[Pair]:
        """All texts of a split with their summaries."""
        return self._read(rows(self.path, self.ALIASES, split) if self.path else hub_rows(*self.HUB, split))

    def _read(self, source: Iterator[Row]) -> Iterator[Pair]:
        text, summary = self.FIELDS
        for row in source:
            wanted = _text(row, summary, self.NAME).lstrip("– ").strip()
            yield Pair(row.name(self.NAME), self.clean(_text(row, text, self.NAME)), wanted)

    @abc.abstractmethod
    def clean(self, text: str) -> str:
        """The text as it stands in the prompt."""

    def _asked(self, pair: Pair) -> str:
        return f"{self.KIND}:\n{pair.text}\nSummary:"


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
        articles = (" ".join(article.split()) for article in text.split(BETWEEN))
        return "\n\n".join(article for article in articles if article)


@dataclass(frozen=True)
class SAMSum(SummaryTask):
    """Summaries of chats, twenty examples in context."""

    NAME: ClassVar[str] = "samsum"
    ALIASES: ClassVar[tuple[str, ...]] = ("samsum", "dev", "train", "test", "val")
    HUB: ClassVar[tuple[str, str | None]] = ("knkarthick/samsum", None)
    FIELDS: ClassVar[tuple[str, str]] = ("dialogue", "summary")
    KIND: ClassVar[str] = "Dialogue"

    answer_tokens: int = 128
    shots: int = 20

    def clean(self, text: str) -> str:
        """Plain line ends."""
        return text.replace("\r\n", "\n").strip()


def _text(row: Row, name: str, task: str) -> str:
    value: Any = row.data.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DocumentError(f"{row.where}: {task} needs a text in the field {name!r}, found {value!r}.")
    return value

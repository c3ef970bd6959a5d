"""What every generator of the built-in world produces: documents with the questions they answer."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Page:
    """One document; later parts of a longer text have no title."""

    title: str
    text: str

    def render(self) -> str:
        """The text that is tokenised alone, exactly as the engine does it."""
        return f"{self.title}\n{self.text}\n" if self.title else f"{self.text}\n"


@dataclass(frozen=True)
class Question:
    """One question over the first `after` pages of a sample, with the sentence that answers it."""

    text: str
    answer: str
    value: str  # what a right answer must contain
    kind: str
    after: int
    pages: tuple[int, ...] = ()  # where the facts of the answer stand


@dataclass
class Sample:
    """Consecutive pages and the questions that may be asked after them."""

    pages: list[Page] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)

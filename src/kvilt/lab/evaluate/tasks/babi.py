"""bAbI (Weston et al. 2015): the public text files (en-10k), a story's statements cut into documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kvilt.errors import DocumentError, UserError
from kvilt.lab.evaluate.tasks.base import Sample, Task, require
from kvilt.lab.evaluate.tasks.files import find
from kvilt.rows.files import text_lines
from kvilt.types import Document


@dataclass(frozen=True)
class Babi(Task):
    """One of the twenty tasks; a document is `sentences` statements."""

    NAME: ClassVar[str] = "babi"
    ORDERED: ClassVar[bool] = True  # the story's own order

    answer_tokens: int = 32
    path: str | None = None
    task: int = 1
    sentences: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.task in range(1, 21), f"babi: task must be 1 to 20, not {self.task!r}.")
        require(self.sentences > 0, "babi: sentences must be at least 1.")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Whole words, since "no" stands in "north"."""
        return "word_accuracy", "exact", "accuracy"

    def _samples(self, split: str) -> Iterator[Sample]:
        if self.path is None:
            raise UserError("babi is read from files: give path=FOLDER of en-10k (qa1_…_test.txt, qa2_…_test.txt, …).")
        file = find(self.path, (f"qa{self.task}_",), split, (".txt", ".txt.gz"))
        yield from self._stories(file, f"{self.task}-{split}", self.task)

    def _stories(self, file: Path, prefix: str, number: int) -> Iterator[Sample]:
        story: dict[int, str] = {}  # number of the line -> statement
        stories = asked = 0
        for at, line in enumerate(text_lines(file), 1):
            if not line.strip():
                continue
            place, text = _numbered(line, f"{file}, line {at}")
            if place == 1:
                story, stories = {}, stories + 1
            if "\t" not in text:
                story[place] = text
                continue
            asked += 1
            told = {"kind": number, "group": f"{prefix}-story-{stories}"}
            yield self._sample(f"{prefix}-{asked}", text, story, told, f"{file}, line {at}")
        require(asked > 0, f"{file} holds no question (a line with tabs before and after the answer).")

    def _sample(self, name: str, text: str, story: dict[int, str], told: dict[str, Any], where: str) -> Sample:
        question, answer, *rest = (part.strip() for part in text.split("\t"))
        if not question or not answer:
            raise DocumentError(f"{where}: expected question, tab, answer, tab, supporting lines.")
        if not story:
            raise DocumentError(f"{where}: a question with no statement before it.")
        cut = list(story.values())
        documents = [" ".join(cut[i : i + self.sentences]) for i in range(0, len(cut), self.sentences)]
        order = {line: i // self.sentences for i, line in enumerate(story)}
        facts = [int(s) for s in (rest[0].split() if rest else []) if s.isdigit() and int(s) in order]
        metadata = {**told, "hops": len(facts), "gold": sorted({order[fact] for fact in facts})}
        return Sample(name, question, tuple(map(Document, documents)), _spellings(answer), metadata)


def _numbered(line: str, where: str) -> tuple[int, str]:
    number, _, text = line.rstrip("\n").strip(" ").partition(" ")
    if not number.isdigit() or not text.strip():
        raise DocumentError(f"{where}: every line of bAbI begins with its number in the story.")
    return int(number), text.strip(" ")


def _spellings(answer: str) -> tuple[str, ...]:
    """An answer of several words ("milk,apple", "n,e") in the ways it may be written."""
    parts = answer.split(",")
    return (answer,) if len(parts) == 1 else (answer, ", ".join(parts), " and ".join(parts))

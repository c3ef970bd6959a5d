"""TriviaQA with retrieved passages (Joshi et al. 2017), in the JSON layout of FiD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvilt.lab.evaluate.tasks.files import Row
from kvilt.lab.evaluate.tasks.qa import Item, Passage, QATask


@dataclass(frozen=True)
class TriviaQA(QATask):
    """Trivia questions over the first ten retrieved passages, in the order of the file."""

    NAME: ClassVar[str] = "triviaqa"
    ALIASES: ClassVar[tuple[str, ...]] = ("triviaqa", "tqa", "dev", "train", "test")

    split: str = "test"
    documents: int | None = 10

    def official(self, row: Row) -> Item:
        """{id?, question, target, answers, ctxs: [{title, text, …}]}."""
        data = row.data
        passages = tuple(Passage(c.get("title"), c["text"]) for c in data["ctxs"])  # none is gold: only retrieved
        answers = dict.fromkeys([*([data["target"]] if data.get("target") else []), *data["answers"]])
        return Item(row.name(self.NAME), data["question"], tuple(answers), passages)

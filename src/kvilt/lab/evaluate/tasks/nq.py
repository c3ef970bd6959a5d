"""NaturalQuestions with the gold passage at a chosen place (Liu et al. 2023, "lost in the middle")."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from kvilt.errors import DocumentError
from kvilt.lab.evaluate.tasks.base import Sample, require
from kvilt.lab.evaluate.tasks.files import Row
from kvilt.lab.evaluate.tasks.qa import Item, Passage, QATask


@dataclass(frozen=True)
class NaturalQuestions(QATask):
    """Real questions over one gold passage and `documents - 1` distractors.

    `gold` is the place of the gold passage, from 0, or "all": every question once at every place."""

    NAME: ClassVar[str] = "nq"
    ALIASES: ClassVar[tuple[str, ...]] = ("nq",)
    ORDERED: ClassVar[bool] = True

    documents: int | None = 10
    gold: int | str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.documents is not None, "nq: documents must be a number.")
        places = range(self.documents or 0)
        given = self.gold == "all" or self.gold in places
        require(given, f"nq: gold must be 'all' or a place from 0 to {len(places) - 1}, not {self.gold!r}.")

    def official(self, row: Row) -> Item:
        """{question, answers, ctxs: [{title, text, isgold}]}."""
        data = row.data
        passages = tuple(Passage(c.get("title"), c["text"], bool(c["isgold"])) for c in data["ctxs"])
        return Item(row.name(self.NAME), data["question"], tuple(data["answers"]), passages)

    def _samples(self, split: str) -> Iterator[Sample]:
        count = self.documents or 0
        places = range(count) if self.gold == "all" else [int(self.gold)]
        for item in self.items(split):
            gold, others = self._divided(item, count)
            for place in places:
                passages = (*others[:place], gold, *others[place:])
                yield self.sample(item, passages, f"{item.id}@{place}", position=place, group=item.id)

    def _divided(self, item: Item, count: int) -> tuple[Passage, tuple[Passage, ...]]:
        """The gold passage and the first `count - 1` others."""
        gold = next((p for p in item.passages if p.gold), None)
        others = tuple(p for p in item.passages if not p.gold)[: count - 1]
        if gold is None or len(others) < count - 1:
            raise DocumentError(
                f"nq question {item.id}: needs one gold passage and {count - 1} others, "
                f"has {int(gold is not None)} and {len(others)}. Set documents= to what the file holds."
            )
        return gold, others

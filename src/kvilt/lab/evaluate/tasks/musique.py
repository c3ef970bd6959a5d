"""MuSiQue (Trivedi et al. 2022): the original JSONL, or dgslibisey/MuSiQue on the hub."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from kvilt.lab.evaluate.tasks.files import Row
from kvilt.lab.evaluate.tasks.qa import Item, Passage, QATask


@dataclass(frozen=True)
class MuSiQue(QATask):
    """Questions of two to four hops over twenty paragraphs."""

    NAME: ClassVar[str] = "musique"
    ALIASES: ClassVar[tuple[str, ...]] = ("musique",)
    HUB: ClassVar[tuple[str, str | None] | None] = ("dgslibisey/MuSiQue", None)
    REASONED_TOKENS: ClassVar[int] = 256

    def read(self, row: Row) -> Item | None:
        """A row with its hops, which its id tells ("3hop1__…")."""
        item = super().read(row)
        if item is None or not item.id[:1].isdigit() or item.id[1:4] != "hop":
            return item
        return dataclasses.replace(item, metadata={**item.metadata, "hops": int(item.id[0])})

    def official(self, row: Row) -> Item | None:
        """{id, question, answer, answer_aliases, answerable, paragraphs}; unanswerable rows are left out."""
        data = row.data
        if not data.get("answerable", True):
            return None
        answers = dict.fromkeys([data["answer"], *data.get("answer_aliases", [])])
        passages = tuple(Passage(p["title"], p["paragraph_text"], p["is_supporting"]) for p in data["paragraphs"])
        return Item(row.name(self.NAME), data["question"], tuple(answers), passages)

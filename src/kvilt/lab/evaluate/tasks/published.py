"""QA datasets in the layouts that they are published in.

HotpotQA, distractor setting (Yang et al. 2018); 2WikiMultihopQA (Ho et al. 2020); MuSiQue (Trivedi et al. 2022); TriviaQA
with retrieved passages (Joshi et al. 2017) in FiD's layout; NaturalQuestions with the gold passage at a chosen place (Liu
et al. 2023, "lost in the middle"). Hub names stand in the classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from kvilt.errors import DocumentError
from kvilt.lab.evaluate.tasks.base import Sample, require
from kvilt.lab.evaluate.tasks.files import Row
from kvilt.lab.evaluate.tasks.qa import Item, Passage, QATask, paragraphs


@dataclass(frozen=True)
class HotpotQA(QATask):
    """Two-hop questions over about ten paragraphs."""

    NAME: ClassVar[str] = "hotpotqa"
    ALIASES: ClassVar[tuple[str, ...]] = ("hotpot",)
    HUB: ClassVar[tuple[str, str | None] | None] = ("hotpotqa/hotpot_qa", "distractor")

    official = paragraphs


@dataclass(frozen=True)
class TwoWiki(QATask):
    """Multi-hop questions over ten Wikipedia paragraphs."""

    NAME: ClassVar[str] = "2wiki"
    ALIASES: ClassVar[tuple[str, ...]] = ("2wiki", "dev", "train", "test")  # the published files are dev.json, …
    HUB: ClassVar[tuple[str, str | None] | None] = ("xanhho/2WikiMultihopQA", None)

    official = paragraphs


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
            has = f"has {int(gold is not None)} and {len(others)}. Set documents= to what the file holds."
            raise DocumentError(f"nq question {item.id}: needs one gold passage and {count - 1} others, {has}")
        return gold, others

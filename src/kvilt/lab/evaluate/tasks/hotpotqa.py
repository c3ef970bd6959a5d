"""HotpotQA, distractor setting (Yang et al. 2018): the original JSON, or hotpotqa/hotpot_qa on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvilt.lab.evaluate.tasks.files import Row
from kvilt.lab.evaluate.tasks.qa import Item, QATask, paragraphs


@dataclass(frozen=True)
class HotpotQA(QATask):
    """Two-hop questions over about ten paragraphs."""

    NAME: ClassVar[str] = "hotpotqa"
    ALIASES: ClassVar[tuple[str, ...]] = ("hotpot",)
    HUB: ClassVar[tuple[str, str | None] | None] = ("hotpotqa/hotpot_qa", "distractor")

    def official(self, row: Row) -> Item:
        """{_id or id, question, answer, context, supporting_facts, type, level}."""
        return paragraphs(self.NAME, row)

"""2WikiMultihopQA (Ho et al. 2020): the original JSON, or xanhho/2WikiMultihopQA on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvilt.lab.evaluate.tasks.files import Row
from kvilt.lab.evaluate.tasks.qa import Item, QATask, paragraphs


@dataclass(frozen=True)
class TwoWiki(QATask):
    """Multi-hop questions over ten Wikipedia paragraphs."""

    NAME: ClassVar[str] = "2wiki"
    ALIASES: ClassVar[tuple[str, ...]] = ("2wiki", "dev", "train", "test")  # the published files are dev.json, …
    HUB: ClassVar[tuple[str, str | None] | None] = ("xanhho/2WikiMultihopQA", None)

    def official(self, row: Row) -> Item:
        """{_id, question, answer, context, supporting_facts, type}."""
        return paragraphs(self.NAME, row)

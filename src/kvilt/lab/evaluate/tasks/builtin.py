"""Questions about the documents that ship with the package, for the built-in model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from kvilt import builtin
from kvilt.lab.evaluate.tasks.base import Sample, Task, require

KINDS = ("one_hop", "two_hop", "chunked", "chunked_hop", "state")


@dataclass(frozen=True)
class Builtin(Task):
    """Test questions of one kind, or all: names, values and wordings were held out from training.

    `chunked` needs an earlier part of the same biography, `two_hop` and `chunked_hop` two documents, `state` the order of
    events."""

    NAME: ClassVar[str] = "builtin"
    ORDERED: ClassVar[bool] = True

    kind: str = "all"
    answer_tokens: int = 48

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("all", *KINDS)
        require(self.kind in known, f"builtin: kind must be one of {', '.join(known)}, not {self.kind!r}.")

    @property
    def metrics(self) -> tuple[str, ...]:
        """The answer must contain the value."""
        return "accuracy", "f1"

    def _samples(self, split: str) -> Iterator[Sample]:
        require(split == "test", "builtin: only the test split ships; recipes/builtin makes the others.")
        papers = builtin.documents()
        for q in builtin.questions(None if self.kind == "all" else self.kind):
            documents = tuple(papers[name] for name in q["documents"])
            yield Sample(q["id"], q["question"], documents, (q["value"],), {"kind": q["kind"]})

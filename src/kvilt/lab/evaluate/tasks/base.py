"""What a task is: samples with documents and answers, a budget of tokens, and the metrics it reports."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from kvilt.errors import UserError
from kvilt.types import Document

_SPLITS = {"train": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "test": "test"}


@dataclass(frozen=True)
class Sample:
    """One prompt with its accepted answers; `question` already holds the task's instructions."""

    id: str
    question: str
    documents: tuple[Document, ...]
    answers: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """Samples of one group belong together in the bootstrap (one question at several gold positions)."""
        return str(self.metadata.get("group", self.id))


@dataclass(frozen=True)
class Task(abc.ABC):
    """A dataset with its prompt; the fields are the options of its specification string."""

    NAME: ClassVar[str]
    VERSION: ClassVar[int] = 1  # raised whenever a prompt, a metric or the choice of samples changes
    ORDERED: ClassVar[bool] = False  # the order of the documents is part of the task

    split: str = "test"
    answer_tokens: int = 64

    def __post_init__(self) -> None:
        canonical(self.split)
        if self.answer_tokens < 1:
            raise UserError(f"{self.NAME}: answer_tokens must be at least 1, not {self.answer_tokens}.")

    @property
    def max_new_tokens(self) -> int:
        """How many tokens an answer may take."""
        return self.answer_tokens

    @property
    @abc.abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names in `kvilt.lab.evaluate.metrics.METRICS`; the first is the headline."""

    @property
    def system(self) -> str | None:
        """The paper's system text, for whoever loads the engine (`Engine.load(system=…)`)."""
        return None

    def extract(self, text: str) -> str:
        """The part of a generated text that is scored."""
        return text.strip()

    def samples(self, split: str | None = None) -> Iterator[Sample]:
        """All samples of a split ("train", "dev" or "test"), in a fixed order."""
        return self._samples(canonical(split or self.split))

    @abc.abstractmethod
    def _samples(self, split: str) -> Iterator[Sample]: ...

    @property
    def options(self) -> dict[str, Any]:
        """Every option with its value."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def label(self) -> str:
        """The name with every option that is not the default, places of files aside."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return " ".join(
            [self.NAME, *(f"{key}={value}" for key, value in given.items() if key not in ("path", "examples"))]
        )


def canonical(split: str) -> str:
    """One name for a split; "validation" and "dev(open)" are "dev"."""
    known = split_of(split)
    if known is None:
        raise UserError(f"unknown split {split!r}. Use train, dev (validation) or test.")
    return known


def split_of(name: str) -> str | None:
    """The split that a word means, or None."""
    return _SPLITS.get(name.lower().partition("(")[0].strip())


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless the condition holds."""
    if not condition:
        raise UserError(message)


def listed(text: str) -> tuple[str, ...]:
    """A word list written with commas."""
    return tuple(text.split(","))

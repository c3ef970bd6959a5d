"""What a task is: samples with documents and answers, a budget of tokens, and the metrics it reports."""

from __future__ import annotations

import abc
import random
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
        good = self.answer_tokens > 0
        require(good, f"{self.NAME}: answer_tokens must be at least 1, not {self.answer_tokens}.")

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

    @property
    def undated(self) -> bool:
        """Whether the prompt is asked without the chat template's dates."""
        return False

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
        told = (f"{key}={value}" for key, value in given.items() if key not in ("path", "examples"))
        return " ".join([self.NAME, *told])


@dataclass(frozen=True)
class Generated(Task):
    """A task whose samples are made up: `count` of each split, the same for the same `seed`."""

    count: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.count > 0, f"{self.NAME}: count must be at least 1.")

    def _samples(self, split: str) -> Iterator[Sample]:
        for number in range(self.count):
            yield self._sample(random.Random(f"{self.NAME} {split} {self.seed} {number}"), split, number)

    @abc.abstractmethod
    def _sample(self, rng: random.Random, split: str, number: int) -> Sample: ...


def canonical(split: str) -> str:
    """One name for a split; "validation" and "dev(open)" are "dev"."""
    require(split_of(split) is not None, f"unknown split {split!r}. Use train, dev (validation) or test.")
    return split_of(split) or ""


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

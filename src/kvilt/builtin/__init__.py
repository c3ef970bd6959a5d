"""The small model that ships with the package, its made-up documents and the questions about them (made by recipes/world).

Beside them: adapters for SmolLM2 and a real collection, Wikipedia paragraphs with questions (made by recipes/smollm2)."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, TypedDict

from kvilt.types import Document


class Asked(TypedDict):
    """One line of questions.jsonl: `documents` in prompt order; a right answer contains `value`."""

    id: str
    kind: str
    question: str
    answer: str
    value: str
    documents: list[str]


def model_path() -> Path:
    """The folder of the built-in model, to be loaded like any other."""
    return Path(str(files(__name__) / "model"))


class AskedOfWikipedia(TypedDict):
    """One line of wikipedia-questions.jsonl: a right answer contains one of `answers`."""

    id: str
    question: str
    answers: list[str]
    documents: list[str]


def documents() -> dict[str, Document]:
    """The shipped documents by id, in order."""
    return _papers("collection")


def wikipedia() -> dict[str, Document]:
    """Sixty paragraphs of ten Wikipedia articles by id, in order (CC BY-SA 4.0)."""
    return _papers("wikipedia")


def questions(kind: str | None = None) -> list[Asked]:
    """The shipped test questions, all or of one kind."""
    found: list[Asked] = _lines("questions")
    return [question for question in found if kind in (None, question["kind"])]


def wikipedia_questions() -> list[AskedOfWikipedia]:
    """Four questions about each article, over its six paragraphs."""
    return _lines("wikipedia-questions")


def _papers(name: str) -> dict[str, Document]:
    return {p["id"]: Document(p["text"], p["title"] or None, p["id"]) for p in _lines(name)}


def _lines(name: str) -> list[Any]:
    return [json.loads(line) for line in (files(__name__) / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]

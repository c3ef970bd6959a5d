"""The small model that ships with the package, its documents and the questions about them (made by recipes/world)."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TypedDict

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


def documents() -> dict[str, Document]:
    """The shipped documents by id, in order."""
    found = {}
    for line in (files(__name__) / "collection.jsonl").read_text(encoding="utf-8").splitlines():
        paper = json.loads(line)
        found[paper["id"]] = Document(paper["text"], paper["title"] or None, paper["id"])
    return found


def questions(kind: str | None = None) -> list[Asked]:
    """The shipped test questions, all or of one kind."""
    lines = (files(__name__) / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    found: list[Asked] = [json.loads(line) for line in lines]
    return [question for question in found if kind in (None, question["kind"])]

"""The small model that ships with the package, its made-up documents and the questions about them (made by recipes/builtin).

Beside them: adapters for SmolLM2 and a real collection, Wikipedia paragraphs with questions (made by recipes/smollm2)."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvilt.types import Document


def model_path() -> Path:
    """The folder of the built-in model, to be loaded like any other."""
    return Path(str(files(__name__) / "model"))


def documents() -> dict[str, Document]:
    """The shipped documents by id, in order."""
    return _papers("collection")


def wikipedia() -> dict[str, Document]:
    """Sixty paragraphs of ten Wikipedia articles by id, in order (CC BY-SA 4.0)."""
    return _papers("wikipedia")


def questions(kind: str | None = None) -> list[dict[str, Any]]:
    """The shipped test questions, all or of one kind: id, kind, question, documents in prompt order, answer, and `value`, which
    a right answer contains."""
    return [question for question in _lines("questions") if kind in (None, question["kind"])]


def wikipedia_questions() -> list[dict[str, Any]]:
    """Four questions about each article, over its six paragraphs: id, question, documents, and answers of which one must occur."""
    return _lines("wikipedia-questions")


def _papers(name: str) -> dict[str, Document]:
    return {p["id"]: Document(p["text"], p["title"] or None, p["id"]) for p in _lines(name)}


def _lines(name: str) -> list[Any]:
    return [json.loads(line) for line in (files(__name__) / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]

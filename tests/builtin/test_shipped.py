"""What ships: the model's files are small and complete, and the questions only name documents that are there."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import pytest

from kvilt import builtin
from kvilt.engine.engine import Engine
from kvilt.lab.evaluate.metrics import normalise


def test_model_files() -> None:
    """Danger: the model is larger than a package may be, or lacks its tokenizer."""
    weights = builtin.model_path() / "model.safetensors"
    assert weights.stat().st_size <= 12_000_000
    assert (builtin.model_path() / "tokenizer.json").exists()


def test_questions_are_about_shipped_documents() -> None:
    """Danger: a question cites a document that is not there, or that does not answer it."""
    documents = builtin.documents()
    for question in builtin.questions():
        text = " ".join(documents[name].content for name in question["documents"])
        assert 5 <= len(question["documents"]) <= 10
        assert question["value"] in text
        assert question["value"] in question["answer"]


def test_500_questions_of_every_kind() -> None:
    """Danger: a table's figures stand on too few questions."""
    counts = Counter(question["kind"] for question in builtin.questions())
    assert set(counts) == {"one_hop", "two_hop", "chunked", "chunked_hop", "state"}
    assert min(counts.values()) >= 500
    assert len(builtin.questions("one_hop")) == counts["one_hop"]


def test_the_package_stays_small() -> None:
    """Danger: every fine-tuned variant adds megabytes to everybody's installation."""
    files = [f for f in builtin.model_path().parents[1].rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(file.stat().st_size for file in files) <= 30_000_000


@pytest.fixture(scope="module")
def engines() -> Callable[[str, str], Engine]:
    """Engines of what ships, each model loaded once."""
    load = functools.cache(lambda model: Engine.load(model, "naive", "memory"))
    return lambda model, spec: load(model).with_strategy(spec)


@pytest.mark.parametrize(
    ("model", "spec", "kind", "least"),
    [
        ("builtin", "full", "one_hop", 9),
        ("builtin", "full", "chunked", 9),
        ("builtin", "kv_packet", "one_hop", 8),
        ("builtin", "linked_packet", "two_hop", 8),
        ("builtin-kvlink5", "kvlink:links=5", "two_hop", 9),
        ("builtin-kvlink0", "kvlink:links=0", "one_hop", 9),
    ],
)
def test_what_ships_answers(
    engines: Callable[[str, str], Engine], model: str, spec: str, kind: str, least: int
) -> None:
    """Danger: a wrapper of an earlier model, or weights broken by rounding: of ten questions, so many must be right."""
    assert right(engines(model, spec), kind) >= least


def test_reuse_without_repair_falls_where_an_earlier_document_is_needed(
    engines: Callable[[str, str], Engine],
) -> None:
    """Danger: a collection so easy that no method has anything to repair."""
    assert right(engines("builtin", "naive"), "chunked") <= 6


def right(engine: Engine, kind: str, count: int = 10) -> int:
    """How many of a kind's first questions are answered with the right value."""
    documents = builtin.documents()
    hits = 0
    for question in builtin.questions(kind)[:count]:
        cited = [documents[name] for name in question["documents"]]
        answer = engine.answer(question["question"], cited, max_new_tokens=48)
        hits += normalise(question["value"]) in normalise(answer.text)
    return hits

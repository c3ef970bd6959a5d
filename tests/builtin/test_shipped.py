"""What ships: the model's files are small and complete, and the questions only name documents that are there."""

from __future__ import annotations

from collections import Counter

from kvilt import builtin


def test_model_files() -> None:
    weights = builtin.model_path() / "model.safetensors"
    assert weights.stat().st_size <= 12_000_000
    assert (builtin.model_path() / "tokenizer.json").exists()


def test_questions_are_about_shipped_documents() -> None:
    documents = builtin.documents()
    for question in builtin.questions():
        text = " ".join(documents[name].content for name in question["documents"])
        assert 5 <= len(question["documents"]) <= 10
        assert question["value"] in text
        assert question["value"] in question["answer"]


def test_500_questions_of_every_kind() -> None:
    counts = Counter(question["kind"] for question in builtin.questions())
    assert set(counts) == {"one_hop", "two_hop", "chunked", "chunked_hop", "state"}
    assert min(counts.values()) >= 500
    assert len(builtin.questions("one_hop")) == counts["one_hop"]

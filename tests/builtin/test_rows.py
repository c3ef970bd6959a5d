"""The rows that the built-in model's methods are trained on: what `kvilt train` reads, with answers that their documents hold."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from builtin import rows
from builtin.world import contexts
from kvilt.lab.train.data import qa_sample, read


def test_written_rows_are_read_by_the_trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: a row that `kvilt train` refuses shows after the data was made."""
    monkeypatch.setattr(sys, "argv", ["rows", "--out", str(tmp_path), "--count", "20"])
    rows.main()
    counts = {p.name: len(read(p)) for p in tmp_path.iterdir()}
    assert set(counts) == {"biography.jsonl", "stories.jsonl", "copies.jsonl"}
    assert counts["stories.jsonl"] == 20
    assert 40 < counts["copies.jsonl"] <= 80
    assert all(s.ordered for s in read(tmp_path / "biography.jsonl"))


def test_what_is_to_be_said_again_stands_in_the_documents() -> None:
    """Danger: anchors learn to say what they cannot know, or of many pages the wrong one."""
    asked = 0
    for row in rows.copies(random.Random(3), 200):
        sample = qa_sample(row, "here")
        for one in sample.each:
            asked += 1
            page = next(d for d in one.documents if d.text == one.answers[0])
            assert len(one.documents) == 1 or str(page.title) in one.question
    assert asked > 200


@pytest.mark.parametrize("kind", ["biographies", "tales"])
def test_further_questions_see_all_documents_before_them(kind: str) -> None:
    """Danger: a question is asked before the page that answers it."""
    for row in getattr(rows, kind)(random.Random(5), 30):
        assert len(row["documents"]) <= rows.PAGES
        assert all(0 < f["documents"] <= len(row["documents"]) for f in row["further"])
        assert len(row["further"]) <= rows.MORE


def test_rows_come_from_the_training_split_alone() -> None:
    """Danger: names of the test questions are trained on."""
    test = {
        p.title for s in (contexts.build(random.Random(i), "test", 5) for i in range(50)) for p in s.pages if p.title
    }
    trained = {
        d["title"] for row in rows.copies(random.Random(3), 200) for d in row["documents"] if isinstance(d, dict)
    }
    assert trained
    assert not trained & test

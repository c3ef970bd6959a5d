"""bAbI stories become pages and questions that are asked after the right page."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest

from builtin.world import babi

STORY = """1 Mary moved to the bathroom.
2 Mary got the football there.
3 John went to the hallway.
4 Where is the football? \tbathroom\t2 1
5 John went to the garden.
6 Is John in the garden? \tyes\t5
1 Daniel went to the office.
2 Where is Daniel? \toffice\t1
"""


@pytest.mark.parametrize("name", ["qa2_two-supporting-facts_train.txt", "qa2_two-supporting-facts_train.txt.gz"])
def test_load(tmp_path: Path, name: str) -> None:
    """Danger: a statement stands in the wrong page, or a question is asked before its facts."""
    data = STORY.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    first, second = babi.load(tmp_path, "train", tasks=(2,))
    football, yes = first.questions
    told = " ".join(page.text for page in first.pages[: football.after])
    assert told == "Mary moved to the bathroom. Mary got the football there. John went to the hallway."
    assert football.answer == "Mary got the football there. Mary moved to the bathroom."
    assert yes.answer == "John went to the garden. The answer is yes."
    assert yes.after == len(first.pages)
    assert second.questions[0].value == "office"


def test_stories_are_cut_into_several_pages() -> None:
    """Danger: a story is one page, and nothing is learned about several."""
    story: list[tuple[str, ...]] = [(f"Mary went to room {n}.",) for n in range(20)]
    sample = babi.sample(story, 1, random.Random(0))
    assert len(sample.pages) >= 5


def test_a_missing_task_is_named(tmp_path: Path) -> None:
    """Danger: a hundred files are searched for the one that is not there."""
    with pytest.raises(FileNotFoundError, match="qa15"):
        babi.load(tmp_path, "test", tasks=(15,))

"""The built-in world: splits never share names, values or sentence patterns, and every question has its answer."""

from __future__ import annotations

import random

import pytest

from builtin.world import contexts, stories, templates
from builtin.world.samples import Sample
from builtin.world.world import World, held_out


def made(split: str, count: int = 40) -> list[Sample]:
    """Contexts of one split."""
    rng = random.Random(7)
    return [contexts.build(rng, split, rng.randint(3, 8)) for _ in range(count)]


def last_names(split: str) -> set[str]:
    """Last names of many people of one split."""
    worlds = [World(random.Random(seed), split) for seed in range(200)]
    return {world.person().name.split()[1] for world in worlds}


def test_splits_share_no_names() -> None:
    """Danger: test people are trained on."""
    train, test = last_names("train"), last_names("test")
    assert train
    assert test
    assert not train & test
    assert all(held_out(name) for name in test)


def test_splits_share_no_values() -> None:
    """Danger: test answers are known by heart."""
    values = {split: {q.value for sample in made(split) for q in sample.questions} for split in ("train", "test")}
    assert not values["train"] & values["test"]


def test_splits_share_no_question_patterns() -> None:
    """Danger: the test asks in the words of the training alone."""
    rng = random.Random(1)
    train = {templates.question(rng, ("born",), "X") for _ in range(500)}
    test = {templates.question(rng, ("born",), "X", test=True) for _ in range(500)}
    assert test - train, "the test must have patterns of its own"


def test_same_seed_same_sample() -> None:
    """Danger: a resumed training sees other data."""
    first, second = (contexts.build(random.Random(5), "train", 6) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_hold_the_value_and_pages_state_it(split: str) -> None:
    """Danger: an answer that no page states is to be learned."""
    for sample in made(split):
        text = " ".join(page.render() for page in sample.pages)
        for question in sample.questions:
            assert question.value in question.answer
            assert question.value in text
            assert question.after == len(sample.pages)


def test_chunked_questions_need_an_earlier_page() -> None:
    """Danger: nothing is lost by encoding pages alone, and no method has anything to repair."""
    for sample in made("train"):
        for question in sample.questions:
            if question.kind == "one_hop":
                page = sample.pages[question.pages[0]].render()
                assert question.value in page
                assert question.answer.split()[0] in page


def test_all_kinds_occur() -> None:
    """Danger: a kind of question is never asked."""
    kinds = {question.kind for sample in made("test") for question in sample.questions}
    assert kinds == {"one_hop", "two_hop", "chunked", "chunked_hop"}


def test_story_states_follow_the_text() -> None:
    """Danger: the answer is a state from later in the story."""
    rng = random.Random(3)
    for _ in range(50):
        sample = stories.build(rng, "test", 6)
        for question in sample.questions:
            text = " ".join(page.text for page in sample.pages[: question.after])
            assert question.value in text


def test_a_world_that_runs_dry_says_so() -> None:
    """Danger: the same value is used twice, or the search never ends."""
    world = World(random.Random(0), "test")
    with pytest.raises(ValueError, match="no more"):
        [world.value("field") for _ in range(1000)]

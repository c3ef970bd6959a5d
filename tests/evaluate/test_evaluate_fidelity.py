"""Divergence from full recompute."""

import math

import pytest
import torch

import zoo
from kvilt.engine.engine import Engine
from kvilt.engine.text import TextFormat
from kvilt.errors import ModelError
from kvilt.lab.evaluate import fidelity
from kvilt.registry import build
from kvilt.types import Document


def test_divergence_by_hand():
    """Danger: the two sides of the divergence are exchanged, or a ruled-out token is infinite."""
    full = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).log()
    other = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert abs(fidelity.divergence(full, other) - (first + math.log(2)) / 2) < 1e-6  # a ruled-out token weighs nothing
    assert fidelity.divergence(full, full) == 0.0


def test_divergence_does_not_hide_a_broken_model():
    """Danger: a broken model looks perfectly close."""
    with pytest.raises(ModelError, match="NaN"):
        fidelity.divergence(torch.zeros(1, 3), torch.full((1, 3), math.nan))


def test_agreement():
    """Danger: an article or a full stop counts as another answer."""
    assert fidelity.same_text("The cat.", "cat")
    assert not fidelity.same_text("The cat.", "cats")


@pytest.mark.parametrize("strategy", ["full", "block", "ape", "cacheblend:ratio=0.4"])
@pytest.mark.parametrize("change", [None, 0, 2, 4, "shorter", "longer"])
def test_a_draft_changes_no_answer_and_is_scored(strategy, change):
    """Danger: answers of an evaluation are not those of serving, or the distance is of other tokens."""
    engine = Engine(
        zoo.model_of("llama"), TextFormat.of(zoo.tokenizer()), build("strategy", strategy), build("store", "memory")
    )
    asked = ("Who?", [Document("Ada Lorn was born."), Document("In Tavik, that is.")])
    plain = engine.answer(*asked, max_new_tokens=5)
    draft = list(plain.tokens)
    if isinstance(change, int):
        draft[change] += 1
    draft = {"shorter": draft[:2], "longer": draft * 2}.get(change, draft)
    runs = []

    def through(run):
        runs.append(fidelity.Following(run, draft))
        return runs[0]

    answer = engine.answer(*asked, max_new_tokens=5, through=through)
    (run,) = runs
    assert answer.tokens == plain.tokens
    assert run.seconds < answer.usage.ttft_s
    assert len(run.scores) >= min(5, len(draft))  # as many as there is room for
    scored = engine.score(*asked, draft[: len(run.scores)])
    torch.testing.assert_close(run.scores, scored, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.cat(run.given), engine.score(*asked, plain.tokens), rtol=1e-3, atol=1e-3)

"""Plans that mix computed rows with stored ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import zoo
from core_kit import (
    DOCUMENTS,
    QUESTION,
    TOLERANCE,
    ask,
    cache_of,
    engine_of,
    ids,
    layout,
    off,
    off_dense,
    placed_rows,
    pruned,
    rotated,
    rows_of,
    run,
)
from kvilt.model.model import Model
from kvilt.plan import Plan


def blended(model: Model, blend: float) -> Plan:
    """A pruned document recomputed in part, a whole one recomputed whole, one computed at a gap, a question."""
    a, b = cache_of(model, ids(9, 1)), cache_of(model, ids(6, 2))
    thin = pruned(a, torch.tensor([0, 3, 4, 7]))
    some = torch.zeros(9, dtype=torch.bool).index_fill(0, torch.tensor([3, 5, 7]), True)  # place 5 has no stored row
    made = layout(ids(4, 3)).reuse(thin, some).reuse(b, torch.ones(6, dtype=torch.bool), at=12)
    return dataclasses.replace(made.compute(ids(3, 4), at=20).ask().plan(), blend=blend)


def test_mixed_rows_equal_one_dense_pass(model: Model) -> None:
    """Danger: rows are mixed before they are placed, at other positions, or where nothing is stored."""
    plan = blended(model, 0.3)
    assert plan.blended is not None
    assert plan.blended.tolist() == [True, False, True] + [True] * 6 + [False] * 7
    assert off_dense(model, plan) < TOLERANCE
    other = model.dense(dataclasses.replace(plan, blend=0.4).dense())
    assert off(model.score(plan), other) > 1e-3  # the share is really what counts


def test_mixing_is_the_formula() -> None:
    """Danger: the stored row's share and the fresh one's are swapped."""
    model = zoo.model_of("llama")
    theta, plan = 0.3, blended(model, 0.3)
    mixed, fresh = (placed_rows(model, p) for p in (plan, dataclasses.replace(plan, blend=1.0)))
    second = plan.segments[1].cache
    assert second is not None
    rows = slice(plan.bases[1], plan.bases[1] + 6)
    # layer 0 is the same fresh or stored, so layer 1 gets the same input in both runs
    torch.testing.assert_close(mixed[0, :, :, rows], fresh[0, :, :, rows], rtol=1e-4, atol=1e-4)
    stored = rows_of(second)[1]
    stored[0] = rotated(model, stored[0], 12 + torch.arange(6))
    wanted = theta * fresh[1, :, :, rows] + (1 - theta) * stored
    torch.testing.assert_close(mixed[1, :, :, rows], wanted, rtol=1e-4, atol=1e-4)
    assert off(mixed[1], fresh[1]) > 1e-2


@pytest.mark.parametrize("overlap", [False, True])
def test_rows_that_are_not_stored_take_nothing_from_the_buffer(overlap: bool) -> None:
    """Danger: what a computed row is mixed with is what the last prompt left there."""
    model = Model(zoo.hf_model("llama"))
    plan = blended(model, 0.3)
    clean = run(model, plan)
    with model.pool.lend(40) as buffer:
        buffer.fill_(torch.nan)
    assert torch.equal(run(model, plan, overlap=overlap), clean)


def test_everything_stored_and_mixed_with_nothing_is_the_ordinary_plan() -> None:
    """Danger: blend=1 takes another way, and loads what is computed anyway."""
    model = zoo.model_of("llama")
    plan = blended(model, 1.0)
    assert plan.blended is None
    assert plan.dense().twins is None
    with model.placed(plan) as placed:
        assert [p.rows.shape[2] for p in placed.pieces] == [4]  # the document that is computed whole is not loaded


def test_decoding_after_mixed_rows_goes_on_plainly() -> None:
    """Danger: tokens generated after the plan are mixed with what lies behind its rows."""
    engine = engine_of("sam_kv:init=2,local=4,block=4,update=fusion")
    answer = ask(engine, tokens=4)
    assert engine.plan(QUESTION, DOCUMENTS).blended is not None
    assert engine.score(QUESTION, DOCUMENTS, answer.tokens).argmax(-1).tolist() == list(answer.tokens)

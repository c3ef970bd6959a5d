"""Probes show what the full run would hold, stop as soon as they can, and are charged."""

from __future__ import annotations

import pytest
import torch

import zoo
from core_kit import bare, cache_of, ids, layout, placed_rows, pruned, rotated, rows_of, run, watched
from kvilt.model import attention
from kvilt.model.model import Model
from kvilt.model.probe import CHUNK, ModelProbe, received
from kvilt.plan import Plan
from kvilt.types import Encoding


def mixed(model: Model, question: int = 7) -> Plan:
    """A plan with a gap, a document with recomputed tokens, computed tokens between, and a question."""
    first, second = model.encode([ids(6, 1), ids(9, 2)], Encoding())
    fresh = torch.tensor([1, 0, 0, 1, 0, 0, 0, 0, 0], dtype=torch.bool)
    made = layout(ids(question, 3), first, second).reuse(first, at=3)
    return made.compute(ids(4, 4)).reuse(second, fresh).ask().plan()


class Passes:
    """Counts the decoder layers that run."""

    def __init__(self, model: Model) -> None:
        blocks = next(m for m in model.hf.modules() if isinstance(m, torch.nn.ModuleList))
        self.seen: list[int] = []
        self.hooks = [b.register_forward_pre_hook(lambda *_, i=i: self.seen.append(i)) for i, b in enumerate(blocks)]

    def __enter__(self) -> list[int]:
        return self.seen

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


@pytest.fixture(params=["llama", "llama-linear-mqa", "phi-partial-rotary", "glm-interleaved", "qwen3"])
def model(request: pytest.FixtureRequest) -> Model:
    return zoo.model_of(request.param)


def test_layers_are_those_of_a_full_run_and_the_pass_stops_there(model: Model) -> None:
    """Danger: probing costs a whole pass, or shows other keys than the plan will have."""
    plan, probe = mixed(model), ModelProbe(model, model.info())
    with Passes(model) as passed:
        seen = probe.layers(plan, 2)
    assert passed == [0, 1]
    whole = placed_rows(model, plan)[:2]
    for segment, base, cache in zip(plan.segments, plan.bases, seen, strict=True):
        rows, held = whole[:, :, :, base : base + segment.length], rows_of(cache)
        at = torch.arange(segment.start, segment.start + segment.length)
        torch.testing.assert_close(rotated(model, held[:, 0], at), rows[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(held[:, 1], rows[:, 1])


def test_more_layers_than_there_are_means_all_of_them() -> None:
    """Danger: a strategy tuned on a deep model crashes on a shallow one."""
    model = zoo.model_of("llama")
    seen = ModelProbe(model, model.info()).layers(mixed(model), 99)
    assert {len(rows_of(c)) for c in seen} == {4}


def test_attention_is_what_the_layers_really_do(model: Model) -> None:
    """Danger: tokens are selected by an attention that no pass ever computes (another mask, another scale)."""
    plan, probe = mixed(model), ModelProbe(model, model.info())
    rows, wrong = len(plan.positions), []

    def compare(layer, query, key, value, mask, scaling):  # type: ignore[no-untyped-def]
        found = attention.weights(query, key, mask, scaling)
        groups = query.shape[1] // key.shape[1]
        product = found[None] @ value.repeat_interleave(groups, 1).float()
        wrong.append(float((product - attention.ordinary(query, key, value, mask, scaling)).abs().max()))

    with attention.using(compare):
        run(model, plan)
    assert len(wrong) == 4
    assert max(wrong) < 1e-4
    with Passes(model) as passed:
        mean = probe.attention(plan, [0, 2])
    assert passed == [0, 1, 2]
    assert mean.shape == (2, rows)
    torch.testing.assert_close(mean.sum(-1), torch.ones(2))
    only = probe.attention(plan, [-1], "max", last=1)
    assert only.shape == (1, rows)
    assert 0 < float(only.max()) <= 1


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("last", [None, 3, CHUNK + 9])
def test_pooling_does_not_depend_on_chunks(masked: bool, last: int | None) -> None:
    """Danger: a long question is scored by its last chunk only."""
    torch.manual_seed(0)
    computed, rows = CHUNK + 17, 2 * CHUNK + 40
    query, key = torch.randn(1, 4, computed, 8), torch.randn(1, 2, rows, 8)
    seen = torch.ones(computed, rows, dtype=torch.bool).tril(rows - computed)
    mask = seen[None, None] if masked else None
    whole = attention.weights(query, key, mask, None)[:, -(last or computed) :]
    expected = {"mean": whole.mean((0, 1)), "max": whole.amax((0, 1)), "norm": whole.mean(0).norm(dim=0)}
    for pool in ("mean", "max", "norm"):
        torch.testing.assert_close(received(query, key, mask, None, pool, last), expected[pool])


def test_queries_and_keys_are_compared_without_their_places(model: Model) -> None:
    """Danger: queries of tokens far apart are compared, and what is compared is their distance."""
    cache, question = cache_of(model, ids(6, 1)), ids(5, 2)
    near, far = (layout(question, cache).compute(question, at=at).plan() for at in (0, 50))
    probe = ModelProbe(model, model.info())
    for a, b in zip(probe.queries(near, [0, 3]), probe.queries(far, [0, 3]), strict=True):
        assert a.shape[1] == 5
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    same = pruned(cache_of(model, torch.full((9,), 100)), torch.tensor([1, 4, 8]))
    keys = probe.keys(same, 0)
    torch.testing.assert_close(keys, keys[:, :1].expand(-1, 3, -1), rtol=1e-4, atol=1e-4)
    assert torch.equal(probe.keys(cache, 2), rows_of(cache)[2, 0])
    with pytest.raises(ValueError, match="has no keys"):
        probe.keys(bare(question), 0)


def test_looking_is_charged_and_what_it_reads_is_counted() -> None:
    """Danger: a method looks cheap because finding out what to recompute is not counted."""
    model = zoo.model_of("llama")
    info = model.info()
    plan, probe = mixed(model), ModelProbe(model, info)
    whole, stored = plan.charged(info.linear_cost), 15 * model.bytes_per_token
    assert 0.1 < info.projection_share < 0.7
    probe.layers(plan, 2)
    assert probe.charged == pytest.approx(whole * (1 + info.projection_share) / 4)
    assert probe.bytes_loaded == stored * 2 // 4
    probe.attention(plan, [3])
    probe.queries(plan, [0])
    assert probe.charged == pytest.approx(whole * (4 + 3 * info.projection_share) / 4)
    assert probe.bytes_loaded == stored * (2 + 4 + 1) // 4
    cache = plan.segments[0].cache
    assert cache is not None
    probe.keys(cache, 2)
    assert probe.bytes_loaded == stored * 7 // 4 + cache.nbytes // 4
    assert probe.charged == pytest.approx(whole * (4 + 3 * info.projection_share) / 4)  # nothing is computed


def test_a_probe_pass_reads_its_layers_alone_and_hands_its_buffer_back() -> None:
    """Danger: a look at layer 0 reads every layer, or a pass that is stopped keeps its buffer for ever."""
    model = Model(zoo.hf_model("llama"))
    cache = watched(cache_of(model, ids(30, 1)))
    plan = layout(ids(3), cache).reuse(cache).ask().plan()
    ModelProbe(model, model.info()).attention(plan, [1])
    assert cache.rows.reads == [range(2)]  # type: ignore[union-attr]
    kept = model.pool._free
    assert kept is not None
    run(model, plan)
    assert model.pool._free is kept


def test_a_hook_is_gone_after_its_pass() -> None:
    """Danger: the next answer is still watched, or attends in another way."""
    model = zoo.model_of("llama")
    plan = mixed(model)
    before = run(model, plan)
    with pytest.raises(ZeroDivisionError), attention.using(lambda *_: 1 / 0):  # type: ignore[arg-type, return-value]
        run(model, plan)
    assert torch.equal(run(model, plan), before)

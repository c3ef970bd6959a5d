"""Probes show what the full run would hold, stop as soon as they can, and are charged."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from kvilt.model.begun import decoder_layers, entering

import zoo
from kvilt.model import attention
from kvilt.model.model import Model
from kvilt.model.probe import CHUNK, ModelProbe, received
from kvilt.plan import Layout, Plan
from kvilt.types import DocumentCache, Encoding, Prompt, TensorLayers


def ids(count: int, seed: int) -> torch.Tensor:
    return torch.randint(80, zoo.VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def mixed(model: Model, question: int = 7) -> Plan:
    """A plan with a gap, a document with recomputed tokens, computed tokens between, and a question."""
    first, second = model.encode([ids(6, 1), ids(9, 2)], Encoding())
    nothing = torch.zeros(0, dtype=torch.long)
    prompt = Prompt(DocumentCache(nothing, nothing, 0, first.key), (first, second), ids(question, 3))
    fresh = torch.tensor([1, 0, 0, 1, 0, 0, 0, 0, 0], dtype=torch.bool)
    return Layout(prompt).reuse(first, at=3).compute(ids(4, 4)).reuse(second, fresh).ask().plan()


def tensors(cache: DocumentCache) -> TensorLayers:
    assert isinstance(cache.layers, TensorLayers)
    return cache.layers


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
    _, placed = model.run(plan)
    for segment, base, found in zip(plan.segments, plan.bases, seen, strict=True):
        rows = slice(base, base + segment.length)
        for layer in range(2):
            back = model.rope.move(placed.buffer[layer, 0, :, rows], -segment.start)
            torch.testing.assert_close(tensors(found).keys[layer], back)
            torch.testing.assert_close(tensors(found).values[layer], placed.buffer[layer, 1, :, rows])


@pytest.mark.parametrize("again", [False, True])
def test_a_pass_that_a_look_has_begun_gives_what_the_whole_pass_gives(model: Model, again: bool) -> None:
    """Danger: layer 0 is skipped and rows, positions or logits are those of other tokens."""
    wide, probe = mixed(model), ModelProbe(model, model.info())
    *front, second, question = wide.segments
    fresh = torch.tensor([0, 0, 0, 1, 0, 0, 0, 0, 0], dtype=torch.bool)
    plan = replace(wide, segments=(*front, replace(second, fresh=fresh), question))
    probe.layers(wide, 2)
    short = probe.begun(plan)
    if again:
        probe.layers(short, 3)
        short = probe.begun(plan)
    assert short.begun is not None
    assert short.charged() == pytest.approx(0.75 * plan.charged())
    expected, whole = model.run(plan)
    rows = whole.buffer[:, :, :, : whole.length].clone()
    model.pool.give(whole.buffer)
    with Passes(model) as passed:
        logits, placed = model.run(short)
    assert passed == [1, 2, 3]
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(placed.buffer[:, :, :, : placed.length], rows)


def test_a_look_begins_no_plan_that_computes_more() -> None:
    """Danger: a token that nobody looked at goes on with another one's state."""
    model = zoo.model_of("llama")
    plan, probe = mixed(model), ModelProbe(model, model.info())
    assert probe.begun(plan).begun is None
    probe.layers(replace(plan, segments=plan.segments[:-1]), 2)
    assert probe.begun(plan).begun is None
    probe.layers(plan, 1)
    assert probe.begun(plan).begun is None


def test_a_begun_pass_leaves_other_threads_alone() -> None:
    """Danger: two requests at once, and one goes on with the other's tokens."""
    model = zoo.model_of("llama")
    plan = mixed(model)
    expected = model.run(plan)[0]
    layer = decoder_layers(model.hf)[1][1]
    with entering(layer, torch.zeros(1, len(plan.computed_rows), 64)) as seen, ThreadPoolExecutor(1) as other:
        found = other.submit(lambda: model.run(plan)[0]).result()
        assert seen == []
        mine = model.run(plan)[0]
    assert len(seen) == 1
    assert torch.equal(found, expected)
    assert not torch.allclose(mine, expected)
    assert torch.equal(model.run(plan)[0], expected)


def test_more_layers_than_there_are_means_all_of_them() -> None:
    """Danger: a strategy tuned on a deep model crashes on a shallow one."""
    model = zoo.model_of("llama")
    seen = ModelProbe(model, model.info()).layers(mixed(model), 99)
    assert {tensors(c).shape[0] for c in seen} == {4}


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
        model.run(plan)
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


def test_queries_stand_at_position_zero(model: Model) -> None:
    """Danger: queries of tokens far apart are compared, and what is compared is their distance."""
    cache = model.encode([ids(6, 1)], Encoding())[0]
    nothing = torch.zeros(0, dtype=torch.long)
    prompt = Prompt(DocumentCache(nothing, nothing, 0, cache.key), (cache,), ids(5, 2))
    near, far = (Layout(prompt).compute(prompt.question, at=at).plan() for at in (0, 50))
    probe = ModelProbe(model, model.info())
    for a, b in zip(probe.queries(near, [0, 3]), probe.queries(far, [0, 3]), strict=True):
        assert a.shape[1] == 5
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_looking_is_charged() -> None:
    """Danger: a method looks cheap because finding out what to recompute is not counted."""
    model = zoo.model_of("llama")
    info = model.info()
    plan, probe = mixed(model), ModelProbe(model, info)
    whole = plan.charged(info.linear_cost)
    assert 0.1 < info.projection_share < 0.7
    probe.layers(plan, 2)
    assert probe.charged == pytest.approx(whole * (1 + info.projection_share) / 4)
    probe.attention(plan, [3])
    probe.queries(plan, [0])
    assert probe.charged == pytest.approx(whole * (4 + 3 * info.projection_share) / 4)


def test_a_hook_is_gone_after_its_pass() -> None:
    """Danger: the next answer is still watched, or attends in another way."""
    model = zoo.model_of("llama")
    plan = mixed(model)
    before = model.run(plan)[0]
    with pytest.raises(ZeroDivisionError), attention.using(lambda *_: 1 / 0):  # type: ignore[arg-type, return-value]
        model.run(plan)
    assert torch.equal(model.run(plan)[0], before)

"""SAM-KV: which blocks are kept, what is dropped, what it costs; and plans that mix fresh rows with stored ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from kvilt.model.placed import PlacedCache
from torch import Tensor

import zoo
from core_kit import (
    DOCUMENTS,
    QUESTION,
    TOLERANCE,
    bare,
    cache_of,
    engine_of,
    ids,
    layout,
    off,
    off_dense,
    prompt,
    pruned,
)
from kvilt.errors import SpecError
from kvilt.model.model import Model
from kvilt.model.probe import ModelProbe
from kvilt.plan import Layout, Plan
from kvilt.strategies.sam_kv import SamKV, best_blocks, inner, keep_share, means, personal
from kvilt.types import DocumentCache, Prompt, TensorLayers

SPARSE, FUSION = "sam_kv:init=2,local=4,block=4", "sam_kv:init=2,local=4,block=4,update=fusion"


def planned(asked: Prompt, family: str = "llama", **options: Any) -> tuple[Plan, ModelProbe]:
    model = zoo.model_of(family)
    probe = ModelProbe(model, model.info())
    return SamKV(**options).bind(model.info()).plan(asked, probe), probe


def documents(*lengths: int, family: str = "llama") -> list[DocumentCache]:
    return [cache_of(zoo.model_of(family), ids(n, seed)) for seed, n in enumerate(lengths, 1)]


def system(length: int = 5, family: str = "llama") -> DocumentCache:
    return cache_of(zoo.model_of(family), ids(length, 77))


# --- the rules ---


def test_heads_that_share_keys_are_summed_in_their_own_groups() -> None:
    """Danger: head 1 of four is multiplied with the keys of heads 2 and 3, as grouping the wrong way does."""
    torch.manual_seed(0)
    keys, query = torch.randn(2, 5, 3), torch.randn(4, 3)
    by_hand = [sum(float(query[h] @ keys[h // 2, row]) for h in range(4)) for row in range(5)]
    torch.testing.assert_close(inner(keys, query), torch.tensor(by_hand))
    groups = torch.tensor([0, 1, 1, 2, 0])
    expected = torch.tensor([by_hand[0] + by_hand[4], by_hand[1] + by_hand[2], 2 * by_hand[3]]) / 2
    torch.testing.assert_close(means(torch.tensor(by_hand), groups), expected)


def test_a_document_is_asked_what_the_question_and_the_other_documents_ask() -> None:
    """Danger: a document's own end takes part in its own query, or one that asks for the opposite is subtracted."""
    asked = torch.tensor([[1.0, 0.0]])
    own = [torch.tensor([[0.0, 2.0]]), torch.tensor([[-3.0, 0.0]]), torch.tensor([[1.0, 1.0]])]
    found = personal(asked, own)  # |cosines| are 0, 1 and 0.7071
    torch.testing.assert_close(found[0], torch.tensor([[1 + (-3 + 0.70711) / 2, 0.70711 / 2]]))
    torch.testing.assert_close(found[2], torch.tensor([[1 + (-3 + 0) / 2, 0.0]]))
    torch.testing.assert_close(personal(asked, own[:1])[0], asked)  # nobody else


@pytest.mark.parametrize(
    ("anchor", "blocks", "share"),
    [
        (2, [1, 3, 5], 0.75),
        (1, [1, 3, 5], 0),
        (0, [1, 3], 0),
        (5, [1, 5], 0),
        (6, [1, 5], 0),
        (2, [2, 2], 0),
        (2, [], 0),
    ],
)
def test_the_share_kept_is_what_lies_above_the_anchors(anchor: float, blocks: list[float], share: float) -> None:
    """Danger: anchors outside the range of the blocks' scores give a share below 0 or above 1."""
    assert keep_share(torch.tensor([float(anchor), *map(float, blocks)])) == share


def test_blocks_of_all_documents_compete_and_layers_are_united() -> None:
    """Danger: a layer overrules another, or a document with nothing to say keeps its share."""
    first = [torch.tensor([2.0, 1, 3, 5, 4]), torch.tensor([9.0, 1, 2])]  # shares 0.75 (of four) and 0
    second = [torch.tensor([9.0, 8, 7, 6, 5]), torch.tensor([0.5, 0, 30])]  # shares 0 and 0.9833 (of two)
    chosen = best_blocks([first, second], 1.0)  # mean shares 0.375 and 0.49: one block of four, none of two
    assert [c.tolist() for c in chosen] == [[False, False, True, False], [False, True]]


def test_layers_that_disagree_keep_no_more_than_the_limit() -> None:
    """Danger: every layer wants other blocks, and their union is the whole prompt, dearer than full recompute."""
    torch.manual_seed(0)
    found = [[torch.cat([torch.tensor([-9.0]), torch.randn(size)]) for size in (30, 50, 0)] for _ in range(6)]
    for layer in found:  # the anchors' score is the second lowest: almost everything would be kept
        for scores in layer:
            scores[0] = float(scores[1:].kthvalue(2).values) if len(scores) > 1 else 0.0
    whole, half, none = (torch.cat(best_blocks(found, most)) for most in (1.0, 0.5, 0.0))
    assert int(whole.sum()) > 70
    assert 30 <= int(half.sum()) <= 40
    assert not none.any()
    best = torch.cat([s[1:] for s in found[0]]).argmax()
    assert half[best]
    assert bool((whole | ~half).all())


# --- what is looked at ---


class Told:
    """A probe that is told queries and keys, and remembers the plans."""

    def __init__(self, keys: dict[int, Tensor]) -> None:
        self.known, self.plans = keys, list[Plan]()

    def queries(self, plan: Plan, layers: Sequence[int]) -> list[Tensor]:
        self.plans.append(plan)
        return [torch.ones(4, len(plan.computed_rows), 2) for _ in layers]

    def keys(self, cache: DocumentCache, layer: int) -> Tensor:
        return self.known[len(cache.offsets)]


def test_anchors_and_the_best_blocks_are_kept_at_their_true_places() -> None:
    """Danger: blocks are counted from the document's start, dropped places close up, or anchors are scored as blocks."""
    a, b = documents(14, 5)
    c = pruned(documents(1, 1, 12)[2], torch.tensor([0, 2, 3, 5, 6, 8, 9, 11]))
    sizes = torch.tensor(
        [1.0, 1, 0, 0, 0, 5, 5, 5, 2, 2, 2, 1, 1, 1]
    )  # blocks of three: 0, 5, 2, 1 (one row); anchors 1
    known = {
        n: size[None, :, None].expand(2, -1, 2) for n, size in ((14, sizes), (5, torch.ones(5)), (8, torch.ones(8)))
    }
    probe = Told(known)
    bound = SamKV(init=2, local=2, block=3, most=1.0).bind(zoo.model_of("llama").info())
    plan = bound.plan(prompt(ids(3), a, bare(ids(4)), b, c, system=system()), cast(Any, probe))
    computed = [s.computed.nonzero()[:, 0].tolist() for s in plan.segments]
    # share (5 - 1) / (5 - 0) of four blocks: three of them; the others' scores are all equal, their share is 0
    assert computed == [[], [0, 1, 5, 6, 7, 8, 9, 10, 11, 12, 13], [0, 1, 2, 3], [0, 1, 3, 4], [0, 2, 9, 11], [0, 1, 2]]
    assert plan.reused_count == 5
    assert plan.end == 5 + 14 + 4 + 5 + 12 + 3
    generic, *own = probe.plans
    assert [(s.start, s.places.tolist()) for s in generic.segments] == [
        (0, [0, 1, 2, 3, 4]),
        (5, [0, 1, 12, 13]),
        (23, [0, 1, 3, 4]),  # behind the document that is never stored and not computed here
        (28, [0, 2, 9, 11]),
        (40, [0, 1, 2]),
    ]
    assert [p.segments[0].computed.nonzero()[:, 0].tolist() for p in own] == [[12, 13], [3, 4], [9, 11]]
    assert [len(p.segments) for p in own] == [1, 1, 1]


def test_keys_are_compared_without_their_places() -> None:
    """Danger: a block far from the question is dropped because it is far."""
    for family in ("llama", "glm-interleaved", "phi-partial-rotary", "llama-yarn-tied-mha"):
        model = zoo.model_of(family)
        same = cache_of(model, torch.full((9,), 100))
        found = ModelProbe(model, model.info()).keys(pruned(same, torch.tensor([1, 4, 8])), 0)
        torch.testing.assert_close(found, found[:, :1].expand(-1, 3, -1), rtol=1e-4, atol=1e-4)


# --- what is run ---


@pytest.mark.parametrize("spec", ["sam_kv:init=64,local=128", "sam_kv"])
def test_short_documents_are_recomputed_whole_and_nothing_is_looked_at(spec: str) -> None:
    """Danger: documents that anchors (nearly) cover cost a look that drops less than it computes."""
    full = engine_of("full").answer(QUESTION, DOCUMENTS, max_new_tokens=1)
    sparse = engine_of(spec).answer(QUESTION, DOCUMENTS, max_new_tokens=1)
    assert engine_of(spec).plan(QUESTION, DOCUMENTS).overhead == 0
    assert full.logits is not None
    assert sparse.logits is not None
    assert off(sparse.logits, full.logits) < TOLERANCE
    assert sparse.usage.charged < 1


@pytest.mark.parametrize("update", ["overwrite", "fusion"])
@pytest.mark.parametrize("family", ["llama3-rope", "glm-interleaved"])
def test_odd_prompts_run_and_are_exact(family: str, update: str) -> None:
    """Danger: one document, no system part, a pruned one, one that is never stored, the same one twice, or none at all."""
    model = zoo.model_of(family)
    a, b = documents(40, 30, family=family)
    thin = pruned(b, torch.tensor([0, 2, 3, 8, 9, 11, 14, 20, 25, 28]))
    asked = ids(5, 9)
    for given in ([a], [a, a], [thin, b], [a, bare(ids(4, 5)), b], [bare(ids(4, 5)), thin], [bare(ids(4, 5))], []):
        for front in (None, system(family=family)):
            plan, _ = planned(
                prompt(asked, *given, system=front), family, init=2, local=3, block=2, theta=0.6, update=update
            )
            assert off_dense(model, plan) < TOLERANCE
            prefix = plan.segments[1] if front is None and given[:1] in ([a], [thin]) else None
            assert not (front and plan.segments[0].computed.any())
            assert prefix is None or not prefix.computed.any()  # exact: kept rows are reused


def test_later_documents_change_no_earlier_row() -> None:
    """Danger: kept rows see what comes after them."""
    for spec in (SPARSE, FUSION):
        engine = engine_of(spec)
        plan = engine.plan(QUESTION, DOCUMENTS)
        *front, last, asked = plan.segments
        assert last.cache is not None
        assert 8 < int(last.computed.sum()) < last.length  # a block is kept, and one dropped
        changed = dataclasses.replace(
            last, tokens=ids(last.length, 55), cache=cache_of(engine.model, ids(last.length, 55))
        )
        rows = plan.computed_rows[plan.positions[plan.computed_rows] < last.start]
        pair = []
        for p in (plan, dataclasses.replace(plan, segments=(*front, changed, asked))):
            pair.append(engine.model.run(p)[1].buffer[:, :, :, rows].clone())
        assert off(*pair) < 1e-6


def test_dropped_rows_are_not_loaded() -> None:
    """Danger: a method that drops most rows pays for loading all of them."""
    overwritten, fused = (engine_of(s).answer(QUESTION, DOCUMENTS, max_new_tokens=1) for s in (SPARSE, FUSION))
    engine = engine_of("block")
    front = len(engine.info.system)
    assert overwritten.usage.bytes_loaded == front * engine.model.bytes_per_token
    plan = engine_of(FUSION).plan(QUESTION, DOCUMENTS)
    assert plan.blended is not None
    assert fused.usage.bytes_loaded == (front + int(plan.blended.sum())) * engine.model.bytes_per_token


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi-partial-rotary"])
@pytest.mark.parametrize("options", [{}, {"init": 64, "local": 128, "block": 64}], ids=["small", "large"])
def test_it_is_cheaper_than_full_recompute(family: str, options: dict[str, int]) -> None:
    """Danger: the published re-implementation's 55 to 119 % of full recompute's compute."""
    info = zoo.model_of(family).info()
    asked = prompt(ids(20, 9), *documents(300, 400, 350, family=family), system=system(12, family))
    plan, probe = planned(asked, family, **options)
    assert 0.05 < plan.charged(info.linear_cost) + probe.charged < 0.8
    local, seen = options.get("local", 16), info.linear_cost
    full = sum(seen + i for i in range(1, 1083))
    own = sum(seen + n - i for n in (300, 400, 350) for i in range(local)) / full
    anchors = 12 + 3 * (options.get("init", 8) + local)
    generic = sum(seen + anchors + i for i in range(1, 21)) / full
    assert probe.charged == pytest.approx((own + generic) * (3 + info.projection_share) / 4)


def test_options_out_of_range_are_refused() -> None:
    """Danger: local=0 averages over nothing, theta=9 extrapolates."""
    for wrong in (
        {"init": -1},
        {"local": 0},
        {"block": 0},
        {"theta": 0.0},
        {"theta": 1.5},
        {"most": 1.1},
        {"update": "add"},
        {"layers": "x"},
    ):
        with pytest.raises(SpecError, match="wants"):
            SamKV(**wrong)  # type: ignore[arg-type]


# --- plans that mix fresh rows with stored ones ---


def blended(model: Model, blend: float) -> Plan:
    """A pruned document recomputed in part, a whole one recomputed whole, one computed at a gap, a question."""
    a, b = cache_of(model, ids(9, 1)), cache_of(model, ids(6, 2))
    thin = pruned(a, torch.tensor([0, 3, 4, 7]))
    some = torch.zeros(9, dtype=torch.bool).index_fill(0, torch.tensor([3, 5, 7]), True)  # place 5 has no stored row
    made = (
        layout(ids(4, 3)).reuse(thin, some).reuse(b, torch.ones(6, dtype=torch.bool), at=12).compute(ids(3, 4), at=20)
    )
    return dataclasses.replace(made.ask().plan(), blend=blend)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_mixed_rows_equal_one_dense_pass(family: str) -> None:
    """Danger: rows are mixed before they are placed, at other positions, or where nothing is stored."""
    model = zoo.model_of(family)
    plan = blended(model, 0.3)
    assert plan.blended is not None
    assert plan.blended.tolist() == [True, False, True] + [True] * 6 + [False] * 7
    assert off_dense(model, plan) < TOLERANCE
    other = model.dense(dataclasses.replace(plan, blend=0.4).dense())
    assert off(model.score(plan, 16), other) > 1e-3  # the share is really what counts


def placed(model: Model, plan: Plan, overlap: bool = False) -> tuple[Tensor, Tensor]:
    """The last logits, and a copy of all rows, (layers, 2, heads, rows, head_dim)."""
    logits, cache = model.run(plan, overlap=overlap)
    found = cache.buffer[:, :, :, : cache.length].clone()
    model.pool.give(cache.buffer)
    return logits, found


def test_mixing_is_the_formula() -> None:
    """Danger: the stored row's share and the fresh one's are swapped."""
    model = zoo.model_of("llama")
    theta, plan = 0.3, blended(model, 0.3)
    _, mixed = placed(model, plan)
    _, fresh = placed(model, dataclasses.replace(plan, blend=1.0))
    second = plan.segments[1]
    assert second.cache is not None
    layers = cast(TensorLayers, second.cache.layers)
    rows = slice(plan.bases[1], plan.bases[1] + 6)
    # layer 0 is the same fresh or stored, so layer 1 gets the same input in both runs
    torch.testing.assert_close(mixed[0, :, :, rows], fresh[0, :, :, rows], rtol=1e-4, atol=1e-4)
    values = theta * fresh[1, 1, :, rows] + (1 - theta) * layers.values[1]
    keys = theta * fresh[1, 0, :, rows] + (1 - theta) * model.rope.move(layers.keys[1], 12)
    torch.testing.assert_close(mixed[1, 1, :, rows], values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1, 0, :, rows], keys, rtol=1e-4, atol=1e-4)
    assert off(mixed[1], fresh[1]) > 1e-2


def test_rows_that_are_not_stored_take_nothing_from_the_buffer() -> None:
    """Danger: what a computed row is mixed with is what the last prompt left there."""
    model = zoo.model_of("llama")
    plan = blended(model, 0.3)
    clean, _ = placed(model, plan)
    for overlap in (False, True):
        dirty = model.pool.take(40)
        dirty.fill_(torch.nan)
        model.pool.give(dirty)
        assert torch.equal(placed(model, plan, overlap)[0], clean)


def test_everything_stored_and_mixed_with_nothing_is_the_ordinary_plan() -> None:
    """Danger: blend=1 takes another way."""
    model = zoo.model_of("llama")
    plan = blended(model, 1.0)
    assert plan.blended is None
    assert plan.dense().twins is None
    cache = PlacedCache(plan, model.pool.take(40), model.rope)
    assert [len(p.cache.offsets) for p in cache.pieces] == [4]  # the document that is computed whole is not loaded
    model.pool.give(cache.buffer)


def test_decoding_after_mixed_rows_goes_on_plainly() -> None:
    """Danger: tokens generated after the plan are mixed with what lies behind its rows."""
    engine = engine_of(FUSION)
    answer = engine.answer(QUESTION, DOCUMENTS, max_new_tokens=4)
    logits = engine.score(QUESTION, DOCUMENTS, answer.tokens)
    assert logits.argmax(-1).tolist() == list(answer.tokens)


def test_a_probe_reads_its_rows_before_it_hands_the_buffer_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: another request's thread takes the buffer, and tokens are selected by its rows."""
    model = zoo.model_of("llama")
    give = model.pool.give
    monkeypatch.setattr(model.pool, "give", lambda buffer: give(buffer.fill_(torch.nan)))
    (document,) = documents(6)
    plan = Layout(prompt(ids(3), document)).reuse(document).ask().plan()
    for seen in ModelProbe(model, model.info()).layers(plan, 2):
        assert not cast(TensorLayers, seen.layers).values[1].isnan().any()

"""SAM-KV: which blocks are kept, what is dropped, and what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import zoo
from core_kit import (
    DOCUMENTS,
    QUESTION,
    TOLERANCE,
    ask,
    bare,
    cache_of,
    engine_of,
    ids,
    off,
    off_dense,
    placed_rows,
    prompt,
    pruned,
)
from kvilt.errors import SpecError
from kvilt.model.probe import ModelProbe
from kvilt.plan import Plan
from kvilt.strategies.sam_kv import SamKV, best_blocks, inner, keep_share, means, personal
from kvilt.types import DocumentCache, Prompt

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


# --- what is run ---


@pytest.mark.parametrize("spec", ["sam_kv:init=64,local=128", "sam_kv"])
def test_short_documents_are_recomputed_whole_and_nothing_is_looked_at(spec: str) -> None:
    """Danger: documents that anchors (nearly) cover cost a look that drops less than it computes."""
    engine = engine_of(spec)
    first, again = ask(engine), ask(engine)
    assert engine.plan(QUESTION, DOCUMENTS).overhead == 0
    assert off(first.logits, ask(engine_of("full")).logits) < TOLERANCE
    assert again.usage.charged < 1 < first.usage.charged


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
            assert not (front and plan.segments[0].computed.any())
            exact = front is None and given[:1] == [a]  # kept rows are reused; a pruned document is not exact
            assert not exact or not plan.segments[1].computed.any()


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
        other = dataclasses.replace(plan, segments=(*front, changed, asked))
        assert off(*(placed_rows(engine.model, p)[:, :, :, rows] for p in (plan, other))) < 1e-6


def test_dropped_rows_are_not_loaded() -> None:
    """Danger: a method that drops most rows pays for loading all of them."""
    overwritten, fused = (engine_of(spec) for spec in (SPARSE, FUSION))
    model, front = overwritten.model, len(overwritten.info.system)
    with model.run(overwritten.plan(QUESTION, DOCUMENTS)) as run:
        assert run.bytes_loaded == front * model.bytes_per_token
    plan = fused.plan(QUESTION, DOCUMENTS)
    assert plan.blended is not None
    with model.run(plan) as run:
        assert run.bytes_loaded == (front + int(plan.blended.sum())) * model.bytes_per_token


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

"""Plans: what is reused, what is computed, where it stands, what it costs, and that running one is exact."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import zoo
from core_kit import TOLERANCE, bare, cache_of, fake, ids, layout, off, off_dense, prompt, pruned, rows_of, run
from kvilt.model.model import Model
from kvilt.plan import ContextScaling, Layout, Plan, Segment
from kvilt.rows.rows import TensorRows, select
from kvilt.types import DocumentCache, Encoding

Q = torch.tensor([90, 91])
FAMILIES = ("llama3-rope", "glm-interleaved")


def fresh(*marks: int) -> Tensor:
    return torch.tensor(marks, dtype=torch.bool)


# --- looking at plans ---


def test_rows_and_positions_are_counted_segment_by_segment() -> None:
    """Danger: a base that counts positions instead of rows writes one document over another."""
    kept = fake([1, 2, 3, 4, 5], offsets=[0, 3])  # two of five rows
    plan = layout(Q).reuse(kept).compute(torch.tensor([7])).reuse(fake([8, 9]), at=20).ask().plan()
    assert plan.positions.tolist() == [0, 3, 5, 20, 21, 22, 23]
    assert plan.bases == [0, 2, 3, 5]
    assert plan.computed_rows.tolist() == [2, 5, 6]
    assert plan.computed_tokens.tolist() == [7, 90, 91]
    assert (plan.reused_count, plan.end) == (4, 24)


def test_the_answer_begins_after_the_furthest_segment() -> None:
    """Danger: shared positions make the last segment end before an earlier one does."""
    plan = layout(Q).compute(torch.tensor([5, 6, 7, 8])).compute(torch.tensor([9]), at=0).ask().plan()
    assert plan.segments[-1].start == 4
    assert plan.end == 6
    assert layout(Q).compute(torch.tensor([5, 6, 7, 8])).compute(torch.tensor([9]), at=0).plan().end == 4


def test_a_pruned_place_is_neither_reused_nor_computed() -> None:
    """Danger: a place without a row is counted as reused, or computed though nobody asked for it."""
    segment = Segment(torch.arange(4), 0, fake([0, 1, 2, 3], offsets=[1, 2]), fresh(1, 1, 0, 0))
    assert segment.reused.tolist() == [False, False, True, False]
    assert segment.computed.tolist() == [True, True, False, False]
    assert segment.places.tolist() == [0, 1, 2]


def test_a_plan_is_a_suffix_only_when_nothing_reused_comes_later() -> None:
    """Danger: a plan taken for a suffix runs without a mask, and tokens see their future."""
    document = fake([1, 2, 3])
    suffix = layout(Q).reuse(document).ask().plan()
    behind = layout(Q).reuse(document).compute(torch.tensor([4])).ask().plan()
    assert suffix.is_suffix
    assert behind.is_suffix
    assert layout(Q).compute(torch.tensor([4])).ask().plan().is_suffix  # nothing reused at all
    assert not layout(Q).compute(torch.tensor([4])).reuse(document).ask().plan().is_suffix
    assert not layout(Q).reuse(document, fresh(1, 0, 0)).ask().plan().is_suffix
    assert layout(Q).reuse(document, fresh(0, 0, 1)).ask().plan().is_suffix


def test_a_plan_whose_rows_are_in_order_but_whose_positions_are_not_is_no_suffix() -> None:
    """Danger: rows decide what a mask-free kernel shows, positions what a token may see; both must agree."""
    document = fake([1, 2, 3])
    assert not layout(Q).reuse(document, at=10).compute(torch.tensor([4]), at=0).ask().plan().is_suffix
    assert not layout(Q).reuse(document).compute(torch.tensor([4]), at=2).ask().plan().is_suffix  # beside a reused row
    twice = layout(Q).reuse(document).compute(torch.tensor([4]), at=5).compute(torch.tensor([5]), at=5).ask().plan()
    assert not twice.is_suffix  # two computed tokens at one position see each other


def test_charged_counts_computed_tokens_over_the_ordinary_prompt() -> None:
    """Danger: a method looks cheaper than it is."""
    made = prompt(Q, fake([1, 2, 3]), system=fake([8, 9]))
    reuse = Layout(made).reuse(made.system).reuse(made.documents[0]).ask().plan()
    full = Layout(made).compute(torch.tensor([8, 9, 1, 2, 3])).ask().plan()
    assert reuse.baseline == full.baseline == 7
    assert reuse.charged() == pytest.approx(2 / 7)
    assert reuse.charged(10.0) == pytest.approx(
        (2 * 10 + 6 + 7) / (7 * 10 + 28)
    )  # the question's tokens see 6 and 7 keys
    assert full.charged() == full.charged(10.0) == full.charged(0.5) == 1.0


def test_charged_lets_links_headers_and_probes_be_paid_for() -> None:
    """Danger: added tokens enlarge the prompt they are measured against, and seem free."""
    packet = fake([-1, 1, 2, 3, -2])  # header and trailer stand around three tokens
    plan = layout(Q, packet).reuse(packet).compute(torch.tensor([-3, -3])).ask().plan(overhead=0.25)
    assert plan.baseline == 5
    assert plan.charged() == pytest.approx(0.25 + 4 / 5)
    seen = 6 + 7 + 8 + 9  # header and trailer rows are attended to
    assert plan.charged(4.0) == pytest.approx(0.25 + (4 * 4 + seen) / (5 * 4 + 15))
    assert plan.charged(math.inf) == plan.charged()


def test_charged_counts_rows_not_positions() -> None:
    """Danger: a gap or a pruned row is charged as if it were attended to."""
    plan = layout(Q, fake([1, 2, 3])).reuse(fake([1, 2, 3], offsets=[2]), at=100).ask().plan()
    assert plan.charged(1.0) == pytest.approx((2 + 2 + 3) / (5 + 15))


def test_an_unstored_document_is_computed_whole() -> None:
    """Danger: `fresh` marks meant for a cached document leave holes in one that has no rows."""
    document = bare(torch.tensor([1, 2, 3]))
    plan = layout(Q, document).reuse(document, fresh(1, 0, 0)).ask().plan()
    assert plan.computed_tokens.tolist() == [1, 2, 3, 90, 91]
    assert plan.charged() == 1.0


def test_the_dense_plan_of_a_document_behind_a_dropped_prefix() -> None:
    """Danger: the question sees a sink that left no rows, or the document forgets that it saw it."""
    document = fake([70, 71, 1, 2], dropped=2)
    dense = layout(Q).reuse(document, at=3).ask().plan().dense()
    assert dense.tokens.tolist() == [70, 71, 1, 2, 90, 91]
    assert dense.positions.tolist() == [1, 2, 3, 4, 5, 6]
    assert dense.computed.tolist() == [4, 5]
    assert dense.mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 1],
    ]


def test_the_dense_plan_of_recomputed_and_pruned_places() -> None:
    """Danger: a recomputed token is seen twice, or a pruned one at all."""
    document = fake([1, 2, 3], offsets=[0, 1])  # the row of token 3 was pruned
    dense = layout(Q).compute(torch.tensor([80])).reuse(document, fresh(1, 0, 0)).ask().plan().dense()
    assert dense.tokens.tolist() == [80, 1, 2, 3, 1, 90, 91]  # as encoded: 1 2 3; computed again: 1
    assert dense.positions.tolist() == [0, 1, 2, 3, 1, 4, 5]
    assert dense.computed.tolist() == [0, 4, 5, 6]
    assert dense.mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0],  # encoded alone
        [0, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0],
        [1, 0, 0, 0, 1, 0, 0],  # recomputed: sees what is in front of the document
        [1, 0, 1, 0, 1, 1, 0],
        [1, 0, 1, 0, 1, 1, 1],
    ]
    assert torch.equal(
        dense.mask, layout(Q).compute(torch.tensor([80])).reuse(document, fresh(1, 0, 0)).ask().plan().dense().mask
    )


def test_every_dense_row_sees_itself() -> None:
    """Danger: a row that sees nothing turns into NaN and spreads."""
    document = fake([70, 1, 2, 3, 4], dropped=1)
    plan = layout(Q).reuse(document, fresh(0, 1, 0, 1), at=9).reuse(fake([5, 6]), at=9).ask().plan()
    assert bool(plan.dense().mask.diagonal().all())


# --- running them: the cached path equals one dense pass ---


def _pruned(m: Model) -> Plan:
    a, b = cache_of(m, ids(12, 1)), cache_of(m, ids(9, 2))
    return layout(Q).reuse(pruned(a, torch.tensor([0, 3, 4, 11]))).reuse(pruned(b, torch.tensor([5]))).ask().plan()


def _pruned_and_recomputed(m: Model) -> Plan:
    a = pruned(cache_of(m, ids(6, 1)), torch.tensor([0, 2, 3, 5]))
    return layout(Q).compute(ids(3, 3)).reuse(a, fresh(0, 1, 1, 0, 0, 1)).ask().plan()


def _dropped_prefix(m: Model) -> Plan:
    sink = Encoding(before=(0, 0, 5))
    return layout(Q).reuse(cache_of(m, ids(8, 1), sink)).reuse(cache_of(m, ids(5, 2), sink)).ask().plan()


def _kept_vectors(m: Model) -> Plan:
    learned = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    packet = Encoding((-1, -2), (-3,), keep=True, learned=learned)
    made = layout(Q).reuse(cache_of(m, ids(8, 1), packet)).compute(torch.tensor([-4, -4]))
    return made.reuse(cache_of(m, ids(5, 2), packet)).ask().plan(learned=learned)


def _gaps(m: Model) -> Plan:
    return layout(Q).reuse(cache_of(m, ids(6, 1)), at=40).reuse(cache_of(m, ids(7, 2)), at=200).ask().plan()


def _shared_positions(m: Model) -> Plan:
    made = layout(Q).compute(ids(3, 3)).reuse(cache_of(m, ids(6, 1)), at=3).reuse(cache_of(m, ids(9, 2)), at=3)
    return made.compute(ids(4, 4), at=3).ask().plan()


def _scattered(m: Model) -> Plan:
    marks = torch.rand(30, generator=torch.Generator().manual_seed(4)) < 0.3
    return layout(Q).reuse(cache_of(m, ids(10, 1))).reuse(cache_of(m, ids(30, 2)), marks).ask().plan()


def _unstored_between(m: Model) -> Plan:
    made = layout(Q).reuse(cache_of(m, ids(10, 1))).reuse(bare(ids(7, 2)))
    return made.reuse(cache_of(m, ids(10, 3))).ask().plan()


def _out_of_order(m: Model) -> Plan:
    return layout(Q).reuse(cache_of(m, ids(6, 1)), at=20).reuse(cache_of(m, ids(6, 2)), at=3).ask().plan()


def _twice(m: Model) -> Plan:
    document = cache_of(m, ids(6, 1))
    return layout(Q).reuse(document).compute(ids(2, 5)).reuse(document).ask().plan()


PLANS = [
    _pruned,
    _pruned_and_recomputed,
    _dropped_prefix,
    _kept_vectors,
    _gaps,
    _shared_positions,
    _scattered,
    _unstored_between,
    _out_of_order,
    _twice,
]


@pytest.mark.parametrize("make", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_running_a_plan_equals_one_dense_pass(family: str, make: object) -> None:
    """Danger: a row lands in the wrong place, is moved wrongly, or is seen by a token that must not see it."""
    model = zoo.model_of(family)
    assert off_dense(model, make(model)) < TOLERANCE  # type: ignore[operator]


@pytest.mark.parametrize("make", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_scaled_context_equals_one_dense_pass(family: str, make: object) -> None:
    """Danger: scaling reaches rows that are no context, or a computed token that sees none of it turns into NaN."""
    model = zoo.model_of(family)
    plain: Plan = make(model)  # type: ignore[operator]
    sharp = dataclasses.replace(plain, context=ContextScaling(0.6, 1.3))
    assert off_dense(model, sharp) < TOLERANCE
    assert off(run(model, sharp), run(model, plain)) > 1e-3


@pytest.mark.parametrize("seed", range(24))
def test_any_plan_equals_one_dense_pass(seed: int) -> None:
    """Danger: a combination that nobody thought of."""
    model, dice = zoo.model_of(FAMILIES[seed % 2]), random.Random(seed)
    made = layout(ids(dice.randint(1, 6), seed))
    for i in range(dice.randint(1, 5)):
        tokens = ids(dice.randint(1, 14), 100 * seed + i)
        at = dice.choice([None, made.at + dice.randint(0, 50), dice.randint(0, made.at + 1)])
        if dice.random() < 0.3:
            made.compute(tokens, at=at)
            continue
        cache = cache_of(model, tokens, Encoding(before=(0,) * dice.choice([0, 0, 3])))
        if dice.random() < 0.5:
            cache = pruned(cache, torch.tensor(sorted(dice.sample(range(len(tokens)), dice.randint(1, len(tokens))))))
        marks = torch.tensor([dice.random() < 0.4 for _ in tokens]) if dice.random() < 0.5 else None
        made.reuse(cache, marks, at=at)
    assert off_dense(model, made.ask().plan()) < TOLERANCE


def test_what_is_computed_early_never_sees_what_stands_later() -> None:
    """Danger: a bottom-right causal kernel shows a scattered row the documents behind it."""
    model = zoo.model_of("llama")
    first, other, later = cache_of(model, ids(12, 1)), cache_of(model, ids(12, 2)), ids(12, 3)
    marks = fresh(0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)

    def logits(last: DocumentCache, question: Tensor) -> Tensor:
        plan = layout(question).reuse(first, marks).reuse(last, marks).ask().plan()
        return model.score(plan, len(plan.computed_rows))

    here, there = logits(other, Q), logits(cache_of(model, later), Q + 1)
    assert off(here[:3], there[:3]) < 1e-6  # the recomputed rows of the first document
    assert off(here[3:], there[3:]) > 1e-2


@pytest.mark.parametrize("drop", [pruned, select])
def test_rows_hidden_by_pruning_do_not_matter(drop: Callable[[DocumentCache, Tensor], DocumentCache]) -> None:
    """Danger: the values of pruned rows still reach the answer through a full copy of the document."""
    model = zoo.model_of("llama")
    cache, keep = cache_of(model, ids(10, 1)), torch.tensor([1, 2, 8])
    spoiled = rows_of(cache)
    spoiled[:, :, :, [0, 5]] = 1e3
    loud = dataclasses.replace(cache, rows=TensorRows(spoiled))
    clean, noisy = (run(model, layout(Q).reuse(drop(c, keep)).ask().plan()) for c in (cache, loud))
    assert torch.equal(clean, noisy)


def test_a_document_that_is_all_fresh_is_computed_like_any_text() -> None:
    """Danger: rows of a wholly recomputed document are placed and seen beside the computed ones."""
    model, tokens = zoo.model_of("llama"), ids(9, 1)
    cache = cache_of(model, tokens)
    again = layout(Q).compute(ids(2, 2)).reuse(cache, torch.ones(9, dtype=torch.bool)).ask().plan()
    plain = layout(Q).compute(ids(2, 2)).compute(tokens).ask().plan()
    assert again.reused_count == 0
    assert off(run(model, again), run(model, plain)) < 1e-6

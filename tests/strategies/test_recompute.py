"""Methods that look first and recompute a share of the tokens: what they select, what it costs, and what rows may see."""

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
    fake,
    ids,
    layout,
    make_key,
    off,
    off_dense,
    placed_rows,
    prompt,
    pruned,
    rotated,
    rows_of,
)
from kvilt.engine.engine import Engine
from kvilt.errors import SpecError
from kvilt.model.model import Model
from kvilt.model.probe import ModelProbe
from kvilt.plan import Plan, Segment
from kvilt.registry import build
from kvilt.rows.rows import TensorRows
from kvilt.strategies import infoflow
from kvilt.strategies.base import Strategy
from kvilt.strategies.selection import candidates, layer_range, top
from kvilt.types import Document, DocumentCache, Encoding, Prompt

METHODS = ["random", "cacheblend", "cacheblend:score=v", "cacheblend:stages=3", "a3", "prophetkv", "infoflow"]
LOOKING = METHODS[1:]
REORDER = "infoflow:reorder=true"


def spec_of(method: str, **options: Any) -> str:
    """A specification string with more options."""
    return method + ("," if ":" in method else ":") + ",".join(f"{k}={v}" for k, v in options.items())


def planned(spec: str, asked: Prompt, family: str = "llama") -> tuple[Plan, ModelProbe]:
    """A strategy's plan of a prompt made by hand, and the probe that it used."""
    model = zoo.model_of(family)
    strategy = cast(Strategy, build("strategy", spec)).bind(model.info())
    probe = ModelProbe(model, model.info())
    return strategy.plan(asked, probe), probe


def fresh(plan: Plan) -> list[list[int]]:
    """The places computed in each document."""
    return [s.computed.nonzero()[:, 0].tolist() for s in plan.segments if s.name == "document"]


def caches(*lengths: int, family: str = "llama") -> list[DocumentCache]:
    model = zoo.model_of(family)
    return [cache_of(model, ids(n, seed)) for seed, n in enumerate(lengths, 1)]


def system(family: str = "llama") -> DocumentCache:
    return cache_of(zoo.model_of(family), ids(5, 77))


# --- the two ends ---


@pytest.fixture(scope="module")
def full() -> Tensor:
    """Logits of the ordinary prompt."""
    logits = ask(engine_of("full")).logits
    assert logits is not None
    return logits


@pytest.mark.parametrize("method", [*METHODS, REORDER])
def test_everything_is_full_prefill_and_nothing_is_block(method: str, full: Tensor) -> None:
    """Danger: a mask, a position or a row is wrong, and no ratio between would ever show it."""
    block, nothing = ask(engine_of("block")), ask(engine_of(spec_of(method, ratio=0)))
    everything = ask(engine_of(spec_of(method, ratio=1)))
    assert off(everything.logits, full) < TOLERANCE
    assert nothing.logits is not None
    assert block.logits is not None
    assert torch.equal(nothing.logits, block.logits)
    assert nothing.usage.charged == block.usage.charged  # nothing was looked at


@pytest.mark.parametrize("compress", ["int4", "keydiff:keep=0.3", "random:keep=0.5+fp8"])
@pytest.mark.parametrize("method", ["cacheblend", "random:sink=none", "infoflow:reorder=true"])
def test_everything_is_full_prefill_over_lossy_caches_too(method: str, compress: str, full: Tensor) -> None:
    """Danger: a document that was encoded behind the system part is taken for exact, whatever it lost since."""
    for sink in ("system", "none"):
        spec = method.replace("sink=none", f"sink={sink}") if "sink" in method else spec_of(method, sink=sink)
        answer = ask(engine_of(spec_of(spec, ratio=1), compress=compress))
        assert off(answer.logits, full) < TOLERANCE
    exact = ask(engine_of(spec_of(method, ratio=1).replace("sink=none", "sink=system")))
    assert off(exact.logits, full) < TOLERANCE


@pytest.mark.parametrize("ratio", [-0.1, 1.01, "nan"])
@pytest.mark.parametrize("method", METHODS)
def test_a_ratio_is_a_share(method: str, ratio: float) -> None:
    """Danger: ratio=15 means everything, and the table says CacheBlend costs as much as full recompute."""
    with pytest.raises(SpecError, match="from 0 to 1"):
        build("strategy", spec_of(method, ratio=ratio))


# --- what may be recomputed, and how much ---


def test_the_exact_prefix_is_no_candidate_and_every_other_document_is() -> None:
    """Danger: budget goes to rows that are exact already, or the first document is taken for exact behind a system part."""
    a, b = caches(6, 4)
    assert candidates(prompt(ids(2), a, b)).tolist() == [False] * 6 + [True] * 4
    assert candidates(prompt(ids(2), a, b, system=system())).all()
    assert candidates(prompt(ids(2), a, a)).tolist() == [False] * 6 + [True] * 6  # only where it is the prefix


def test_a_document_encoded_behind_the_system_part_is_the_exact_prefix() -> None:
    """Danger: with sink=system the first document is recomputed for nothing; with BOS tokens in front it is not exact."""
    model, front = zoo.model_of("llama"), system()
    behind, sunk = Encoding(before=tuple(front.tokens.tolist())), Encoding(before=(0, 0))
    first, second = cache_of(model, ids(6, 1), behind), cache_of(model, ids(4, 2), behind)
    assert candidates(prompt(ids(2), first, second, system=front)).tolist() == [False] * 6 + [True] * 4
    assert candidates(prompt(ids(2), cache_of(model, ids(6, 1), sunk))).all()


def test_pruned_places_and_documents_without_a_cache_are_no_candidates() -> None:
    """Danger: a place without a row takes budget, or a pruned token comes back."""
    kept = pruned(caches(6)[0], torch.tensor([1, 4, 5]))
    asked = prompt(ids(2), bare(ids(3)), kept, system=system())
    assert candidates(asked).tolist() == [False] * 3 + [False, True, False, False, True, True]
    learned = dataclasses.replace(kept, tokens=torch.tensor([-1, -2, 90, 91, 92, 93]))
    assert candidates(prompt(ids(2), learned, system=system())).tolist() == [False, False, False, False, True, True]


def test_equals_are_taken_from_the_left_and_counts_are_rounded() -> None:
    """Danger: the choice among equals differs from run to run or machine to machine."""
    among = torch.tensor([True, False, True, True, True])
    assert top(torch.tensor([1.0, 9.0, 2.0, 1.0, 1.0]), among, 2).tolist() == [True, False, True, False, False]
    assert top(torch.zeros(5), among, 3).tolist() == [True, False, True, True, False]
    asked = prompt(ids(2), *caches(6, 7), system=system())
    for ratio, count in ((0.03, 0), (0.05, 1), (0.15, 2), (0.3, 4), (0.99, 13)):
        assert sum(map(len, fresh(planned(f"random:ratio={ratio}", asked)[0]))) == count


@pytest.mark.parametrize("method", METHODS)
def test_odd_prompts_run_and_are_exact(method: str) -> None:
    """Danger: one document, no system part, a pruned one, one that is never stored, the same one twice, or none at all."""
    model = zoo.model_of("llama")
    a, b = caches(7, 9)
    thin = pruned(b, torch.tensor([0, 2, 3, 8]))
    question = ids(5, 9)
    for documents in ([a], [a, a], [thin, b], [a, bare(ids(4, 5)), b], [bare(ids(4, 5)), thin], [bare(ids(4, 5))], []):
        for front in (None, system()):
            plan, _ = planned(spec_of(method, ratio=0.4), prompt(question, *documents, system=front))
            assert off_dense(model, plan) < TOLERANCE
            assert not (plan.segments[0].computed.any() if front else False)


# --- the score decides ---


class Eager:
    """The attention of transformers' own eager code in one pass under a plan's mask: shares nothing with the probe."""

    def __init__(self, plan: Plan) -> None:
        hf = zoo.hf_model("llama")
        hf.set_attn_implementation("eager")
        dense = plan.dense()
        shut = torch.zeros(dense.mask.shape).masked_fill(~dense.mask, torch.finfo(torch.float32).min)
        with torch.no_grad():
            out = hf(
                input_ids=dense.tokens[None],
                position_ids=dense.positions[None],
                attention_mask=shut[None, None],
                output_attentions=True,
            )
        asked = len(plan.segments[-1].tokens)
        self.layers = [a[0, :, -asked:] for a in out.attentions]  # (heads, asked, rows) each


def wanted(method: str, plan: Plan) -> Tensor:
    """A method's score of every row, from its paper."""
    layers = Eager(plan).layers
    if method == "a3":
        return layers[0].sum((0, 1))
    if method == "prophetkv":
        return torch.stack([a.mean((0, 1)) for a in layers]).mean(0)
    return torch.stack([layers[i].mean(0).norm(dim=0) for i in (2, 3)]).mean(0)  # 60 to 70 % of four layers


@pytest.mark.parametrize("method", ["a3", "prophetkv", "infoflow"])
def test_the_tokens_that_the_question_attends_to_most_are_recomputed(method: str) -> None:
    """Danger: the selection follows another attention: other layers, other positions, the question's own keys."""
    asked = prompt(ids(6, 9), *caches(12, 20, 9), system=system())
    score = wanted(method, planned("block", asked)[0])[5 : 5 + 41]
    chosen = planned(f"{method}:ratio=0.25", asked)[0]
    expected = score.topk(10).indices.sort().values
    found = [p + base for places, base in zip(fresh(chosen), (0, 12, 32), strict=True) for p in places]
    assert found == expected.tolist()


@pytest.mark.parametrize(("method", "keys"), [("cacheblend", True), ("cacheblend:score=v", False)])
@pytest.mark.parametrize("family", ["llama", "glm-interleaved", "phi-partial-rotary"])
def test_the_tokens_that_deviate_most_from_full_prefill_are_recomputed(method: str, keys: bool, family: str) -> None:
    """Danger: keys are compared at two positions, or layer 0 is compared, where nothing deviates."""
    model, front, documents = zoo.model_of(family), system(family), caches(12, 20, 9, family=family)
    asked = prompt(ids(6, 9), *documents, system=front)
    everything = torch.cat([front.tokens, *(d.tokens for d in documents)])
    whole = placed_rows(model, layout(everything).ask().plan())[1]  # layer 1 of a full prefill, keys rotated
    deviation, at = [], 5
    for d in documents:
        rows, (k, v) = slice(at, at + d.length), rows_of(d)[1]
        change = (whole[1, :, rows] - v).square().sum((0, 2))
        change += (whole[0, :, rows] - rotated(model, k, at + d.offsets)).square().sum((0, 2)) * keys
        deviation.append(change)
        at += d.length
    expected = torch.cat(deviation).topk(10).indices.sort().values
    chosen = planned(spec_of(method, ratio=0.25), asked, family)[0]
    found = [p + base for places, base in zip(fresh(chosen), (0, 12, 32), strict=True) for p in places]
    assert found == expected.tolist()


class Told:
    """A probe that is told what to see, and remembers what it was asked."""

    def __init__(self, rows: Sequence[float] = (), marked: int = -1) -> None:
        self.rows, self.marked, self.plans, self.depths = torch.tensor(rows), marked, list[Plan](), list[Any]()

    def attention(self, plan: Plan, layers: Sequence[int], pool: str = "mean", last: int | None = None) -> Tensor:
        self.plans.append(plan)
        self.depths.append((list(layers), pool, last))
        return self.rows[None].expand(len(layers), -1)

    def layers(self, plan: Plan, count: int) -> list[DocumentCache]:
        """Caches that differ from the stored ones (all zero) by the place's own number, and by 99 at the marked one."""
        self.plans.append(plan)
        self.depths.append(count)
        seen = []
        for s in plan.segments:
            size = torch.where(s.places == self.marked, 99.0, s.places.float())
            rows = TensorRows(size[:, None].expand(count, 2, 1, -1, 2))
            seen.append(DocumentCache(s.tokens, s.places, s.length, make_key(s.tokens), rows))
        return seen


def told(spec: str, asked: Prompt, probe: Told) -> Plan:
    info = dataclasses.replace(zoo.model_of("llama").info(), num_layers=36)
    return cast(Strategy, build("strategy", spec)).bind(info).plan(asked, cast(Any, probe))


def zeros(length: int, offsets: list[int] | None = None) -> DocumentCache:
    """A stored document whose nine layers hold nothing but zeros."""
    made = fake(ids(length).tolist(), offsets)
    return dataclasses.replace(made, rows=TensorRows(torch.zeros(9, 2, 1, len(made.offsets), 2)))


def test_rows_of_pruned_documents_are_not_mistaken_for_places() -> None:
    """Danger: row 2 of a pruned document is its place 5, and place 2 is recomputed."""
    asked = prompt(ids(2), zeros(8, [1, 4, 5, 7]), zeros(3), system=zeros(1))
    #              system  the four kept rows    second document   question
    rows = [9.0, 0.1, 0.1, 0.8, 0.1, 0.1, 0.7, 0.1, 9.0, 9.0]
    for method in ("a3", "prophetkv", "infoflow"):
        assert fresh(told(f"{method}:ratio=0.3", asked, Told(rows))) == [[5], [1]]
    probe = Told(marked=5)
    assert fresh(told("cacheblend:ratio=0.3", asked, probe)) == [[5, 7], []]


def test_layers_looked_at_are_the_papers() -> None:
    """Danger: a layer is looked at that the paper does not name, or the whole depth is paid for layer 0."""
    asked = prompt(ids(2), zeros(20), system=zeros(1))
    depths = {}
    for spec in ("a3", "prophetkv", "infoflow", "infoflow:layers=30-99", "cacheblend", "cacheblend:stages=2"):
        probe = Told([1.0] * 23)
        told(spec_of(spec, ratio=0.5), asked, probe)
        depths[spec] = probe.depths
    assert depths == {
        "a3": [([0], "mean", 2)],
        "prophetkv": [(list(range(36)), "mean", 2)],
        "infoflow": [([22, 23, 24, 25], "norm", 2)],
        "infoflow:layers=30-99": [(list(range(30, 36)), "norm", 2)],
        "cacheblend": [2],
        "cacheblend:stages=2": [2, 3],
    }


def test_cacheblend_looks_at_candidates_and_the_question_that_the_pass_goes_on_with() -> None:
    """Danger: the probe computes the system part or what stands before it, and the method looks dearer."""
    probe = Told()
    asked = prompt(ids(2), zeros(6), zeros(10), bare(ids(2)))
    told("cacheblend:ratio=0.5", asked, probe)
    (plan,) = probe.plans
    assert [int(s.computed.sum()) for s in plan.segments] == [0, 0, 10, 2, 2]
    assert [s.name for s in plan.segments] == ["system", "document", "document", "document", "question"]


def test_gradual_filtering_shrinks_to_the_ratio() -> None:
    """Danger: a later stage lets in what an earlier one dropped, or the last keeps more than it may."""
    probe = Told(marked=3)
    asked = prompt(ids(2), zeros(40), system=zeros(1))
    plan = told("cacheblend:ratio=0.5,stages=3", asked, probe)
    kept = [set(p.segments[1].computed.nonzero()[:, 0].tolist()) for p in probe.plans]
    assert [len(k) for k in kept] == [40, 24, 22]
    last = set(fresh(plan)[0])
    assert len(last) == 20
    assert last < kept[2] < kept[1] < kept[0]
    assert last == {3, *range(21, 40)}


def test_an_option_of_cacheblend_or_infoflow_out_of_range_is_refused() -> None:
    """Danger: a misspelled score is silently the other one."""
    wrong = [
        "cacheblend:score=k",
        "cacheblend:stages=0",
        "infoflow:layers=9",
        "infoflow:layers=9-4",
        "infoflow:boundary=-1",
    ]
    for spec in wrong:
        with pytest.raises(SpecError, match="wants"):
            build("strategy", spec)


def test_infoflow_takes_the_first_tokens_along_and_puts_the_best_document_last() -> None:
    """Danger: reordering goes by length, or the positions stay those of the old order."""
    asked = prompt(ids(2), zeros(4), zeros(6), zeros(2), system=zeros(1))
    rows = [0.0, *[0.0, 9, 9, 0], *[8.0, 0, 0, 0, 0, 0], *[0.0, 0], 0, 0]
    plan = told("infoflow:ratio=0.25,boundary=1", asked, Told(rows))
    assert fresh(plan) == [[0, 1, 2], [0], [0]]
    probe = Told(rows)
    plan = told("infoflow:ratio=0.25,reorder=true", dataclasses.replace(asked, names=("a", "b", "c")), probe)
    assert [s.length for s in plan.segments] == [1, 2, 6, 4, 2]
    assert [s.start for s in plan.segments] == [0, 1, 3, 9, 13]
    assert [s.length for s in probe.plans[1].segments] == [1, 2, 6, 4, 2]  # scored again where they now stand
    for depth, layers in ((4, (2, 3)), (16, (10, 11)), (1, (0, 0))):
        found = layer_range("", depth, infoflow.DEFAULT)
        assert (found[0], found[-1]) == layers


def test_random_depends_on_seed_and_documents_alone() -> None:
    """Danger: the control cannot be repeated, or moves with the question and is no control."""
    a, b = caches(30, 40)

    def chosen(seed: int, question: Tensor, *documents: DocumentCache) -> list[list[int]]:
        return fresh(planned(f"random:ratio=0.3,seed={seed}", prompt(question, *documents, system=system()))[0])

    first = chosen(0, ids(3), a, b)
    assert chosen(0, ids(9, 4), a, b) == first
    assert chosen(1, ids(3), a, b) != first
    assert chosen(0, ids(3), b, a) != first[::-1]


# --- what it costs ---


def charged(engine: Engine, asked: Prompt) -> Plan:
    """The strategy's plan of a prompt, charged with what its probe passes have cost."""
    probe = ModelProbe(engine.model, engine.info)
    plan = engine.strategy.plan(asked, probe)
    return dataclasses.replace(plan, overhead=plan.overhead + probe.charged)


def costs(model: Model, positions: Sequence[int], size: int) -> float:
    """Tokens at these positions, each seeing all before it, in units of a prompt of `size` tokens."""
    linear = model.info().linear_cost
    return sum(linear + p + 1 for p in positions) / sum(linear + i for i in range(1, size + 1))


@pytest.mark.parametrize(
    ("method", "tokens", "top_layer"),
    [("cacheblend", range(5, 30), 1), ("a3", range(26, 30), 0), ("prophetkv", range(26, 30), 3)],
)
def test_looking_is_charged_by_hand(method: str, tokens: range, top_layer: int) -> None:
    """Danger: nominal and true cost differ, as in the tables of most papers."""
    model = zoo.model_of("llama")
    info = model.info()
    engine = engine_of(spec_of(method, ratio=0.3))
    plan = charged(engine, prompt(ids(4, 9), *caches(12, 9), system=system()))
    looked = costs(model, tokens, 30) * (top_layer + info.projection_share) / 4
    assert plan.overhead == pytest.approx(looked)
    computed = plan.positions[plan.computed_rows].tolist()
    assert len(computed) == 6 + 4
    assert plan.charged(info.linear_cost) == pytest.approx(looked + costs(model, computed, 30))
    assert plan.charged(info.linear_cost) < 1


def test_every_stage_of_cacheblend_is_charged() -> None:
    """Danger: gradual filtering looks as cheap as one look, or each stage is charged for all tokens."""
    model = zoo.model_of("llama")
    share = model.info().projection_share
    plan = charged(engine_of("cacheblend:ratio=0.3,stages=2"), prompt(ids(4, 9), *caches(12, 9), system=system()))
    between = round(0.3 * 1.1 * 21)
    first = costs(model, range(5, 30), 30) * (1 + share) / 4
    cheapest, dearest = ([*range(start, start + between), *range(26, 30)] for start in (5, 26 - between))
    second = (plan.overhead - first) / ((2 + share) / 4)  # layers 0 and 1 and what layer 2 projects, of some tokens
    assert costs(model, cheapest, 30) <= second <= costs(model, dearest, 30)


def test_the_second_answer_selects_and_costs_the_same() -> None:
    """Danger: what a probe left in a shared buffer changes the next prompt."""
    for method in LOOKING:
        engine = engine_of(spec_of(method, ratio=0.3))
        first, *plans = [engine.plan(q, DOCUMENTS) for q in (QUESTION, QUESTION, "Why?", QUESTION)]
        assert fresh(first) == fresh(plans[0]) == fresh(plans[2])
        assert first.overhead > plans[0].overhead == plans[2].overhead > 0  # the first one has encoded them


# --- rows never see the future ---

LAST = Document("Another river, which is not the Sel at all, in short", title="Sel", id="other")


def rows_before(engine: Engine, plan: Plan, end: int) -> Tensor:
    """Keys and values, in every layer, of the recomputed rows before a position, (layers, 2, heads, rows, head_dim)."""
    rows = plan.computed_rows[plan.positions[plan.computed_rows] < end]
    assert len(rows) > 3
    return placed_rows(engine.model, plan)[:, :, :, rows]


def seen_future(engine: Engine, plan: Plan) -> float:
    """How much recomputed rows change when the last document is another one of the same length; they stand before it."""
    *front, last, question = plan.segments
    other = engine.model.encode([ids(last.length, 55)], Encoding())[0]
    changed = Segment(other.tokens, last.start, other, last.fresh, last.name)
    again = dataclasses.replace(plan, segments=(*front, changed, question))
    return off(rows_before(engine, again, last.start), rows_before(engine, plan, last.start))


def prototype(plan: Plan) -> Tensor:
    """The mask of CacheBlend's released prototype: lower triangular from the bottom right, one row per computed token."""
    computed, rows = len(plan.computed_rows), len(plan.positions)
    return torch.ones(computed, rows, dtype=torch.bool).tril(rows - computed)


@pytest.mark.parametrize("method", [*METHODS, "epic:tokens=4"])
def test_scattered_rows_never_see_the_future(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: the released CacheBlend prototype's mask, under which recomputed tokens see what comes after them."""
    engine = engine_of(method if method.startswith("epic") else spec_of(method, ratio=0.4))
    plan = engine.plan(QUESTION, DOCUMENTS)
    assert not plan.is_suffix
    assert seen_future(engine, plan) < 1e-6
    monkeypatch.setattr(Plan, "visible", prototype)
    assert seen_future(engine, plan) > 1e-2  # this test would have caught it

"""auto: the faster of full recompute and reuse, from measured rates, and said so."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from kvilt.model.pace import Pace
from torch import Tensor

import zoo
from core_kit import DOCUMENTS, QUESTION, TOLERANCE, engine_of, ids, layout, off, wrapper_file
from kvilt.check import gates
from kvilt.engine.engine import Engine
from kvilt.errors import SpecError
from kvilt.model import pace
from kvilt.model.model import Model
from kvilt.plan import Plan
from kvilt.stores.memory import MemoryStore
from kvilt.strategies.auto import Auto
from kvilt.strategies.block import BlockAttention
from kvilt.strategies.epic import Epic
from kvilt.types import Document, DocumentCache, TensorLayers, Which

LONG = [Document("The river Sel runs from Orsa to the sea, slowly. " * 12, title=str(i), id=str(i)) for i in range(6)]


class Timed:
    """A probe on a machine where computing a token and loading a token take so many seconds."""

    def __init__(self, compute: float, load: float) -> None:
        self.compute, self.load, self.asked = compute, load, 0

    def seconds(self, plan: Plan) -> float:
        self.asked += 1
        loaded = sum(len(s.cache.offsets) for s in plan.segments if s.cache is not None and s.reused.any())
        return self.compute * len(plan.computed_rows) + self.load * loaded

    def _never(self, *_: Any) -> Any:
        raise AssertionError("nothing to look at")

    layers = attention = queries = _never


def same(a: Plan, b: Plan) -> bool:
    """Whether two plans compute the same tokens in the same segments and reuse the same caches."""
    return len(a.segments) == len(b.segments) and all(
        (x.start, x.name, x.cache) == (y.start, y.name, y.cache)
        and torch.equal(x.tokens, y.tokens)
        and torch.equal(x.computed, y.computed)
        for x, y in zip(a.segments, b.segments, strict=True)
    )


def prompt_of(engine: Engine) -> Any:
    return gates.Case(engine, DOCUMENTS, QUESTION).prompt()


def test_the_faster_plan_is_chosen_and_the_note_says_why(tmp_path: Path) -> None:
    """Danger: a slow disk makes every answer slower, or what is computed is not the ordinary prompt."""
    wrapper = wrapper_file(tmp_path)
    for spec in ("block:sink=4", f"kv_packet:wrapper={wrapper}"):
        engine = engine_of(f"auto:reuse={spec}")
        prompt, full = prompt_of(engine), engine.with_strategy("full").plan(QUESTION, DOCUMENTS)
        slow, fast = (engine.strategy.plan(prompt, Timed(1.0, load)) for load in (2.0, 0.5))
        assert same(slow, full)
        assert slow.learned is None
        assert slow.charged(3.0) == 1.0
        assert same(fast, engine.with_strategy(spec).strategy.plan(prompt, Timed(1.0, 1.0)))
        assert slow.note.startswith(f"full recompute: predicted {full.baseline}.000 s against ")
        assert fast.note.startswith("reuse: predicted ")


def test_a_method_is_not_asked_where_it_cannot_win() -> None:
    """Danger: a probing method pays for looking, and then the whole prompt is computed all the same."""

    @dataclasses.dataclass(frozen=True)
    class Costly(BlockAttention):
        def plan(self, prompt: Any, probe: Any) -> Plan:
            raise AssertionError("asked")

    engine = engine_of("block")
    auto = Auto(Costly()).bind(engine.info)
    assert auto.plan(prompt_of(engine), Timed(1.0, 2.0)).note.startswith("full recompute")
    with pytest.raises(AssertionError, match="asked"):
        auto.plan(prompt_of(engine), Timed(1.0, 0.5))
    most = Auto(Epic(tokens=40)).bind(engine.info)  # could win if it computed nothing, but computes nearly everything
    assert most.plan(prompt_of(engine), Timed(1.0, 0.9)).note.startswith("full recompute")


@pytest.mark.parametrize("load", [0.0, 99.0])
@pytest.mark.parametrize("family", ["llama", "glm-interleaved"])
def test_the_gates_hold_whatever_is_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str, load: float
) -> None:
    """Danger: only the choice that this machine happens to make is tested."""
    timed = Timed(1.0, load)
    monkeypatch.setattr(Pace, "seconds", lambda _, __, plan, ___: timed.seconds(plan))
    engine = engine_of(f"auto:reuse=kv_packet:wrapper={wrapper_file(tmp_path)}", family=family)
    assert not [r for r in gates.run(engine, DOCUMENTS, QUESTION) if not r.passed]
    assert timed.asked


@dataclasses.dataclass(frozen=True, eq=False)
class SlowLayers(TensorLayers):
    """As from a disk far away."""

    def fetch(self, layer: int, which: Which, out: Tensor | None = None) -> Tensor:
        time.sleep(0.02)
        return super().fetch(layer, which, out)


class SlowStore(MemoryStore):
    """Gives back what it takes ages to read."""

    def get(self, key: Any) -> DocumentCache | None:
        found = super().get(key)
        if found is None or not isinstance(found.layers, TensorLayers):
            return found
        return dataclasses.replace(found, layers=SlowLayers(found.layers.keys, found.layers.values))


def test_on_this_machine() -> None:
    """Danger: predictions have nothing to do with what happens: full recompute over quick memory, reuse over a slow disk."""
    quick, slow = engine_of("auto"), engine_of("auto", SlowStore())
    for engine in (quick, slow):
        engine.encode([*LONG, *DOCUMENTS])
        engine.answer(QUESTION, DOCUMENTS, max_new_tokens=1)  # the system part is stored from now on
    reused = quick.answer(QUESTION, LONG, max_new_tokens=2)
    assert reused.usage.note.startswith("reuse: predicted ")
    assert reused.usage.charged < 0.2
    assert reused.logits is not None
    block = quick.with_strategy("block").answer(QUESTION, LONG, max_new_tokens=2)
    assert torch.equal(reused.logits, block.logits)  # type: ignore[arg-type]
    computed = slow.answer(QUESTION, DOCUMENTS, max_new_tokens=2)
    full = slow.with_strategy("full").answer(QUESTION, DOCUMENTS, max_new_tokens=2)
    assert computed.usage.note.startswith("full recompute: predicted ")
    assert (computed.usage.reused_tokens, computed.usage.bytes_loaded, computed.usage.charged) == (0, 0, 1.0)
    assert off(computed.logits, full.logits) < TOLERANCE  # type: ignore[arg-type]
    assert computed.as_dict()["usage"]["note"] == computed.usage.note  # type: ignore[index]
    assert full.usage.note == ""


def test_rates_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: the same prompt is computed once and reused once, and every request pays for measuring."""
    model, made = Model(zoo.hf_model("llama")), []
    monkeypatch.setattr(pace, "computing", lambda m, linear: made.append("computing") or (0.5, 1e-3))
    monkeypatch.setattr(pace, "placing", lambda m, plan, kind: made.append("placing") or time.perf_counter())
    small, large = (model.encode([ids(n, n)], gates.Encoding())[0] for n in (30, 100))
    plans = [layout(ids(3), c).reuse(c).ask().plan() for c in (small, large)]
    found: list[float] = []
    threads = [
        threading.Thread(target=lambda: found.append(model.pace.seconds(model, plans[1], 10.0))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["computing", "placing"]
    assert len(set(found)) == 1
    assert model.pace.seconds(model, plans[0], 10.0) < found[0]
    bare = layout(ids(3)).ask().plan()
    assert model.pace.seconds(model, bare, 10.0) == pytest.approx(0.5 + 1e-3 * bare.work(10.0))
    assert len(made) == 2
    twice = layout(ids(3), large).reuse(large)
    for _ in range(4):
        twice.reuse(large)
    model.pace.seconds(model, twice.ask().plan(), 10.0)  # five times as much to place: what was timed was too little
    assert made == ["computing", "placing", "placing"]


def test_two_lengths_give_two_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: where a pass costs the same however short, the rate of a token is noise, or negative."""
    model, lengths = zoo.model_of("llama"), []

    def first_token(_: Any, tokens: int) -> float:
        lengths.append(tokens)
        return 0.05 + 1e-6 * pace._bare(tokens).work(30.0)

    monkeypatch.setattr(pace, "_first_token", first_token)
    assert pace.computing(model, 30.0) == pytest.approx((0.05, 1e-6), rel=1e-3)
    assert lengths == [16, 64, 256, 1024]  # until it takes twice as long
    monkeypatch.setattr(pace, "_first_token", lambda *_: 0.05)
    fixed, unit = pace.computing(model, 30.0)
    assert fixed <= 0.05
    assert unit > 0


def test_what_placing_takes_is_what_it_takes() -> None:
    """Danger: reading is timed on another layer, another document or in other units than it happens."""
    model = zoo.model_of("llama")
    cache = model.encode([ids(50, 1)], gates.Encoding())[0]
    assert isinstance(cache.layers, TensorLayers)
    slow = dataclasses.replace(cache, layers=SlowLayers(cache.layers.keys, cache.layers.values))
    plan = layout(ids(3), slow, cache).reuse(cache).reuse(slow).ask().plan()
    rate = pace.placing(model, plan, SlowLayers)  # two fetches of 20 ms for each of four layers
    assert 0.16 <= rate * slow.nbytes < 0.6
    assert pace.placing(model, plan, TensorLayers) * cache.nbytes < 0.16


def test_bad_methods_are_refused_before_anything_runs() -> None:
    """Danger: a mistake inside the brackets is silently another method."""
    for spec, message in {
        "auto:reuse=full": "reuses nothing",
        "auto:reuse=blok": "Did you mean 'block'",
        "auto:reuse=[epic:tokens=3,sunk=2]": "Did you mean 'sink'",
        "auto:reuse=epic:tokens=3,sink=2": "'auto' has no option 'sink'",
    }.items():
        with pytest.raises(SpecError, match=message):
            engine_of(spec)
    engine = engine_of("auto:reuse=[epic:tokens=3,sink=2]")
    assert repr(engine.strategy) == "Auto(reuse='[epic:tokens=3,sink=2]')"
    assert engine.encoder.encoding.before == (0, 0)

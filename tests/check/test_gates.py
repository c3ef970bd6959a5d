"""G1-G9 for every strategy on every model family, and what they are for: real faults are refused in every dtype."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import zoo
from core_kit import DOCUMENTS, MATRIX, QUESTION, wrapper_file
from kvilt import registry
from kvilt.check import gates
from kvilt.engine.engine import Engine
from kvilt.engine.text import TextFormat
from kvilt.errors import ModelError
from kvilt.model import proof
from kvilt.model.loading import load_model, wrap
from kvilt.model.model import Model
from kvilt.stores.store import Store
from kvilt.strategies.base import Strategy

OF_STRATEGIES = ("G4", "G6", "G7", "G8", "G9")  # the others ask the model alone
OF_BOTH = ("G4", "G6", "G9")  # G7 and G8 ask the engine, whatever the architecture
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIFFERENT = [
    "llama",
    "llama-linear-mqa",
    "phi-partial-rotary",
    "glm-interleaved",
]  # rotations that have little in common


@pytest.fixture(scope="session")
def wrapper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random learned vectors for the tiny models (64 channels)."""
    return wrapper_file(tmp_path_factory.mktemp("wrapper"), links=4)


@functools.cache
def raw_of(family: str, dtype: torch.dtype) -> Any:
    """A tiny model of transformers, made once for each dtype."""
    return zoo.hf_model(family).to(dtype)


@functools.cache
def model_of(family: str, dtype: torch.dtype) -> Model:
    """The same, wrapped."""
    return zoo.model_of(family) if dtype == torch.float32 else Model(raw_of(family, dtype))


def case_of(model: Model, spec: str = "block", wrapper: Path | None = None, compress: str = "") -> gates.Case:
    strategy = cast(Strategy, registry.build("strategy", spec.replace("WRAPPER", str(wrapper))))
    store = cast(Store, registry.build("store", "memory"))
    engine = Engine(model, TextFormat.of(zoo.tokenizer()), strategy, store, compress=compress)
    return gates.Case.of(engine, DOCUMENTS, QUESTION, noise_of(model.hf))


@functools.cache
def noise_of(hf: Any) -> float:
    """The floor of the prompt, measured once for each model."""
    text = TextFormat.of(zoo.tokenizer())
    parts = [text.system_ids(), *map(text.document_ids, DOCUMENTS), text.question_ids(QUESTION)]
    return proof.own(hf, torch.cat(parts)).floor


def failed(case: gates.Case, *names: str) -> list[gates.GateResult]:
    return [r for r in gates.results(case, *names) if not r.passed]


@pytest.mark.parametrize("spec", MATRIX)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_strategy_passes_on_every_family(family: str, spec: str, wrapper: Path) -> None:
    """Danger: a method is inexact on an architecture that nobody looked at."""
    gates_of = OF_STRATEGIES if family == "llama" else OF_BOTH
    assert not failed(case_of(model_of(family, torch.float32), spec, wrapper), *gates_of)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.bfloat16) for family in zoo.FAMILIES),
        *((family, dtype) for family in DIFFERENT[::3] for dtype in (torch.float32, torch.float16)),
    ],
)
def test_all_gates_pass_with_margin(family: str, dtype: torch.dtype) -> None:
    """Danger: the gates refuse honest models, or come so close to it that they do on another machine."""
    engine = case_of(model_of(family, dtype)).engine
    results = gates.run(engine, DOCUMENTS, QUESTION)
    assert [r.gate for r in results] == [f"G{i}" for i in range(1, 10)]
    assert not [r for r in results if r.worst > r.tolerance / 1.5]


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(
    "spec", ["kvlink:links=5", "kv_packet:wrapper=WRAPPER", "ape", "cacheblend:ratio=0.4", "prompt_cache:slot=64"]
)
def test_strategies_pass_in_half_precision(spec: str, dtype: torch.dtype, wrapper: Path) -> None:
    """Danger: what scales attention, moves documents or computes among reused rows is noisier than the floor allows."""
    assert not failed(case_of(model_of("llama", dtype), spec, wrapper), *OF_STRATEGIES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", DIFFERENT)
@pytest.mark.parametrize("fault", zoo.FAULTS)
def test_the_proof_refuses_real_faults(
    fault: str, family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: in half precision wrong keys and wrong masks pass for rounding (W4)."""
    zoo.FAULTS[fault](monkeypatch)
    with pytest.raises(ModelError, match="refused"):
        wrap(raw_of(family, dtype), zoo.tokenizer())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", DIFFERENT[1::2])
@pytest.mark.parametrize("fault", zoo.FAULTS)
def test_the_gates_refuse_real_faults(
    fault: str, family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: `kvilt verify` says that all is well, whatever happens to keys and masks (W4)."""
    zoo.FAULTS[fault](monkeypatch)
    case = case_of(Model(raw_of(family, dtype)), "random:ratio=0.3")
    assert [r.gate for r in failed(case, "G9")] == ["G9"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", ["", *zoo.FAULTS])
def test_the_proof_has_teeth_on_a_trained_model(
    fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: thresholds that fit random models alone; trained ones look at positions in their own way (W4)."""
    hf, tokenizer = builtin(dtype)
    if not fault:
        alone, model = proof.own(hf), wrap(hf, tokenizer)
        assert proof.deviation(*trial(model, alone)) < proof.tolerance(alone.floor) / 2
        return
    zoo.FAULTS[fault](monkeypatch)
    with pytest.raises(ModelError, match="refused"):
        wrap(hf, tokenizer)


@functools.cache
def builtin(dtype: torch.dtype) -> tuple[Any, Any]:
    model, tokenizer = load_model("builtin", dtype=str(dtype).removeprefix("torch."))
    return model.hf, tokenizer


def trial(model: Model, alone: proof.Own) -> tuple[torch.Tensor, torch.Tensor]:
    reused, at = proof._reused(model, proof._trial(model.hf))
    return reused, alone.logits[at]


@pytest.mark.parametrize("compress", ["", "int4", "int8", "keydiff:keep=0.3"])
@pytest.mark.parametrize(
    "spec", ["cacheblend:sink=system", "random", "a3:sink=4", "prophetkv", "epic:tokens=16,sink=system", "epic"]
)
def test_recomputing_all_is_exact_whatever_is_stored(spec: str, compress: str) -> None:
    """Danger: a first document that is quantised, pruned or encoded behind a sink passes for the exact prefix (W6)."""
    assert not failed(case_of(zoo.model_of("llama"), spec, compress=compress), "G4")


def test_a_prefix_that_is_not_exact_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: G4 looks at plans that compute everything, and never at what a strategy leaves out (W6)."""
    from kvilt.strategies import selection

    for spec, compress in (("cacheblend", "int4"), ("cacheblend:sink=4", ""), ("random", "keydiff:keep=0.3")):
        case = case_of(zoo.model_of("llama"), spec, compress=compress)
        with monkeypatch.context() as patch:
            patch.setattr(selection, "has_exact_prefix", lambda prompt: True)
            assert failed(case, "G4"), spec


def test_gates_leave_the_store_alone() -> None:
    """Danger: `gates.run(engine)` deletes the user's documents, counts hits or fills the store (D8)."""
    engine = case_of(zoo.model_of("llama")).engine
    engine.encode(DOCUMENTS)
    before = sorted((e.key, e.hits, e.used) for e in engine.store.entries())
    gates.run(engine, DOCUMENTS, QUESTION)
    assert sorted((e.key, e.hits, e.used) for e in engine.store.entries()) == before


def test_rounding_in_the_store_is_no_fault() -> None:
    """Danger: a bfloat16 checkpoint that is computed in float32 fails on rows that are stored in bfloat16."""
    model = Model(zoo.hf_model("llama"))
    model.stored = torch.bfloat16
    assert not failed(gates.Case.of(case_of(model).engine, DOCUMENTS, QUESTION))
    assert model.stored == torch.bfloat16


def test_a_noisy_model_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: a model whose own attention back ends disagree is proved by nothing, and accepted (W4)."""
    with pytest.raises(ModelError, match=r"differ by 30%.*Try float32"):
        proof.check(zoo.model_of("llama"), proof.Own(torch.zeros(48, 4), 0.3))
    with pytest.raises(ModelError, match="refused"):
        proof.check(zoo.model_of("llama"), proof.Own(torch.full((48, zoo.VOCABULARY), torch.nan), 0.01))


def test_methods_really_differ(wrapper: Path) -> None:
    """Danger: a matrix in which every method gives the same logits proves nothing."""
    specs = [
        *(
            "full",
            "block",
            "kvlink:links=5",
            "kv_packet:wrapper=WRAPPER",
            "prompt_cache:slot=64",
            "epic:tokens=3",
            "ape",
        ),
        *("random", "cacheblend", "cacheblend:score=v", "a3", "prophetkv", "infoflow", "infoflow:reorder=true"),
        *("sam_kv:init=2,local=4,block=4", "sam_kv:init=2,local=4,block=4,update=fusion"),
        *("turborag", "turborag:positions=composite"),
    ]
    cases = [case_of(zoo.model_of("llama"), s, wrapper) for s in specs]
    logits = [c.engine.answer(QUESTION, DOCUMENTS, max_new_tokens=1).logits for c in cases]
    gaps = [
        float((a - b).abs().max()) for i, a in enumerate(logits) for b in logits[:i] if a is not None and b is not None
    ]
    assert min(gaps) > 1e-2


def test_only_recompute_free_plans_without_links_are_suffixes(wrapper: Path) -> None:
    """Danger: a plan that needs a mask is handed to a kernel or an engine that has none."""
    suffix = {s: case_of(zoo.model_of("llama"), s, wrapper).plan().is_suffix for s in MATRIX}
    recomputing = {
        s for s in MATRIX if s.split(":")[0] in ("random", "ranked", "cacheblend", "a3", "prophetkv", "infoflow")
    }
    assert {s for s, yes in suffix.items() if not yes} == recomputing | {
        "kvlink:links=1",
        "kvlink:links=5",
        "anchors:chunk=8,anchors=2,links=5",
        "linked_packet:wrapper=WRAPPER,layout=slots",
        "epic:tokens=3",
        "epic:tokens=16,sink=system",
    }

"""The same proofs on a GPU: every strategy on every family, real faults, and documents that a CPU has encoded."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import cast

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
from kvilt.model.identity import Identity, tokenizer_digest
from kvilt.model.loading import load_model, wrap
from kvilt.model.model import Model
from kvilt.stores.store import Store
from kvilt.strategies.base import Strategy

pytestmark = pytest.mark.cuda
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="session")
def wrapper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random learned vectors for the tiny models (64 channels)."""
    return wrapper_file(tmp_path_factory.mktemp("wrapper"), links=4)


@functools.cache
def model_of(family: str, dtype: torch.dtype) -> Model:
    """A tiny model on the GPU, made once for each dtype."""
    hf = zoo.hf_model(family).to(device="cuda", dtype=dtype)
    return Model(hf, tokenizer_digest(zoo.tokenizer()), Identity(hf))


def engine_on(model: Model, spec: str, wrapper: Path | None = None, store: Store | None = None) -> Engine:
    strategy = cast(Strategy, registry.build("strategy", spec.replace("WRAPPER", str(wrapper))))
    made = store or cast(Store, registry.build("store", "memory"))
    return Engine(model, TextFormat.of(zoo.tokenizer()), strategy, made)


@functools.cache
def noise_of(model: Model) -> float:
    """The floor of the prompt, measured once for each model."""
    return gates.Case.of(engine_on(model, "full"), DOCUMENTS, QUESTION).floor


def failed(model: Model, spec: str, wrapper: Path | None, *names: str) -> list[gates.GateResult]:
    case = gates.Case.of(engine_on(model, spec, wrapper), DOCUMENTS, QUESTION, noise_of(model))
    return [r for r in gates.results(case, *names) if not r.passed]


@pytest.mark.parametrize("spec", MATRIX)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_strategy_passes_on_every_family(family: str, spec: str, wrapper: Path) -> None:
    """Danger: kernels, streams or pinned copies of a GPU make a method inexact."""
    assert not failed(model_of(family, torch.bfloat16), spec, wrapper, "G4", "G6", "G7", "G8", "G9")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "spec", ["block", "cacheblend:ratio=0.4", "sam_kv:init=2,local=4,block=3,update=fusion", "ape"]
)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_all_gates_pass_in_every_dtype(family: str, spec: str, dtype: torch.dtype) -> None:
    """Danger: the gates refuse honest models on a GPU, whose kernels are noisier than a CPU's."""
    assert not failed(model_of(family, dtype), spec, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama-linear-mqa", "glm-interleaved"])
@pytest.mark.parametrize("fault", zoo.FAULTS)
def test_the_proof_refuses_real_faults(
    fault: str, family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: in half precision wrong keys and wrong masks pass for rounding (W4)."""
    raw = zoo.hf_model(family).to(device="cuda", dtype=dtype)
    zoo.FAULTS[fault](monkeypatch)
    with pytest.raises(ModelError, match="refused"):
        wrap(raw, zoo.tokenizer())


@pytest.mark.parametrize("compress", ["", "int8", "int4"])
@pytest.mark.parametrize("overlap", [False, True])
def test_loading_from_a_second_thread_changes_nothing(compress: str, overlap: bool) -> None:
    """Danger: a layer is computed before its rows have arrived, or a pinned buffer is filled again too early."""
    model = model_of("llama", torch.bfloat16)
    engine = engine_on(model, "random:ratio=0.3").with_strategy("random:ratio=0.3", compress)
    plan = engine.plan(QUESTION, DOCUMENTS * 4)
    with model.run(plan, room=1, overlap=overlap) as run:
        logits = run.logits.clone()
    assert proof.deviation(logits, model.score(plan)[-1]) <= proof.tolerance(noise_of(model))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_a_corpus_encoded_on_a_cpu_is_hit_on_a_gpu(dtype: str, model_dir: Path) -> None:
    """Danger: every document is encoded once for each kind of machine, or hit and wrong."""
    store = cast(Store, registry.build("store", "memory"))
    cpu, gpu = (load_model(str(model_dir), d, device)[0] for d, device in (("float32", "cpu"), (dtype, "cuda")))
    engine_on(cpu, "block", store=store).encode(DOCUMENTS)
    engine = engine_on(gpu, "block", store=store)
    answer = engine.answer(QUESTION, DOCUMENTS, max_new_tokens=1)
    assert (answer.usage.hits, answer.usage.misses) == (len(DOCUMENTS), 0)
    own = gates.Case.of(engine_on(gpu, "block"), DOCUMENTS, QUESTION)
    cold = own.engine.answer(QUESTION, DOCUMENTS, max_new_tokens=1)
    assert answer.logits is not None
    assert cold.logits is not None
    assert proof.deviation(answer.logits, cold.logits) <= 2 * proof.tolerance(own.floor)

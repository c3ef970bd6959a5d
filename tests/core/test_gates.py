"""G1-G9 for every strategy on every model family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zoo
from kvilt import registry
from kvilt.check import gates
from kvilt.engine.engine import Engine
from kvilt.engine.text import TextFormat
from kvilt.stores.memory import MemoryStore
from kvilt.strategies.base import Strategy
from kvilt.strategies.wrapper import Wrapper
from kvilt.types import Document

# A new strategy is one line here.
MATRIX = [
    "full",
    "block",
    "block:sink=system",
    "block:sink=4",
    "naive",
    "kvlink:links=0",
    "kvlink:links=1",
    "kvlink:links=5",
    "anchors:chunk=8,anchors=2",
    "anchors:chunk=8,anchors=2,links=5",
    "kv_packet:wrapper=WRAPPER",
    "linked_packet:wrapper=WRAPPER,layout=slots",
    "linked_packet:wrapper=WRAPPER,layout=tail",
    "prompt_cache:slot=64",
    "prompt_cache:consecutive=true",
    "epic:tokens=0",
    "epic:tokens=3",
    "epic:tokens=16,sink=system",
    "ape",
    "ape:temperature=0.8,scale=0.9",
    "auto:reuse=block",
    "auto:reuse=kv_packet:wrapper=WRAPPER",
    "random:ratio=0.3,seed=1",
    "cacheblend",
    "cacheblend:ratio=0.4,stages=3",
    "cacheblend:ratio=0.3,score=v,sink=4",
    "a3:ratio=0.3",
    "prophetkv",
    "prophetkv:ratio=0.5,sink=system",
    "infoflow:boundary=2",
    "infoflow:ratio=0.3,reorder=true",
    "sam_kv",
    "sam_kv:init=2,local=4,block=4",
    "sam_kv:init=2,local=4,block=3,update=fusion",
    "sam_kv:init=4,local=4,block=4,layers=1-2,update=fusion,theta=0.4,sink=system",
    "turborag",
    "turborag:start=7,end=9,positions=composite",
]
DOCUMENTS = [
    Document("Ada Lorn was born in Tavik. She left it young.", title="Ada", id="ada"),
    Document("Brint Labs is in Orsa.", id="brint"),
    Document("The river Sel runs from Orsa to the sea, slowly.", title="Sel", id="sel"),
]
QUESTION = "Where was Ada Lorn born?"


@pytest.fixture(scope="session")
def wrapper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random learned vectors for the tiny models (64 channels)."""
    path = tmp_path_factory.mktemp("wrapper") / "wrapper.safetensors"
    torch.manual_seed(5)
    Wrapper(*(torch.randn(8, 64) * 0.4 for _ in range(2)), links=torch.randn(4, 64) * 0.4).save(path)
    return path


def engine_of(family: str, spec: str, wrapper: Path) -> Engine:
    strategy = registry.build("strategy", spec.replace("WRAPPER", str(wrapper)))
    assert isinstance(strategy, Strategy)
    return Engine(zoo.model_of(family), TextFormat.of(zoo.tokenizer()), strategy, MemoryStore(budget="1GB"))


@pytest.mark.parametrize("spec", MATRIX)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_gates(family: str, spec: str, wrapper: Path) -> None:
    results = gates.run(engine_of(family, spec, wrapper), DOCUMENTS, QUESTION)
    assert [r.gate for r in results] == [f"G{i}" for i in range(1, 10)]
    assert not [r for r in results if not r.passed]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", ["block", "kvlink:links=5", "kv_packet:wrapper=WRAPPER", "ape"])
def test_gates_in_half_precision(dtype: torch.dtype, spec: str, wrapper: Path) -> None:
    """The documented tolerances hold: 0.02 of the largest logit in float16, 0.1 in bfloat16."""
    from kvilt.model.model import Model

    engine = engine_of("llama", spec, wrapper)
    half = Engine(Model(zoo.hf_model("llama").to(dtype)), engine.text, engine.strategy, MemoryStore())
    assert not [r for r in gates.run(half, DOCUMENTS, QUESTION) if not r.passed]


def test_methods_really_differ(wrapper: Path) -> None:
    """A matrix in which every method gave the same logits would prove nothing."""
    specs = [
        "full",
        "block",
        "kvlink:links=5",
        "kv_packet:wrapper=WRAPPER",
        "prompt_cache:slot=64",
        "epic:tokens=3",
        "ape",
        "random",
        "cacheblend",
        "cacheblend:score=v",
        "a3",
        "prophetkv",
        "infoflow",
        "infoflow:reorder=true",
        "sam_kv:init=2,local=4,block=4",
        "sam_kv:init=2,local=4,block=4,update=fusion",
        "turborag",
        "turborag:positions=composite",
    ]
    logits = [engine_of("llama", s, wrapper).answer(QUESTION, DOCUMENTS, max_new_tokens=1).logits for s in specs]
    gaps = [
        float((a - b).abs().max()) for i, a in enumerate(logits) for b in logits[:i] if a is not None and b is not None
    ]
    assert min(gaps) > 1e-2


def test_only_recompute_free_plans_without_links_are_suffixes(wrapper: Path) -> None:
    suffix = {s: engine_of("llama", s, wrapper).plan(QUESTION, DOCUMENTS).is_suffix for s in MATRIX}
    recomputing = {s for s in MATRIX if s.split(":")[0] in ("random", "cacheblend", "a3", "prophetkv", "infoflow")}
    assert {s for s, yes in suffix.items() if not yes} == recomputing | {
        "kvlink:links=1",
        "kvlink:links=5",
        "anchors:chunk=8,anchors=2,links=5",
        "linked_packet:wrapper=WRAPPER,layout=slots",
        "epic:tokens=3",
        "epic:tokens=16,sink=system",
    }

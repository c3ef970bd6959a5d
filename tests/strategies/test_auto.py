"""auto: the best strategy that a model has weights for, and said so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from core_kit import DOCUMENTS, QUESTION, ask, engine_of, off_dense, text_format
from kvilt.engine.engine import Engine
from kvilt.errors import SpecError
from kvilt.model.loading import load_model
from kvilt.registry import build
from kvilt.strategies.anchors import Anchors
from kvilt.strategies.auto import Auto
from kvilt.strategies.block import BlockAttention
from kvilt.strategies.kvlink import DESCRIPTION, KVLink, LinkTokens
from kvilt.types import ModelInfo

LINKS = LinkTokens(((20, 21), (22, 23), (24, 25)), (5,), (6,))


def info(folder: Path | None) -> ModelInfo:
    made = zoo.model_of("llama").info(system=(0, 3, 90), sink=0, reserved=tuple(range(6, 70)))
    return ModelInfo(**{**vars(made), "directory": None if folder is None else str(folder)})


def described(folder: Path, tokens: LinkTokens) -> Any:
    """What auto chooses beside this description."""
    (folder / DESCRIPTION).write_text(tokens.to_json())
    return Auto().bind(info(folder)).method


def test_without_weights_it_is_the_best_strategy_without_training(tmp_path: Path) -> None:
    """Danger: untrained link tokens are used because the tokenizer has reserved ones."""
    for folder in (None, tmp_path):
        bound = Auto().bind(info(folder))
        assert bound.method == BlockAttention(sink="system")
        assert bound.encoding is not None
        assert bound.encoding.before == (0, 3, 90)


def test_trained_tokens_beside_the_model_are_used(tmp_path: Path) -> None:
    """Danger: a fine-tuned checkpoint is served as if nobody had trained it, or with fewer links than it has."""
    assert described(tmp_path, LINKS) == KVLink(links=2, tokens=LINKS)
    none = LinkTokens((), (5,), (6,))
    assert described(tmp_path, none) == KVLink(links=0, tokens=none)
    anchored = LinkTokens(((20,),), (5,), (6,), (30, 31, 32), 16)
    found = described(tmp_path, anchored)
    assert isinstance(found, Anchors)
    assert (found.links, found.chunk, found.anchors) == (1, 16, 3)
    assert found.encoding is not None
    assert found.encoding.anchors == (30, 31, 32)
    (tmp_path / DESCRIPTION).write_text("{")
    with pytest.raises(SpecError, match=DESCRIPTION):
        Auto().bind(info(tmp_path))


def test_an_answer_is_that_of_the_chosen_strategy_and_says_which(tmp_path: Path) -> None:
    """Danger: documents are encoded for one strategy and planned by another; nobody can tell what ran."""
    engine = engine_of("auto")
    chosen, plain = ask(engine, tokens=3), ask(engine.with_strategy("block:sink=system"), tokens=3)
    assert torch.equal(chosen.logits, plain.logits)  # type: ignore[arg-type]
    assert (chosen.tokens, plain.usage.hits) == (plain.tokens, 3)
    assert chosen.usage.note == str(build("strategy", "block:sink=system"))
    assert plain.usage.note == ""
    assert off_dense(engine.model, engine.plan(QUESTION, DOCUMENTS)) < 1e-4
    zoo.save(tmp_path)
    (tmp_path / DESCRIPTION).write_text(LINKS.to_json())
    model, _ = load_model(str(tmp_path))
    strategy: Any = build("strategy", "auto")
    linked = Engine(model, text_format(), strategy, engine.store)
    answer = ask(linked, tokens=3)
    assert answer.usage.note.startswith("kvlink:links=2")
    assert torch.equal(answer.logits, ask(linked.with_strategy("kvlink:links=2"), tokens=3).logits)  # type: ignore[arg-type]
    assert {20, 21, 22, 23, 24, 25, 5, 6} <= set(linked.plan(QUESTION, DOCUMENTS).computed_tokens.tolist())


def test_it_has_no_options_and_its_name_is_its_configuration() -> None:
    """Danger: what auto once predicted is still accepted, and does nothing."""
    for wrong in ("auto:reuse=block", "auto:method=block"):
        with pytest.raises(SpecError, match="has no option"):
            engine_of(wrong)
    assert engine_of("auto").label == str(engine_of("auto").strategy) == "auto"

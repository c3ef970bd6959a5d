"""Rows of earlier prompts: the next prompt goes on from them, and nobody can tell but by the time it took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core_kit import DOCUMENTS, QUESTION, engine_of, wrapper_file
from kvilt.engine.engine import Engine
from kvilt.engine.streaming import Cancelled
from kvilt.serve.kept import Kept, Placing
from kvilt.types import Answer

NEW = 8
SPECS = [
    "full", "naive", "block", "block:sink=system", "epic:tokens=4", "kvlink:links=2", "cacheblend:ratio=0.3",
    "prophetkv:ratio=0.3", "random:ratio=0.3", "ape", "turborag", "sam_kv", "kv_packet:wrapper=WRAPPER",
    "query_lora:adapter=WRAPPER.lora", "anchors:chunk=8,anchors=2",
]  # fmt: skip
FIRST = {"role": "user", "content": QUESTION}


def ask(engine: Engine, kept: Kept, question: Any, documents: Any = DOCUMENTS, owner: str = "me") -> tuple[Answer, int]:
    """An answer, and how many rows of it were there."""
    placing = Placing(kept, owner)
    made = engine.answer(question, documents, max_new_tokens=NEW, placing=placing, allow_empty=True)
    return made, placing.rows


def turns(answer: Answer, question: str) -> list[dict[str, str]]:
    """The chat one turn later."""
    return [FIRST, {"role": "assistant", "content": answer.text}, {"role": "user", "content": question}]


@pytest.mark.parametrize("spec", SPECS)
def test_a_conversation_goes_on_as_if_it_began_anew(spec: str, tmp_path: Path) -> None:
    """Danger: the second turn is answered from rows that its own prompt would not have."""
    engine = engine_of(spec.replace("WRAPPER", str(wrapper_file(tmp_path))))
    kept = Kept(engine.model, 1 << 30)
    engine.answer(QUESTION, DOCUMENTS, max_new_tokens=1)  # everything is encoded
    first, none = ask(engine, kept, [FIRST])
    assert none == 0
    prompts: list[Any] = [
        turns(first, "When?"),
        QUESTION,
        "And who else was there?",
        [*turns(first, "Why?"), {"role": "assistant", "content": "Because."}, {"role": "user", "content": "Really?"}],
    ]
    rows = []
    for prompt in prompts:
        wanted = engine.answer(prompt, DOCUMENTS, max_new_tokens=NEW)
        made, found = ask(engine, kept, prompt)
        rows.append(found)
        assert made.tokens == wanted.tokens
        assert made.logits is not None
        assert wanted.logits is not None
        assert torch.allclose(made.logits, wanted.logits, atol=1e-3)
        assert made.usage.reused_tokens >= found
        total = made.usage.reused_tokens + made.usage.computed_tokens
        assert total == wanted.usage.reused_tokens + wanted.usage.computed_tokens
    if spec in ("full", "naive", "block", "block:sink=system", "epic:tokens=4"):
        documents = sum(len(engine.text.document_ids(d)) for d in DOCUMENTS)
        assert all(found >= documents for found in rows)


def test_other_prompts_share_nothing() -> None:
    """Danger: rows of other documents, another order, another tenant or strategy are taken for one's own."""
    engine = engine_of("block")
    kept = Kept(engine.model, 1 << 30)
    ask(engine, kept, QUESTION)
    system = len(engine.info.system)
    for documents, owner, most in (
        (DOCUMENTS[::-1], "me", system),
        (DOCUMENTS[1:], "me", system),
        (DOCUMENTS, "you", 0),
    ):
        made, rows = ask(engine, kept, QUESTION, documents, owner)
        assert rows <= most
        assert made.tokens == engine.answer(QUESTION, documents, max_new_tokens=NEW).tokens


def test_memory_is_bounded_and_given_back() -> None:
    """Danger: every prompt leaves its rows behind until the machine has no memory left."""
    engine = engine_of("block")
    engine.model.pool.clear()  # no larger buffer of an earlier test
    one = engine.model.bytes_per_token * 1024
    for budget, most in ((0, 0), (2 * one, 2 * one)):
        kept = Kept(engine.model, budget)
        for number in range(4):
            ask(engine, kept, f"Question {number}?", [f"Document {number} alone."])
        assert sum(h.run.placed.buffer.nbytes for h in kept.held) <= most
        assert bool(kept.held) == bool(most)


def test_a_prompt_that_is_given_up_leaves_nothing() -> None:
    """Danger: half an answer's rows are taken for a whole prompt's, or its buffer is lost."""

    class Stops:
        def put(self, tokens: Any) -> None:
            if tokens.numel():
                raise Cancelled

        def end(self) -> None: ...

    engine = engine_of("block")
    kept = Kept(engine.model, 1 << 30)
    first, _ = ask(engine, kept, [FIRST])
    with pytest.raises(Cancelled):
        engine.answer(turns(first, "When?"), DOCUMENTS, placing=Placing(kept, "me"), streamer=Stops())
    assert not kept.held
    wanted = engine.answer(turns(first, "When?"), DOCUMENTS, max_new_tokens=NEW)
    assert ask(engine, kept, turns(first, "When?"))[0].tokens == wanted.tokens


def test_an_answer_that_does_not_fit_behind_kept_rows_is_placed_anew() -> None:
    """Danger: the buffer of the first prompt is too small for a long answer to the second, which is written over its end."""
    engine = engine_of("block")
    engine.model.pool.clear()  # no larger buffer of an earlier test
    kept = Kept(engine.model, 1 << 30)
    ask(engine, kept, QUESTION)
    placing = Placing(kept, "me")
    wanted = engine.answer(QUESTION, DOCUMENTS, max_new_tokens=1500, eos_token_id=[])
    made = engine.answer(QUESTION, DOCUMENTS, max_new_tokens=1500, placing=placing, eos_token_id=[])
    assert made.tokens == wanted.tokens
    assert placing.rows == 0

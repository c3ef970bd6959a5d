"""APE: documents side by side, and attention in two parts."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from core_kit import DOCUMENTS, QUESTION, TOLERANCE, engine_of, fake, ids, off, prompt, run
from kvilt.errors import SpecError
from kvilt.model import attention, twopart
from kvilt.model.twopart import TwoPart
from kvilt.plan import ContextScaling, Plan, Segment
from kvilt.strategies.ape import Ape, ApeProfile
from kvilt.types import Document

SPEC = "ape:temperature=0.7,scale=1.2"


def continued(plan: Plan, tokens: Tensor) -> Plan:
    """The plan with the first tokens of an answer."""
    return replace(plan, segments=(*plan.segments, Segment(tokens, plan.end, name="answer")))


def test_documents_share_one_range_behind_the_system_part() -> None:
    """Danger: the question stands inside the longest document, or a document moves with the others' lengths."""
    a, b, c = fake([1, 2, 3, 4]), fake([5, 6]), fake([7, 8, 9])
    plan = Ape().plan(prompt(ids(2), b, a, c, system=fake([80, 81, 82])), never)
    assert [s.start for s in plan.segments] == [0, 3, 3, 3, 7]
    assert plan.is_suffix
    assert bool(plan.visible().all(-1)[-1])
    assert plan.context_rows is not None
    assert plan.context_rows.tolist() == [False] * 3 + [True] * 9 + [False] * 2
    engine = engine_of(SPEC)
    assert engine.encoder.encoding.before == engine.info.system
    assert not engine.encoder.encoding.keep


def never(*_: Any) -> Any:
    raise AssertionError("APE has nothing to look at first")


def test_a_document_that_is_never_stored_is_computed_after_the_others() -> None:
    """Danger: it is computed beside them, and half of it sees half of each."""
    engine = engine_of(SPEC)
    given = [replace(DOCUMENTS[0], store=False), *DOCUMENTS[1:]]
    plan = engine.plan(QUESTION, given)
    system, longest = len(engine.info.system), len(engine.text.document_ids(DOCUMENTS[2]))
    assert [s.start for s in plan.segments][:4] == [0, system, system, system + longest]
    assert off(run(engine.model, plan), engine.model.dense(plan.dense())[-1]) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "llama-linear-mqa", "glm-interleaved", "qwen3"])
def test_decoded_tokens_attend_in_two_parts_too(family: str) -> None:
    """Danger: the first token is right, and from the second on attention is plain (or answers count as context)."""
    engine, tokens = engine_of(SPEC, family=family), ids(6, 3)
    plan = engine.plan(QUESTION, DOCUMENTS)
    with engine.model.run(plan, room=len(tokens)) as made:
        ahead = made.peek(tokens)  # several in one pass
        steps = [made.logits, *(made.step(t.view(1, 1))[0] for t in tokens)]
    wanted = engine.model.dense(continued(plan, tokens).dense())[-len(steps) :]
    assert off(torch.stack(steps), wanted) < TOLERANCE
    assert off(ahead, wanted[1:]) < TOLERANCE
    plain = engine.model.dense(replace(continued(plan, tokens), context=None).dense())
    assert off(torch.stack(steps), plain[-len(steps) :]) > 1e-2


def test_temperature_and_scale_one_are_plain_attention() -> None:
    """Danger: the neutral setting is none, and every figure for it is that of another method."""
    model, plan = zoo.model_of("llama"), engine_of("ape:temperature=1,scale=1").plan(QUESTION, DOCUMENTS)
    plain = run(model, replace(plan, context=None))
    assert torch.equal(run(model, plan), plain)
    assert off(model.dense(plan.dense())[-1], plain) < TOLERANCE
    context = replace(plan, context=ContextScaling(0.5)).context_rows
    assert context is not None
    with attention.using(TwoPart(ContextScaling(), context)):
        assert off(run(model, plan), plain) < TOLERANCE


@pytest.mark.parametrize(("temperature", "scale"), [(0.9, 0.9), (0.5, 1.0), (1.4, 0.3)])
def test_two_attentions_are_merged_as_the_authors_merge_them(temperature: float, scale: float) -> None:
    """Danger: both of our formulations agree on the wrong formula; here each part is an attention of its own."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 8), torch.randn(10, 8), torch.randn(10, 8)
    context = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0, 0, 0], dtype=torch.bool)
    out = []
    for i, q in enumerate(query):
        seen = torch.arange(10) <= 7 + i
        logits = key @ q / 8**0.5
        parts = []
        for part, t, weight in ((context, temperature, scale * temperature), (~context & seen, 1.0, 1.0)):
            inner = logits[part] / t
            parts.append((weight * inner.exp().sum().log(), inner.softmax(0) @ value[part]))
        a, b = parts[0][0].exp(), parts[1][0].exp()
        out.append((a * parts[0][1] + b * parts[1][1]) / (a + b))
    hook = TwoPart(ContextScaling(temperature, scale), context)
    found = hook(0, query[None, None], key[None, None], value[None, None], None, None)
    torch.testing.assert_close(found[0, 0], torch.stack(out))


@pytest.mark.parametrize("masked", [True, False])
def test_other_devices_do_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    """Danger: a long question is cut, and its pieces see other rows."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 17, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    mask = torch.ones(17, 40, dtype=torch.bool).tril(23)[None, None] if masked else None
    whole = TwoPart(ContextScaling(0.7, 1.1), torch.arange(40) < 20)(0, query, key, value, mask, 0.3)
    monkeypatch.setattr(twopart, "SCORES", 4 * 40 * 5)
    monkeypatch.setattr(twopart, "_summed", twopart._pieced)
    pieced = TwoPart(ContextScaling(0.7, 1.1), torch.arange(40) < 20)(0, query, key, value, mask, 0.3)
    torch.testing.assert_close(pieced, whole)


def test_what_tokens_see_is_worked_out_for_every_pass() -> None:
    """Danger: a later pass of the same size goes by the mask of the one before, or a step by one row too few."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 41, 8), torch.randn(1, 2, 41, 8)
    masks = [torch.ones(5, 40, dtype=torch.bool).tril(35 - n)[None, None] for n in range(2)]
    context = torch.arange(41) < 20
    hook = TwoPart(ContextScaling(0.7, 1.1), context)
    for rows, mask in ((40, masks[0]), (40, masks[1]), (40, None), (41, None), (40, masks[0])):
        given = (0, query, key[:, :, :rows], value[:, :, :rows], mask, 0.3)
        assert torch.equal(hook(*given), TwoPart(ContextScaling(0.7, 1.1), context)(*given))


def test_watching_a_pass_does_not_change_it() -> None:
    """Danger: a probe's hook takes the place of the plan's own, and the pass it watches is another one."""
    engine = engine_of(SPEC)
    plan, layers = engine.plan(QUESTION, DOCUMENTS), []
    with attention.using(lambda layer, *_: layers.append(layer)):
        watched = run(engine.model, plan)
    assert layers == [0, 1, 2, 3]
    assert torch.equal(watched, run(engine.model, plan))


def test_a_profile_is_for_one_model(tmp_path: Path) -> None:
    """Danger: numbers calibrated for one model silently serve another."""
    path, info = tmp_path / "ape.json", zoo.model_of("llama").info()
    ApeProfile(0.6, 1.1, info.digest, 0.5, 0.7).save(path)
    engine = engine_of(f"ape:profile={path}")
    assert repr(engine.strategy) == f"Ape(temperature=0.6, scale=1.1, profile='{path}')"
    assert engine.with_strategy(engine.strategy).strategy == engine.strategy
    assert engine.plan(QUESTION, DOCUMENTS).context == ContextScaling(0.6, 1.1)
    with pytest.raises(SpecError, match="calibrated for other weights"):
        engine_of(f"ape:profile={path}", family="qwen2")
    with pytest.raises(SpecError, match="not both"):
        engine_of(f"ape:profile={path},scale=0.5")


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"temperature": 1}', "NAN", "OTHER"])
def test_a_profile_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    """Danger: a file of something else is a traceback, or a temperature of zero."""
    good = asdict(ApeProfile(0.9, 0.9, zoo.model_of("llama").digest, 0.1, 0.2))
    changed = {"NAN": {**good, "scale": -1.0}, "OTHER": {**good, "format": "else"}}
    (tmp_path / "ape.json").write_text(json.dumps(changed[text]) if text in changed else text)
    with pytest.raises(SpecError, match="ape: "):
        engine_of(f"ape:profile={tmp_path / 'ape.json'}")
    with pytest.raises(SpecError, match="not readable"):
        engine_of(f"ape:profile={tmp_path / 'none.json'}")


@pytest.mark.parametrize("option", ["temperature=0", "scale=-1", "temperature=nan", "scale=inf"])
def test_impossible_numbers_are_refused(option: str) -> None:
    """Danger: a temperature of zero divides by it, a scale of zero leaves NaN where no context is seen."""
    with pytest.raises(SpecError, match="wants a number above 0"):
        engine_of(f"ape:{option}")


def test_an_answer_uses_it() -> None:
    """Danger: the engine runs another plan than the one that is tested."""
    given = [*DOCUMENTS, Document("One more.", id="more")]
    engine = engine_of(SPEC)
    answer = engine.answer(QUESTION, given, max_new_tokens=5)
    assert answer.logits is not None
    plan = engine.plan(QUESTION, given)
    wanted = engine.model.dense(continued(plan, torch.tensor(answer.tokens[:-1])).dense())[-len(answer.tokens) :]
    assert off(answer.logits, wanted[0]) < TOLERANCE
    assert wanted.argmax(-1).tolist() == list(answer.tokens)

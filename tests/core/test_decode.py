"""Decoding: sampling, stopping and streaming are transformers' own, over Kvilt's cache."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from core_kit import DOCUMENTS, QUESTION, engine_of, wrapper_file
from kvilt.engine.engine import Engine
from kvilt.engine.streaming import Pieces, stream
from kvilt.errors import DamagedCache, PromptError
from kvilt.model.decoding import Settings
from kvilt.model.model import Model
from kvilt.types import Answer, Usage


@pytest.fixture(scope="module")
def engine() -> Engine:
    """One engine for all: nothing here changes it."""
    return engine_of("block")


def ask(engine: Engine, **options: Any) -> tuple[int, ...]:
    return engine.answer(QUESTION, DOCUMENTS, **{"max_new_tokens": 8, **options}).tokens


# --- drafts ---


@pytest.mark.parametrize("spec", ["block", "kvlink:links=5", "prompt_cache:slot=64", "epic:tokens=3", "ape"])
@pytest.mark.parametrize("right", [0, 1, 5, 12])
def test_a_draft_changes_nothing_but_the_number_of_passes(spec: str, right: int, monkeypatch: Any) -> None:
    """Danger: a guess that is followed too far, or rows of a wrong guess that stay in the cache."""
    engine = engine_of(spec)
    plain = engine.answer(QUESTION, DOCUMENTS, max_new_tokens=12)
    other = tuple((t + 1) % 200 for t in plain.tokens[right:])
    steps = []
    step = Model.step
    monkeypatch.setattr(Model, "step", lambda *args: steps.append(1) or step(*args))  # type: ignore[func-returns-value]
    guessed = engine.answer(QUESTION, DOCUMENTS, max_new_tokens=12, draft=plain.tokens[:right] + other)
    assert guessed.tokens == plain.tokens
    assert len(steps) == max(0, len(plain.tokens) - 1 - right)


@pytest.mark.parametrize("spec", ["block", "epic:tokens=3", "ape"])
def test_a_draft_is_scored_as_teacher_forcing_scores_it(spec: str) -> None:
    """Danger: fidelity is measured on other logits than the strategy serves."""
    engine, draft = engine_of(spec), (90, 80, 100, 120)
    answer = engine.answer(QUESTION, DOCUMENTS, max_new_tokens=12, draft=draft)
    assert answer.drafted is not None
    torch.testing.assert_close(answer.drafted, engine.score(QUESTION, DOCUMENTS, draft), rtol=1e-3, atol=1e-3)
    short = engine.answer(QUESTION, DOCUMENTS, max_new_tokens=2, draft=draft)
    assert short.drafted is not None
    assert len(short.drafted) == len(short.tokens) == 2


# --- options ---


def test_sampling_is_reproducible_by_its_seed(engine: Engine) -> None:
    """Danger: a seed that is not used, or one that changes the sampling of other threads."""
    warm = {"temperature": 2.0, "max_new_tokens": 24}
    state = torch.random.get_rng_state()
    first, same, other = (ask(engine, seed=s, **warm) for s in (3, 3, 4))
    assert first == same != other
    assert torch.equal(state, torch.random.get_rng_state())


def test_greedy_is_the_default_and_temperature_zero(engine: Engine) -> None:
    """Danger: the model's own generation settings sample behind the caller's back."""
    assert ask(engine) == ask(engine, temperature=0) == ask(engine, do_sample=False, temperature=5.0)
    assert Settings.of(engine.model.hf, {}).config.do_sample is False
    assert Settings.of(engine.model.hf, {"top_p": 0.5}).config.do_sample is True
    assert Settings.of(engine.model.hf, {"do_sample": True}).config.do_sample is True
    assert Settings.of(engine.model.hf, {"seed": 1}).config.do_sample is False


def test_penalties_see_the_prompt_and_the_answer(engine: Engine) -> None:
    """Danger: options that look at earlier tokens get none, or get token 0 for every learned vector."""
    plain, never = ask(engine, max_new_tokens=24), ask(engine, max_new_tokens=24, no_repeat_ngram_size=1)
    prompt = set(torch.cat([s.tokens for s in engine.plan(QUESTION, DOCUMENTS).segments]).tolist())
    assert len(set(plain)) < 24
    assert len(set(never)) == len(never)
    assert not set(never) & prompt
    assert ask(engine, max_new_tokens=24, repetition_penalty=50.0) != plain


def test_learned_vectors_are_no_repeated_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: sixteen vectors per document count as token 0, which a repetition penalty then bans."""
    engine = engine_of(f"kv_packet:wrapper={wrapper_file(tmp_path)}")
    generate, seen = engine.model.hf.generate, []
    monkeypatch.setattr(engine.model.hf, "generate", lambda ids, **more: seen.append(ids) or generate(ids, **more))
    assert len(ask(engine, max_new_tokens=3, min_new_tokens=3)) == 3
    tokens = torch.cat([s.tokens for s in engine.plan(QUESTION, DOCUMENTS).segments])
    assert seen[0][0].tolist() == tokens[tokens >= 0].tolist()


def test_the_model_s_own_generation_settings_hold() -> None:
    """Danger: a checkpoint's stop tokens or penalties are ignored; or its beam search breaks decoding."""
    raw = zoo.hf_model("llama")
    engine = Engine(Model(raw), engine_of().text, engine_of().strategy, engine_of().store)
    first = ask(engine)[0]
    raw.generation_config.eos_token_id = [1, first]
    assert ask(engine) == (first,)
    raw.generation_config.num_beams, raw.generation_config.cache_implementation = 4, "static"
    assert ask(engine) == (first,)


def test_the_answer_stops_at_eos_and_not_before_it_may(engine: Engine) -> None:
    """Danger: an answer runs into the next turn, or ends empty."""
    told = ask(engine, max_new_tokens=24)
    stop = told[3]
    cut = told[: told.index(stop) + 1]
    assert ask(engine, max_new_tokens=24, eos_token_id=stop) == cut
    longer = ask(engine, max_new_tokens=24, eos_token_id=stop, min_new_tokens=len(cut) + 2)
    assert len(longer) >= len(cut) + 2


def test_stop_strings_stop(engine: Engine) -> None:
    """Danger: stop strings need the tokenizer; without it transformers refuses them."""
    told = ask(engine, max_new_tokens=24)
    text = engine.text.tokenizer.decode(told)
    stop = next(c for c in text[2:] if c.isascii() and c.isprintable() and not c.isspace())
    cut = ask(engine, max_new_tokens=24, stop_strings=[stop])
    assert engine.text.tokenizer.decode(cut) == text[: text.index(stop) + 1]


def test_options_that_cannot_be_served_are_refused_before_anything_is_computed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: a misspelt option is ignored, or found out after the whole prompt was computed."""
    monkeypatch.setattr(engine.model, "run", lambda *_: pytest.fail("the prompt was computed"))
    for options, message in (
        ({"temprature": 0.5}, "Did you mean 'temperature'"),
        ({"sed": 1}, "Did you mean 'seed'"),
        ({"validate": 1}, "unknown generation option 'validate'"),
        ({"num_beams": 4}, "num_beams=4 is not served"),
        ({"num_return_sequences": 2}, "num_return_sequences=2"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"penalty_alpha": 0.6}, "penalty_alpha"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"max_length": 50}, "use max_new_tokens"),
        ({"seed": "abc"}, "do not work"),
    ):
        with pytest.raises(PromptError, match=message):
            ask(engine, **options)


def test_the_caller_s_options_are_left_alone(engine: Engine) -> None:
    """Danger: a dictionary of options loses its seed after the first answer."""
    options = {"seed": 3, "temperature": 1.0, "do_sample": True}
    Settings.of(engine.model.hf, options)
    assert options == {"seed": 3, "temperature": 1.0, "do_sample": True}


# --- streams ---


def collect(items: Any, seconds: float = 30.0) -> list[Any]:
    """Everything of an iterator, in a thread: a stream that hangs fails the test instead of the run."""
    found: list[Any] = []

    def work() -> None:
        try:
            found.extend(items)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "the stream hangs"
    return found


def workers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "kvilt-stream"]


@pytest.mark.parametrize("seed", range(6))
def test_the_pieces_of_a_stream_join_to_the_answer(engine: Engine, seed: int) -> None:
    """Danger: half characters, lost spaces, or text that the final answer does not have."""
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 3.0, "seed": seed}
    *pieces, last = collect(engine.stream(QUESTION, DOCUMENTS, **options))
    assert isinstance(last, Answer)
    assert all(isinstance(p, str) and p for p in pieces)
    assert "".join(pieces) == last.text == engine.answer(QUESTION, DOCUMENTS, **options).text
    assert not workers()


def test_pieces_come_while_the_answer_is_generated(engine: Engine) -> None:
    """Danger: a stream that waits for the end is no stream."""
    text = "Ada was born in Tävik \u2014 \U0001f60a, said\nSel. "
    ids = engine.text.tokenizer.encode(text, add_special_tokens=False)
    pieces, out = Pieces(engine.text.tokenizer), []
    for i in ids:
        pieces.put(torch.tensor([i]))
        while not pieces.items.empty():
            out.append(pieces.items.get())
    assert "".join(out) == text
    assert len(out) == len(text)  # one token per byte: every character as soon as it is whole


def test_what_goes_wrong_in_a_stream_is_raised_to_its_reader(engine: Engine) -> None:
    """Danger: the worker dies and the reader waits for ever."""
    assert isinstance(collect(engine.stream("", DOCUMENTS))[-1], PromptError)
    assert isinstance(collect(engine.stream(QUESTION, DOCUMENTS, num_beams=3))[-1], PromptError)

    def half(pieces: Pieces) -> Answer:
        pieces.put(torch.tensor([100]))
        raise DamagedCache("0" * 64, "a bit flipped")

    found = collect(stream(half, engine.text.tokenizer))
    assert isinstance(found[-1], DamagedCache)
    assert len(found) == 2
    assert not workers()


def test_closing_a_stream_stops_the_work(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: a reader who went away leaves a thread that generates to the end."""
    step, steps = engine.model.step, []

    def slow(*given: Any) -> torch.Tensor:
        steps.append(time.sleep(0.01))
        return step(*given)

    monkeypatch.setattr(engine.model, "step", slow)
    items = engine.stream(QUESTION, DOCUMENTS, max_new_tokens=2000, min_new_tokens=2000)
    assert isinstance(next(items), str)
    began = time.perf_counter()
    items.close()  # type: ignore[attr-defined]
    assert time.perf_counter() - began < 5
    assert not workers()
    assert len(steps) < 1000
    assert ask(engine) == ask(engine)  # its buffer is free again


def test_white_space_around_the_text_is_left_out_of_the_stream(engine: Engine) -> None:
    """Danger: the stream begins with blank lines that the answer has not."""
    encode = engine.text.tokenizer.encode

    def blank(pieces: Pieces) -> Answer:
        for i in encode("\n  a  b \n\n", add_special_tokens=False):
            pieces.put(torch.tensor([i]))
        return Answer("a  b", (), Usage(), "none")

    *pieces, last = collect(stream(blank, engine.text.tokenizer))
    assert "".join(pieces) == last.text == "a  b"

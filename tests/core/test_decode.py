"""Decoding: sampling, stopping and streaming are transformers' own, over Kvilt's cache."""

from __future__ import annotations

import math
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
from kvilt.engine.text import TextFormat
from kvilt.errors import DamagedCache, PromptError
from kvilt.model.decoding import Settings
from kvilt.model.model import Model
from kvilt.model.placing import Run
from kvilt.types import Answer, Usage
from text_kit import sentencepiece


@pytest.fixture(scope="module")
def engine() -> Engine:
    """One engine for all: nothing here changes it."""
    return engine_of("block")


def ask(engine: Engine, **options: Any) -> tuple[int, ...]:
    return engine.answer(QUESTION, DOCUMENTS, **{"max_new_tokens": 8, **options}).tokens


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
    assert seen[-1][0].tolist() == tokens[tokens >= 0].tolist()


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
        ({"validate": 1}, "validate=1 is not served"),
        ({"num_beams": 4}, "num_beams=4 is not served"),
        ({"num_return_sequences": 2}, "num_return_sequences=2"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"penalty_alpha": 0.6}, "penalty_alpha"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"max_length": 50}, "Use max_new_tokens"),
        ({"min_length": 50}, "Use min_new_tokens"),
        ({"seed": "abc"}, "do not work"),
    ):
        with pytest.raises(PromptError, match=message):
            ask(engine, **options)


NAN, INF, VOCABULARY = math.nan, math.inf, zoo.VOCABULARY
BAD: list[dict[str, Any]] = [
    *({"temperature": v} for v in (-1, 1e-40, -INF, INF, NAN, 10**400, "hot", True, [1.0], torch.tensor(0.5))),
    *({"top_p": v} for v in (2.0, -0.1, NAN, INF, "x", True)),
    *({"top_k": v} for v in (-1, 10**30, 1.5, "a", NAN, False)),
    *({name: 5e-324} for name in ("repetition_penalty", "encoder_repetition_penalty")),
    *({name: 1.5} for name in ("min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")),
    *({"repetition_penalty": v} for v in (0, -2.0, INF, NAN, "x")),
    *({"no_repeat_ngram_size": v} for v in (-1, 1.5, 10**40)),
    *({"min_new_tokens": v} for v in (-1, "q", 1.5, 10**12)),
    *({"seed": v} for v in (2**70, -1, "abc", 1.5, True)),
    *({"max_time": v} for v in (-1, NAN, "x")),
    *({name: v} for name in ("do_sample", "renormalize_logits") for v in (1, "yes")),
    *({"stop_strings": v} for v in ("", [""], 5, [1], {"a": 1})),
    *({"eos_token_id": v} for v in (VOCABULARY, [1, -1], "x", 1.0, [[1]])),
    *({name: [VOCABULARY]} for name in ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id")),
    *({"bad_words_ids": v} for v in ([[VOCABULARY]], [[-1]], [], 5)),
    *({"sequence_bias": v} for v in ({(VOCABULARY,): 2.0}, {(1,): "x"}, 5)),
    {"suppress_tokens": list(range(VOCABULARY)), "temperature": 1.0},
    {"watermarking_config": 5},
    {"exponential_decay_length_penalty": 5},
]


@pytest.mark.parametrize("options", BAD, ids=lambda o: str(o)[:40])
def test_bad_values_get_one_line_before_anything_is_computed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Danger: tracebacks out of transformers after the prompt was computed, or values that mean nothing and are taken."""
    monkeypatch.setattr(TextFormat, "question_ids", lambda *_: pytest.fail("too late"))
    with pytest.raises(PromptError) as error:
        ask(engine, **options)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_good_values_are_taken(engine: Engine) -> None:
    """Danger: a check that is too strict refuses what transformers serves."""
    for options in (
        {"temperature": 1, "top_p": 1, "top_k": 0},
        {"temperature": 0, "top_p": 0.0},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0, "seed": 2**40},
        {"temperature": None, "repetition_penalty": 2, "max_time": 1000},
        {"bad_words_ids": [[3], [4, 5]], "sequence_bias": {(5, 6): -1.0}},
        {"num_beams": 1, "use_cache": True, "num_return_sequences": 1, "guidance_scale": 1},
        {"eos_token_id": [], "stop_strings": "xyz", "min_new_tokens": 10**6},
        {
            "watermarking_config": {"bias": 2.0},
            "exponential_decay_length_penalty": (1, 2.0),
            "renormalize_logits": True,
        },
    ):
        assert 0 < len(ask(engine, **options)) <= 8


@pytest.mark.parametrize(
    "own",
    [
        {"stop_strings": ["born"]},
        {"num_beams": 4, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 3},
        {"token_healing": True},
        {"use_mtp": True, "assistant_early_exit": 2, "is_assistant": True},
        {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
        {"penalty_alpha": 0.6, "top_k": 4, "dola_layers": "low", "guidance_scale": 2.0},
        {"force_words_ids": [[5]], "constraints": [1], "num_beam_groups": 2},
        {"cache_implementation": "static", "use_cache": False, "max_length": 7, "prefill_chunk_size": 2},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "pad_token_id": -1, "min_length": 3},
        {"repetition_penalty": 1, "odd": 5, "forced_bos_token_id": 4},
    ],
    ids=lambda o: next(iter(o)),
)
def test_a_checkpoint_s_own_settings_never_stop_an_answer(own: dict[str, Any]) -> None:
    """Danger: a field of generation_config.json that needs a tokenizer, an assistant or another loop kills every answer."""
    raw = zoo.hf_model("llama")
    engine = Engine(Model(raw), engine_of().text, engine_of().strategy, engine_of().store)
    plain = ask(engine, max_new_tokens=4)
    vars(raw.generation_config).update(own)
    assert ask(engine, max_new_tokens=4) == plain


def test_a_checkpoint_s_own_stop_strings_stop() -> None:
    """Danger: `stop_strings` in generation_config.json is ignored, where it does not kill the answer."""
    raw = zoo.hf_model("llama")
    engine = Engine(Model(raw), engine_of().text, engine_of().strategy, engine_of().store)
    told = ask(engine, max_new_tokens=24)
    text = engine.text.tokenizer.decode(told)
    stop = next(c for c in text[2:] if c.isascii() and c.isprintable() and not c.isspace())
    raw.generation_config.stop_strings = [stop]
    assert engine.text.tokenizer.decode(ask(engine, max_new_tokens=24)) == text[: text.index(stop) + 1]
    assert ask(engine, max_new_tokens=24) == ask(engine, max_new_tokens=24, stop_strings=[stop])


@pytest.mark.parametrize("bad", [0, -1, 1.5, "5", True, NAN, None])
def test_a_bad_length_is_refused_before_anything_is_encoded(bad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: documents are encoded and stored for an answer that cannot be given."""
    engine = engine_of("block")
    monkeypatch.setattr(engine.model, "encode", lambda *_: pytest.fail("encoded"))
    with pytest.raises(PromptError, match="max_new_tokens"):
        ask(engine, max_new_tokens=bad)


def test_a_prompt_beyond_the_context_is_refused_before_anything_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: documents that can never stand together are encoded and stored, and the answer is refused after that."""
    engine = engine_of("block")
    monkeypatch.setattr(engine.model, "encode", lambda *_: pytest.fail("encoded"))
    for documents, question in ((["word " * 400] * 3, QUESTION), (DOCUMENTS, "word " * 900)):
        with pytest.raises(PromptError, match="positions"):
            engine.answer(question, documents)


@pytest.mark.parametrize("bad", [VOCABULARY, -1, 10**12, 1.5, "a", True])
def test_ids_that_no_token_has_are_refused_before_anything_is_encoded(
    bad: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: an id beyond the vocabulary ends in an index error of the embedding."""
    engine = engine_of("block")
    monkeypatch.setattr(engine.model, "encode", lambda *_: pytest.fail("encoded"))
    with pytest.raises(PromptError, match="is no token"):
        engine.score(QUESTION, DOCUMENTS, (90, bad))


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
    out: list[str] = []
    pieces = Pieces(engine.text.tokenizer, out.append)
    for i in ids:
        pieces.put(torch.tensor([i]))
    assert "".join(out) == text.strip()
    spaces = sum(c.isspace() for c in text)  # these come with what follows them
    assert len(out) == len(text) - spaces  # one token per byte: every character as soon as it is whole


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
    step, steps = Run.step, []

    def slow(*given: Any) -> torch.Tensor:
        steps.append(time.sleep(0.01))
        return step(*given)

    monkeypatch.setattr(Run, "step", slow)
    items = engine.stream(QUESTION, DOCUMENTS, max_new_tokens=2000, min_new_tokens=2000)
    assert isinstance(next(items), str)
    began = time.perf_counter()
    items.close()  # type: ignore[attr-defined]
    assert time.perf_counter() - began < 5
    assert not workers()
    assert len(steps) < 100
    done = len(steps)
    time.sleep(0.1)
    assert len(steps) == done
    assert ask(engine) == ask(engine)  # its buffer is free again


@pytest.mark.parametrize("tokens", range(1, 13))
def test_a_stream_that_is_cut_inside_a_character_is_the_answer_s_text(tokens: int) -> None:
    """Danger: byte tokens (Llama-2, Mistral): the stream ends in whole characters, the answer in question marks."""
    text = TextFormat.of(sentencepiece())
    ids = text.tokenizer.encode("\u65e5\u672c\u8a9e\u3067", add_special_tokens=False)[:tokens]

    def cut(pieces: Pieces) -> Answer:
        for i in ids:
            pieces.put(torch.tensor([i]))
        return Answer(text.decode(ids), tuple(ids), Usage(), "none")

    *pieces, last = collect(stream(cut, text.tokenizer))
    assert "".join(pieces) == last.text == "\u65e5\u672c\u8a9e\u3067"[: (tokens - 1) // 3]


def test_any_tokens_give_the_same_text_in_pieces_and_at_once() -> None:
    """Danger: tokens that no text would give (sampled at random) are spelled in one way or another."""
    for text in (TextFormat.of(sentencepiece()), TextFormat.of(zoo.tokenizer())):
        made = torch.Generator().manual_seed(0)
        for _ in range(20):
            ids = torch.randint(0, len(text.tokenizer), (30,), generator=made)
            out: list[str] = []
            pieces = Pieces(text.tokenizer, out.append)
            for i in ids:
                pieces.put(i)
            assert "".join(out) == text.decode(ids.tolist())


def test_white_space_around_the_text_is_left_out_of_the_stream(engine: Engine) -> None:
    """Danger: the stream begins with blank lines that the answer has not."""
    encode = engine.text.tokenizer.encode

    def blank(pieces: Pieces) -> Answer:
        for i in encode("\n  a  b \n\n", add_special_tokens=False):
            pieces.put(torch.tensor([i]))
        return Answer("a  b", (), Usage(), "none")

    *pieces, last = collect(stream(blank, engine.text.tokenizer))
    assert "".join(pieces) == last.text == "a  b"

"""Decoding after a plan: transformers prepares sampling and stopping; the loop appends to the placed cache."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria

from kvilt.errors import PromptError, did_you_mean
from kvilt.model.placing import Run

mkldnn: Any = torch.backends.mkldnn
SHARES = ("top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")  # from 0 to 1
SAMPLING = ("temperature", "top_k", *SHARES)
FLOATS = ("temperature", "repetition_penalty", "encoder_repetition_penalty", *SHARES)
SWITCHES = ("do_sample", "renormalize_logits", "remove_invalid_values")
IDS = (*(f"{n}_token_id" for n in ("eos", "pad", "bos", "forced_eos")), "suppress_tokens", "begin_suppress_tokens")
REPEATS = ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias")
LENGTHS = ("max_time", "min_new_tokens", "exponential_decay_length_penalty", "stop_strings", "watermarking_config")
SERVED = ("top_k", *REPEATS, *LENGTHS, *FLOATS, *SWITCHES, *IDS)  # others want another loop or several rows per prompt
OFF = {"num_beams": 1, "num_return_sequences": 1, "guidance_scale": 1.0, "penalty_alpha": 0.0, "use_cache": True}
INSTEAD = {"max_length": " Use max_new_tokens.", "min_length": " Use min_new_tokens."}
LEAST = {"repetition_penalty": 1e-3, "encoder_repetition_penalty": 1e-3}  # smaller ones leave no number of a score
MOST = {"seed": 1 << 63} | dict.fromkeys(SHARES, 1)  # the largest value, where it is not 2 ** 31


@dataclass(frozen=True, eq=False)
class Settings:
    """How to pick tokens and when to stop, tried out before anything is computed."""

    hf: Any  # the model, for transformers' preparations
    config: GenerationConfig
    stops: StoppingCriteriaList
    seed: int | None = None

    @classmethod
    def of(cls, hf: Any, options: Mapping[str, Any], tokenizer: Any = None) -> Settings:
        """The model's own generation settings with the caller's on top; greedy unless sampling is asked for.

        An option of sampling (temperature, top_p ...) asks for it; temperature 0 is greedy; stop strings need the tokenizer.
        Raises PromptError for options that are unknown, that have bad values, or that need several rows per prompt."""
        options = {n: v for n, v in options.items() if v is not None}
        vocabulary = int(hf.get_input_embeddings().weight.shape[0])
        for name, value in options.items():
            _check(name, value, vocabulary)
        wanted = {name: getattr(hf.generation_config, name, None) for name in SERVED} | options
        sample = bool(options.get("do_sample", any(n in options for n in SAMPLING)) and wanted["temperature"] != 0)
        kept = {n: wanted[n] for n in SERVED if sample or n not in SAMPLING}
        kept |= {n: float(v) for n, v in kept.items() if n in FLOATS and type(v) is int}
        kept |= {"do_sample": sample, "stop_strings": None, "pad_token_id": 0}  # one row per prompt is never padded
        bare = copy.copy(hf.get_base_model() if hasattr(hf, "get_base_model") else hf)  # adapters wrap `generate`
        bare.generation_config = GenerationConfig()  # with the model's own, `generate` would fill what is None here
        try:
            stop = wanted["stop_strings"] if tokenizer is not None else None
            stops = StoppingCriteriaList([StopStringCriteria(tokenizer, stop)] if stop else [])
            settings = cls(bare, GenerationConfig(**kept), stops, options.get("seed"))
            if options:
                run = cast(Run, SimpleNamespace(logits=torch.linspace(-1e4, 1e4, vocabulary)))
                generate(run, torch.zeros(1, dtype=torch.long), 1, settings)
        except Exception as error:  # transformers' checks raise errors of many types
            raise PromptError(f"these generation options do not work: {str(error).partition(chr(10))[0]}") from error
        return settings


def check_ids(what: str, ids: Any, vocabulary: int) -> None:
    """Raise PromptError for ids, one or several, that no token has."""
    for i in ids if isinstance(ids, list | tuple) else [ids]:
        if type(i) is not int or not 0 <= i < vocabulary:
            raise PromptError(f"{what}: {i!r:.40} is no token; ids are whole numbers below {vocabulary}.")


def _check(name: str, value: Any, vocabulary: int) -> None:
    """Raise PromptError for an option that is not served, or a value that transformers would not notice."""
    said, texts = f"generation option {name}={value!r:.60}", [value] if isinstance(value, str) else value
    if name in OFF and value == OFF[name]:
        return
    if name not in (*SERVED, "seed"):
        advice = did_you_mean(name, [*SERVED, "seed"]) or " One sequence is decoded, over the placed cache."
        raise PromptError(f"{said} is not served.{INSTEAD.get(name, advice)}")
    if name == "stop_strings" and not (isinstance(texts, list) and all(isinstance(t, str) and t for t in texts)):
        raise PromptError(f"{said} must be a text or a list of texts.")
    if name in IDS:
        check_ids(said, value, vocabulary)
    if isinstance(value, bool) != (name in SWITCHES):
        raise PromptError(f"{said} must be {'True or False' if name in SWITCHES else 'a value'}.")
    whole, least, most = name not in (*FLOATS, "max_time"), LEAST.get(name, 0), MOST.get(name, 1 << 31)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and not (least <= value <= most and isinstance(value, int if whole else int | float)):  # nor is NaN
        raise PromptError(f"{said} must be a {'whole ' * whole}number from {least} to {most}.")


def generate(
    run: Run,
    prompt: Tensor,  # (tokens,) ids of the whole prompt, for repetition penalties
    room: int,
    settings: Settings,
    on_first: Callable[[], None] = lambda: None,
    streamer: Any = None,
) -> tuple[int, ...]:
    """Generate at most `room` tokens after a plan that was run with room for them; `streamer.put` gets every one."""
    device, tokens = run.logits.device, list[int]()
    ids = prompt[prompt >= 0][None].to(device)  # learned vectors have no id
    seeded = None if settings.seed is None else torch.Generator(device).manual_seed(settings.seed)
    config = copy.deepcopy(settings.config)
    config.max_new_tokens = room
    if config.min_new_tokens:
        config.min_new_tokens = min(config.min_new_tokens, room)

    def loop(hf: Any, ids: Tensor, logits_processor: Any, stopping_criteria: Any, **_: Any) -> Tensor:
        scores = run.logits[None]
        while True:
            token = _pick(logits_processor(ids, scores), bool(config.do_sample), seeded)
            if not tokens:
                on_first()
            tokens.append(int(token))
            ids = torch.cat([ids, token], 1)
            if streamer is not None:
                streamer.put(token[0].cpu())
            if bool(stopping_criteria(ids, None).all()):
                return ids
            scores = run.step(token)

    try:
        options = {"custom_generate": loop, "stopping_criteria": settings.stops, "attention_mask": torch.ones_like(ids)}
        settings.hf.generate(ids, generation_config=config, **options)
    finally:
        if streamer is not None:
            streamer.end()
    return tuple(tokens)


def _pick(scores: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
    if not sample:
        return scores.argmax(-1, keepdim=True)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)


_lock, _running = threading.Lock(), 0  # passes of this process


@contextlib.contextmanager
def passing(tokens: int, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Wraps one pass of a model. On a CPU a single bfloat16 token is multiplied without oneDNN where that is faster.

    oneDNN reads weights at half the memory's speed for it. The switch is the whole process's, so it is left alone while
    another pass runs."""
    global _running
    plain = tokens == 1 and device.type == "cpu" and dtype == torch.bfloat16 and _is_plain_faster()
    with _lock:
        _running += 1
        plain = plain and _running == 1 and mkldnn.enabled
        if plain:
            mkldnn.enabled = False
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if plain:
                mkldnn.enabled = True


@functools.cache
def _is_plain_faster() -> bool:
    """Measured once: older versions of torch have no kernel of their own for it on some machines."""
    matrix, token, before = torch.ones(4096, 2048).bfloat16(), torch.ones(1, 2048).bfloat16(), mkldnn.enabled
    seconds = {True: 1.0, False: 1.0}
    with torch.no_grad(), _lock:
        for enabled in (True, False) * 4:
            mkldnn.enabled, began = enabled, time.perf_counter()
            linear(token, matrix)
            seconds[enabled] = min(seconds[enabled], time.perf_counter() - began)
        mkldnn.enabled = before
    return seconds[False] < 0.9 * seconds[True]

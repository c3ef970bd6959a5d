"""Decoding after a plan: transformers prepares sampling and stopping; the loop appends to the placed cache."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList, StopStringCriteria

from kvilt.errors import PromptError
from kvilt.model.model import Run

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
NOT_SERVED = {  # generation options that want another loop or another cache, and what leaves them off
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "guidance_scale": (None, 1.0),
    "cache_implementation": (None, "dynamic"),
    "max_length": (None,),
}


@dataclass(frozen=True, eq=False)
class Settings:
    """How to pick tokens and when to stop, checked before anything is computed."""

    config: Any  # transformers' GenerationConfig
    seed: int | None = None

    @classmethod
    def of(cls, hf: Any, options: dict[str, Any]) -> Settings:
        """The model's own generation settings with the caller's on top; greedy unless sampling is asked for.

        An option of sampling (temperature, top_p ...) asks for it; temperature 0 is greedy. Raises PromptError for
        options that are unknown, that have bad values, or that need several rows per prompt (beam search)."""
        config, options = copy.deepcopy(hf.generation_config), dict(options)
        seed = options.pop("seed", None)
        _check(options, config)
        sample = options.pop("do_sample", None)
        if sample is None:
            sample = any(options.get(name) is not None for name in SAMPLING)
        if not sample or options.get("temperature", 1.0) == 0:
            sample, options = False, {k: v for k, v in options.items() if k not in SAMPLING}
            vars(config).update(dict.fromkeys(SAMPLING))
        vars(config).update(
            {name: off[-1] for name, off in NOT_SERVED.items()}
        )  # None: the model's own would come back
        try:
            config.update(do_sample=bool(sample), **options)
            return cls(config, None if seed is None else int(seed))
        except (ValueError, TypeError) as error:
            raise PromptError(f"these generation options do not work: {error}") from error

    def up_to(self, max_new_tokens: int) -> Any:
        """The configuration for an answer of at most so many tokens."""
        config = copy.deepcopy(self.config)
        config.max_new_tokens = max_new_tokens
        return config


def _check(options: dict[str, Any], config: Any) -> None:
    known = [name for name in vars(config) if not name.startswith("_")]
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, [*known, "seed"], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise PromptError(f"unknown generation option {name!r}.{hint} See transformers' GenerationConfig.")
        if name in NOT_SERVED and value not in NOT_SERVED[name]:
            advice = (
                "use max_new_tokens." if name == "max_length" else "one sequence is decoded, over the placed cache."
            )
            raise PromptError(f"generation option {name}={value!r} is not served: {advice}")


def generate(
    run: Run,
    prompt: Tensor,  # (tokens,) ids of the whole prompt, for repetition penalties
    max_new_tokens: int,
    settings: Settings | None = None,
    on_first: Callable[[], None] = lambda: None,
    streamer: Any = None,
    tokenizer: Any = None,
    **options: Any,
) -> tuple[int, ...]:
    """Generate tokens after a plan that was run with room for them; greedy by default.

    `streamer.put` gets every token; `tokenizer` is needed for stop strings; `options` are used if there are no settings."""
    model = run.model
    settings = settings or Settings.of(model.hf, options)
    config = settings.up_to(max_new_tokens)
    seeded = None if settings.seed is None else torch.Generator(model.shape.device).manual_seed(settings.seed)
    ids = prompt[prompt >= 0][None].to(model.shape.device)  # learned vectors have no id
    length = ids.shape[1]

    def loop(hf: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, **_: Any) -> Tensor:
        scores = run.logits[None].to(input_ids.device)
        while True:
            token = _pick(logits_processor(input_ids, scores), bool(config.do_sample), seeded)
            if input_ids.shape[1] == length:
                on_first()
            input_ids = torch.cat([input_ids, token], 1)
            if streamer is not None:
                streamer.put(token[0].cpu())
            if bool(stopping_criteria(input_ids, None).all()):
                return input_ids
            scores = run.step(token)

    stopping = _stop_strings(config, tokenizer)
    try:
        out = model.hf.generate(
            ids,
            generation_config=config,
            attention_mask=torch.ones_like(ids),
            custom_generate=loop,
            stopping_criteria=stopping,
        )
    finally:
        if streamer is not None:
            streamer.end()
    return tuple(out[0, length:].tolist())


def _stop_strings(config: Any, tokenizer: Any) -> StoppingCriteriaList:
    """Taken out of the configuration: transformers passes no tokenizer on to a loop of one's own."""
    if not config.stop_strings or tokenizer is None:
        return StoppingCriteriaList()
    strings, config.stop_strings = config.stop_strings, None
    return StoppingCriteriaList([StopStringCriteria(tokenizer, strings)])


def _pick(scores: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
    if not sample:
        return scores.argmax(-1, keepdim=True)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)

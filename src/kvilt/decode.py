"""Decoding after a plan: transformers prepares sampling, stopping and streaming; the loop appends to the placed cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvilt.errors import PromptError
from kvilt.model import Model
from kvilt.placed import PlacedCache


def generate(
    model: Model,
    logits: Tensor,  # (vocab,) of the first token
    placed: PlacedCache,
    prompt: Tensor,  # (tokens,) ids of the whole prompt, for repetition penalties
    max_new_tokens: int,
    on_first: Callable[[], None] = lambda: None,
    streamer: Any = None,
    **sampling: Any,
) -> tuple[int, ...]:
    """Generate tokens; greedy unless `do_sample=True`. Every sampling option of transformers' generate is accepted.

    Raises PromptError for options that need several rows (beam search)."""
    config = _config(model.hf, max_new_tokens, sampling)
    seed, generator = sampling.pop("seed", None), None
    if seed is not None:
        generator = torch.Generator(model.shape.device).manual_seed(int(seed))

    def loop(hf: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, **_: Any) -> Tensor:
        scores = logits[None].to(input_ids.device)
        while True:
            token = _pick(logits_processor(input_ids, scores), bool(config.do_sample), generator)
            if input_ids.shape[1] == len(prompt):
                on_first()
            input_ids = torch.cat([input_ids, token], 1)
            if streamer is not None:
                streamer.put(token[0].cpu())
            if bool(stopping_criteria(input_ids, None).all()):
                return input_ids
            scores = model.step(token, placed)

    ids = prompt.clamp(min=0)[None].to(model.shape.device)  # learned vectors have no id; 0 stands for them
    try:
        out = model.hf.generate(
            ids, generation_config=config, attention_mask=torch.ones_like(ids), custom_generate=loop
        )
    finally:
        if streamer is not None:
            streamer.end()
    return tuple(out[0, len(prompt) :].tolist())


def _config(hf: Any, max_new_tokens: int, sampling: dict[str, Any]) -> Any:
    """The model's own generation settings with the caller's on top; greedy unless sampling is asked for."""
    config = copy.deepcopy(hf.generation_config)
    config.max_length, config.max_new_tokens = None, max_new_tokens
    if not sampling.get("do_sample", False):
        config.temperature = config.top_k = config.top_p = config.min_p = None
    options = {k: v for k, v in sampling.items() if k != "seed"}
    unknown = config.update(**{"do_sample": False, **options})
    if unknown:
        raise PromptError(f"unknown generation option {next(iter(unknown))!r}: see transformers' GenerationConfig.")
    if (config.num_beams or 1) != 1 or (config.num_return_sequences or 1) != 1:
        raise PromptError("only one sequence is generated per prompt: num_beams and num_return_sequences must be 1.")
    return config


def _pick(scores: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
    if not sample:
        return scores.argmax(-1, keepdim=True)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)

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
    **sampling: Any,
) -> tuple[int, ...]:
    """Generate tokens; greedy unless `do_sample=True`. Every sampling option of transformers' generate is accepted.

    Raises PromptError for options that need several rows (beam search)."""
    if sampling.get("num_beams", 1) != 1 or sampling.get("num_return_sequences", 1) != 1:
        raise PromptError("only one sequence is generated per prompt: num_beams and num_return_sequences must be 1.")
    seed = sampling.pop("seed", None)
    generator = None if seed is None else torch.Generator(model.shape.device).manual_seed(int(seed))

    def loop(
        hf: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
    ) -> Tensor:
        streamer, scores = kwargs.get("streamer"), logits[None].to(input_ids.device)
        while True:
            token = _pick(logits_processor(input_ids, scores), bool(generation_config.do_sample), generator)
            if input_ids.shape[1] == len(prompt):
                on_first()
            input_ids = torch.cat([input_ids, token], 1)
            if streamer is not None:
                streamer.put(token[0].cpu())
            if bool(stopping_criteria(input_ids, None).all()):
                break
            scores = model.step(token, placed)
        if streamer is not None:
            streamer.end()
        return input_ids

    ids = prompt.clamp(min=0)[None].to(model.shape.device)  # learned vectors have no id; 0 stands for them
    config = _config(model.hf, sampling.get("do_sample", False))
    options = {"do_sample": False, **sampling, "max_new_tokens": max_new_tokens}
    out = model.hf.generate(ids, generation_config=config, attention_mask=torch.ones_like(ids), custom_generate=loop, **options)
    return tuple(out[0, len(prompt) :].tolist())


def _config(hf: Any, sample: bool) -> Any:
    """The model's own generation settings; sampling settings are cleared when decoding is greedy."""
    config = copy.deepcopy(hf.generation_config)
    config.max_length = None
    if not sample:
        config.temperature = config.top_k = config.top_p = config.min_p = None
    return config


def _pick(scores: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
    if not sample:
        return scores.argmax(-1, keepdim=True)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)

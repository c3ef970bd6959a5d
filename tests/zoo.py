"""Tiny random models of every served family, and a byte tokenizer: no network, a second on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvilt.model import rope
from kvilt.model.identity import tokenizer_digest
from kvilt.model.model import Model
from kvilt.model.placing import PlacedCache
from kvilt.plan import Plan
from kvilt.rows.rows import Rotation

SPECIAL = ["<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", *(f"<|reserved_{i}|>" for i in range(64))]
VOCABULARY = len(SPECIAL) + 256
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama3-rope": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=LLAMA3)),
    "llama-linear-mqa": lambda: LlamaForCausalLM(
        LlamaConfig(**{**SHAPE, "num_key_value_heads": 1}, rope_parameters=LINEAR)
    ),
    "llama-yarn-tied-mha": lambda: LlamaForCausalLM(
        LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}, rope_parameters=YARN, tie_word_embeddings=True)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None, head_dim=16)),
    "phi-partial-rotary": lambda: PhiForCausalLM(PhiConfig(**SHAPE, partial_rotary_factor=0.5)),
    "glm-interleaved": lambda: GlmForCausalLM(GlmConfig(**SHAPE, head_dim=16, partial_rotary_factor=0.5)),
}


def _on_placing(patch: pytest.MonkeyPatch, change: Callable[[PlacedCache, Plan], None]) -> None:
    made = PlacedCache.__init__

    def init(self: PlacedCache, plan: Plan, *more: Any, **options: Any) -> None:
        made(self, plan, *more, **options)
        if self._angles is not None:
            change(self, plan)

    patch.setattr(PlacedCache, "__init__", init)


def _wrongly_paired(patch: pytest.MonkeyPatch) -> None:
    made = rope.rotation_of
    patch.setattr("kvilt.model.model.rotation_of", lambda hf: replace(r := made(hf), interleaved=not r.interleaved))


def _halved(patch: pytest.MonkeyPatch) -> None:
    made = rope.rotation_of
    patch.setattr("kvilt.model.model.rotation_of", lambda hf: replace(r := made(hf), inv_freq=r.inv_freq / 2))


def _backwards(patch: pytest.MonkeyPatch) -> None:
    made = Rotation.rotate
    patch.setattr(
        Rotation, "rotate", lambda self, keys, at, out=None, *, back=False: made(self, keys, at, out, back=not back)
    )


def _placed_backwards(patch: pytest.MonkeyPatch) -> None:
    def turn(placed: PlacedCache, _: Plan) -> None:
        assert placed._angles is not None
        placed._angles = placed._angles[0], -placed._angles[1]

    _on_placing(patch, turn)


def _one_off(patch: pytest.MonkeyPatch) -> None:
    def shift(placed: PlacedCache, plan: Plan) -> None:
        placed._angles = placed.rotation.angles(plan.positions[: placed._end] + 1, placed.buffer.device)

    _on_placing(patch, shift)


def _seeing_the_future(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Plan, "visible", lambda self: torch.ones(len(self.computed_rows), len(self.positions), dtype=torch.bool)
    )


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {  # what a proof must refuse in any dtype
    "keys paired wrongly": _wrongly_paired,
    "frequencies halved": _halved,
    "keys rotated backwards": _backwards,
    "keys placed backwards": _placed_backwards,
    "one off": _one_off,
    "recomputed tokens see the future": _seeing_the_future,
}


def hf_model(family: str, seed: int = 1) -> PreTrainedModel:
    """A random model whose methods really differ: matrices are scaled up so that attention is far from uniform."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.data.mul_(6 if "embed" not in name else 20)
        elif "bias" in name:
            p.data.normal_(0, 0.3)
    return model


@functools.cache
def model_of(family: str) -> Model:
    """A tiny model of a family, made once."""
    return Model(hf_model(family), tokenizer_digest(tokenizer()))


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, and special tokens like those of real chat models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL)} | {c: i + len(SPECIAL) for i, c in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[3:],
        chat_template=CHAT if chat else None,
    )
    assert len(made) == VOCABULARY
    return made


def save(folder: Path, family: str = "llama", seed: int = 1, chat: bool = True) -> str:
    """A model directory as the hub would give it."""
    hf_model(family, seed).save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    return str(folder)

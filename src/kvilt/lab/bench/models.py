"""Randomly initialised models of known shapes: speed does not depend on what the weights say."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvilt.errors import SpecError
from kvilt.model.identity import tokenizer_digest
from kvilt.model.model import Model
from kvilt.types import Document

LLAMA_1B: dict[str, Any] = {  # the shape of Llama-3.2-1B
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": LLAMA_1B,
    "llama-30m": {
        **LLAMA_1B,
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}
WORDS = 4000  # of the made-up language; one word is one token
RESERVED = 250  # special tokens that link tokens may use


def random_model(shape: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Model:
    """A model of the shape with random weights, fixed seed."""
    if shape not in SHAPES:
        raise SpecError(f"unknown shape {shape!r}. Known: {', '.join(SHAPES)}.")
    torch.manual_seed(0)
    with torch.device(device):
        hf = LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).to(dtype)
    hf.generation_config.eos_token_id = None  # random weights must not end an answer early
    return Model(hf, tokenizer_digest(word_tokenizer()))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of a made-up language."""
    vocabulary = {"<s>": 0, "</s>": 1, **{f"w{i}": i + 2 for i in range(WORDS)}}
    reserved = [f"<|reserved_{i}|>" for i in range(RESERVED)]
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", additional_special_tokens=reserved
    )


def text_of(tokens: int, seed: int) -> str:
    """A text of exactly so many tokens."""
    numbers = torch.randint(0, WORDS, (tokens,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in numbers.tolist())


def collection(documents: int, tokens: int) -> list[Document]:
    """Documents of so many tokens each."""
    return [Document(text_of(tokens, seed=i), id=f"document-{i}") for i in range(documents)]

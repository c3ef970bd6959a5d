"""What is measured: a randomly initialised model of a known shape, whose speed does not depend on what its weights say, or
a model by name; and documents of a known number of tokens for it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvilt import builtin
from kvilt.engine.text import TextFormat
from kvilt.errors import SpecError
from kvilt.model.identity import tokenizer_digest
from kvilt.model.loading import choose_device, choose_dtype, load_model
from kvilt.model.model import Model
from kvilt.types import Document


class Llama(NamedTuple):
    """The shape of a Llama 3 model."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 64
    vocabulary: int = 128256
    tied: bool = True
    factor: float = 32.0

    def config(self) -> LlamaConfig:
        """As transformers knows it."""
        rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": self.factor, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        sizes = {"hidden_size": self.hidden, "intermediate_size": self.inner, "num_hidden_layers": self.layers}
        heads = {"num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim}
        rest = {"vocab_size": self.vocabulary, "tie_word_embeddings": self.tied, "max_position_embeddings": 131072}
        return LlamaConfig(**sizes, **heads, **rest, rope_parameters=rope)


SHAPES = {
    "llama-1b": Llama(2048, 8192, 16, 32, 8),  # Llama-3.2-1B
    "llama-8b": Llama(4096, 14336, 32, 32, 8, head_dim=128, tied=False, factor=8.0),  # Llama-3.1-8B
    "llama-30m": Llama(512, 1536, 8, 8, 4, vocabulary=8192),
}
WORDS = 4000  # of the made-up language; one word is one token
RESERVED = 250  # special tokens that link tokens may use
DOCUMENT_TOKENS, QUESTION_TOKENS = 500, 20


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with texts to read, and a question about them."""

    name: str
    model: Model
    text: TextFormat
    texts: Sequence[Document]
    question: str

    def documents(self, count: int) -> list[Document]:
        """So many different documents of DOCUMENT_TOKENS tokens or a little more, each of as many texts as that takes."""
        made: list[Document] = []
        parts, tokens = [], 0
        for turn in itertools.count():
            if len(made) == count:
                return made
            text = self.texts[turn % len(self.texts)]
            again = "" if turn < len(self.texts) else f"{turn // len(self.texts)} "  # the same text is another document
            parts.append(again + text.content)
            tokens += len(self.text.document_ids(text))
            if tokens >= DOCUMENT_TOKENS:
                made.append(Document("".join(parts).rstrip("\n"), id=f"document-{len(made)}"))
                parts, tokens = [], 0
        raise AssertionError("never here")


def random_subject(shape: str, dtype: str = "float32", device: str = "cpu") -> Subject:
    """A model of the shape with random weights, fixed seed, and texts of exactly DOCUMENT_TOKENS tokens."""
    if shape not in SHAPES:
        raise SpecError(f"unknown shape {shape!r}. Known: {', '.join(SHAPES)}.")
    torch.manual_seed(0)
    place = choose_device(device)
    kind, _ = choose_dtype(dtype, torch.bfloat16, place)
    with place:
        hf = LlamaForCausalLM(SHAPES[shape].config()).to(kind)
    hf.generation_config.eos_token_id = None  # random weights must not end an answer early
    tokenizer = word_tokenizer()
    texts = [Document(text_of(DOCUMENT_TOKENS, seed=i)) for i in range(64)]
    model = Model(hf, tokenizer_digest(tokenizer))
    return Subject(shape, model, TextFormat.of(tokenizer, "w1 w2 w3 w4 w5"), texts, text_of(QUESTION_TOKENS, seed=9999))


def named_subject(name: str, texts: Sequence[Document] = (), dtype: str = "auto", device: str = "auto") -> Subject:
    """A model by name, with texts of one's own, or those that ship with the package."""
    model, tokenizer = load_model(name, dtype, device)
    own = list(texts) or list(builtin.documents().values())
    return Subject(name, model, TextFormat.of(tokenizer), own, "What is told of the first of these names?")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of a made-up language."""
    vocabulary = {"<s>": 0, "</s>": 1, **{f"w{i}": i + 2 for i in range(WORDS)}}
    reserved = [f"<|reserved_{i}|>" for i in range(RESERVED)]
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.decoder = decoders.Fuse()
    special = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": reserved}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def text_of(tokens: int, seed: int) -> str:
    """A text of exactly so many tokens."""
    numbers = torch.randint(0, WORDS, (tokens,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in numbers.tolist())

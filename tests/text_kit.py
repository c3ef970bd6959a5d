"""Tokenizers like those of real models: byte-level ones, and SentencePiece's with byte tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import zoo

USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"  # as DeepSeek writes them
ADDED = [USER, ASSISTANT, "<think>", "</think>", "[INST]", "[/INST]", "<tool_call>"]
CONTROL = ["<unk>", "<s>", "</s>"]
CHARACTERS = ["\u2581", *map(chr, range(33, 127))]
MERGES = [
    "\u2581 A",
    "d a",
    "\u2581A da",
    "\u2581 t",
    "h e",
    "\u2581t he",
    "e r",
    "w a",
    "\u2581 wa",
    "a s",
    "b o",
    "r n",
    "bo rn",
]
SCHEMES = ["legacy", "always", "first", "never"]  # when SentencePiece's space is put in front

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set told = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set rest = messages %}{% set told = '' %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (told if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    f"{{% elif m['role'] == 'user' %}}{{{{ '{USER}' + m['content'] }}}}"
    f"{{% else %}}{{{{ '{ASSISTANT}' + m['content'] + eos_token }}}}{{% endif %}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{{{{ '{ASSISTANT}<think>\\n' }}}}{{% endif %}}"
)


def add(tokenizer: Any, names: Sequence[str] = ADDED, **more: Any) -> Any:
    """Added tokens that are not special, as DeepSeek, Qwen3 and GLM have them."""
    tokenizer.add_tokens([AddedToken(name, special=False, **{"normalized": False, **more}) for name in names])
    return tokenizer


def byte_level(template: str | None = DEEPSEEK) -> Any:
    """The zoo's tokenizer with role markers that are not special."""
    made = add(zoo.tokenizer())
    made.chat_template = template
    return made


def sentencepiece(scheme: str = "first", template: str | None = LLAMA2, unigram: bool = False) -> Any:
    """A tokenizer like Llama-2's and Mistral's (BPE), or like Unigram ones, whose vocabulary holds control tokens."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    names = list(dict.fromkeys([*CONTROL, *bytes_, *CHARACTERS, *(merge.replace(" ", "") for merge in MERGES)]))
    if unigram:
        scores = [(name, 0.0 if name in CONTROL else len(name) - 10.0) for name in names]
        raw = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    else:
        merges = [(a, b) for a, b in (merge.split() for merge in MERGES)]
        ids = {name: i for i, name in enumerate(names)}
        raw = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme == "legacy":
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    spaces = decoders.Replace("\u2581", " ")
    raw.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), *strip])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return add(PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, **special))


TOKENIZERS = {
    "byte-level": byte_level,
    **{f"sentencepiece {s}": lambda s=s: sentencepiece(s, DEEPSEEK) for s in SCHEMES},
    **{f"unigram {s}": lambda s=s: sentencepiece(s, DEEPSEEK, unigram=True) for s in SCHEMES},
}

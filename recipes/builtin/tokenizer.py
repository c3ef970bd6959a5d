"""The tokenizer of the built-in model: byte-level BPE in which names fall into a few common syllables."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from builtin.world import contexts, stories, words
from builtin.world.babi import Sample
from builtin.world.world import World

VOCABULARY = 2048
RESERVED = 96  # for link tokens (10 documents x 5), markers and whatever a later method needs
SYSTEM = "Answer from the documents."
SPECIALS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{- '<|bos|>' }}"
    "{%- if messages[0]['role'] != 'system' %}{{- '<|system|>" + SYSTEM + "<|end|>' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def corpus(seed: int, count: int, babi: list[Sample]) -> list[str]:
    """Texts of the training split; bare names are added so that syllables, not whole names, become tokens."""
    rng = random.Random(seed)
    samples = [contexts.build(rng, "train", 6) for _ in range(count)]
    samples += [stories.build(rng, "train", 6) for _ in range(count // 4)] + babi
    texts = [page.render() for sample in samples for page in sample.pages]
    texts += [question.text + "\n" + question.answer for sample in samples for question in sample.questions]
    worlds = [World(rng) for _ in range(4 * count)]
    names = [(w.person().name, w.city(), w.company().name, w.college().name) for w in worlds]
    texts += [" ".join(name) for name in names]
    # Every word of the closed lists must be one token, also those a small sample misses.
    texts += [" ".join(words.SHE_NAMES + words.HE_NAMES + words.PLACES + words.OBJECTS)] * 200
    return texts


def train(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train the BPE and wrap it with special tokens and chat template."""
    tokenizer = Tokenizer(BPE())
    # A word looks the same at the start of a line as inside it: both carry a leading space.
    tokenizer.normalizer = normalizers.Replace(Regex(r"\n(?=\S)"), "\n ")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(Regex(r"\n "), "\n"), decoders.Strip(" ", 1, 0)]
    )
    specials = SPECIALS + [f"<|reserved_{number}|>" for number in range(RESERVED)]
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=20,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True) for token in specials],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def obtain(out: Path, seed: int, babi: list[Sample]) -> PreTrainedTokenizerFast:
    """The tokenizer saved in `out`, trained first if there is none."""
    if not (out / "tokenizer.json").exists():
        train(corpus(seed, 4000, babi)).save_pretrained(out)
    return PreTrainedTokenizerFast.from_pretrained(out)

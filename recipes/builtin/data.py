"""Rows of token ids for the built-in model: several questions share one context and do not see each other."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from builtin.tokenizer import SYSTEM
from builtin.world import contexts, stories, words
from builtin.world.samples import Question, Sample

IGNORE = -100
FIELDS = ("ids", "position", "sample", "segment", "limit", "page", "label", "question", "value")


@dataclass
class Row:
    """Token-wise lists of one row; a context has segment 0, its questions 1, 2, ..."""

    ids: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    sample: list[int] = field(default_factory=list)
    segment: list[int] = field(default_factory=list)
    limit: list[int] = field(default_factory=list)  # context positions below it are visible
    page: list[int] = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    question: list[int] = field(default_factory=list)  # index into `asked`, at labelled places
    value: list[int] = field(default_factory=list)  # 1 where the label is part of the gold value
    asked: list[Question] = field(default_factory=list)

    def add(self, ids: list[int], start: int, sample: int, segment: int, page: int) -> None:
        """Append tokens from position `start` on, without labels."""
        count = len(ids)
        positions = list(range(start, start + count))
        self.ids += ids
        self.position += positions
        self.sample += [sample] * count
        self.segment += [segment] * count
        self.limit += [start] * count if segment else [position + 1 for position in positions]
        self.page += [page] * count
        self.label += [IGNORE] * count
        self.question += [-1] * count
        self.value += [0] * count


class Encoder:
    """Turns samples into rows exactly as the engine builds prompts: every part tokenised alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        mark = "\x00"
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": mark}]
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        before, after = rendered.split(mark)
        self.system = self.encode([before])[0]
        self.after = after
        self.end = int(tokenizer.convert_tokens_to_ids("<|end|>"))

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts, each alone and without special tokens added."""
        encodings = self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def marks(self) -> tuple[list[int], list[int]]:
        """The tokens of first names, and of the last words of companies and colleges."""
        groups = (words.SHE_NAMES + words.HE_NAMES, [*words.FIRM_KINDS, "College"])
        first, kinds = ([ids[0] for ids in self.encode(group) if len(ids) == 1] for group in groups)
        return first, kinds

    def fill(self, row: Row, sample: Sample, number: int, room: int, most: int) -> bool:
        """Append a context and as many of its questions as fit; False when not even one does."""
        chosen = sample.questions[:most]
        texts = [page.render() for page in sample.pages] + [question.text + self.after for question in chosen]
        parts = self.encode(texts)
        pages, questions = parts[: len(sample.pages)], parts[len(sample.pages) :]
        left = room - len(self.system) - sum(map(len, pages))
        answers = self.tokenizer.backend_tokenizer.encode_batch(
            [question.answer for question in chosen], add_special_tokens=False
        )
        ends = [len(self.system)]
        for page in pages:
            ends.append(ends[-1] + len(page))
        fitting = [k for k in range(len(chosen)) if len(questions[k]) + len(answers[k].ids) + 1 <= left]
        if not fitting:
            return False
        row.add(self.system, 0, number, 0, -1)
        for index, page in enumerate(pages):
            row.add(page, ends[index], number, 0, index)
        for segment, k in enumerate(fitting, start=1):
            ids = [*questions[k], *answers[k].ids, self.end]
            if len(ids) > left:
                break
            left -= len(ids)
            row.add(ids, ends[chosen[k].after], number, segment, -1)
            self._label(row, chosen[k], answers[k].offsets, len(answers[k].ids) + 1)
        return True

    def _label(self, row: Row, question: Question, offsets: list[tuple[int, int]], count: int) -> None:
        """Label the last `count` tokens: each is predicted from the token before it."""
        begin = question.answer.rindex(question.value)
        end = begin + len(question.value)
        row.asked.append(question)
        place = len(row.ids) - count
        for k in range(count):
            row.label[place + k - 1] = row.ids[place + k]
            row.question[place + k - 1] = len(row.asked) - 1
            row.value[place + k - 1] = int(k < len(offsets) and begin < offsets[k][1] and offsets[k][0] < end)


@dataclass(frozen=True)
class Mix:
    """What the rows of a stage are made of."""

    smallest: int  # pages of a context
    largest: int
    shape: contexts.Shape
    story: float  # share of story samples
    babi: float  # share of bAbI samples


def draw(rng: random.Random, mix: Mix, babi: list[Sample]) -> Sample:
    """One training sample."""
    chance = rng.random()
    if babi and chance < mix.babi:
        return rng.choice(babi)
    if chance < mix.babi + mix.story:
        return stories.build(rng, "train", rng.randint(2, mix.largest))
    return contexts.build(rng, "train", rng.randint(mix.smallest, mix.largest), mix.shape)


def rows(encoder: Encoder, rng: random.Random, mix: Mix, babi: list[Sample], count: int, length: int) -> list[Row]:
    """Full rows of training samples; a row takes further samples while there is room."""
    made = []
    for _ in range(count):
        row, number, failed = Row(), 0, 0
        while failed < 2 and length - len(row.ids) > 80:
            done = encoder.fill(row, draw(rng, mix, babi), number, length - len(row.ids), 12)
            number, failed = number + done, failed + (not done)
        made.append(row)
    return made


def collate(made: list[Row], length: int, pad: int) -> dict[str, Tensor]:
    """Stack rows into int64 tensors [rows, length]."""
    empty = {"ids": pad, "sample": -1, "label": IGNORE, "question": -1}
    return {
        name: torch.tensor([getattr(row, name) + [empty.get(name, 0)] * (length - len(row.ids)) for row in made])
        for name in FIELDS
    }


def mask(batch: dict[str, Tensor], block: bool = False) -> Tensor:
    """Which key each token sees, bool [rows, 1, length, length]; `block` hides other pages from a page."""
    sample, segment, position, page = (batch[name] for name in ("sample", "segment", "position", "page"))
    same = sample[:, :, None] == sample[:, None, :]
    context = (segment[:, None, :] == 0) & (position[:, None, :] < batch["limit"][:, :, None])
    if block:
        context &= (segment[:, :, None] > 0) | (page[:, :, None] == page[:, None, :])
    own = (segment[:, :, None] == segment[:, None, :]) & (segment[:, :, None] > 0)
    own &= position[:, None, :] <= position[:, :, None]
    seen = same & (context | own)
    return (seen | torch.eye(seen.shape[1], dtype=torch.bool)).unsqueeze(1)

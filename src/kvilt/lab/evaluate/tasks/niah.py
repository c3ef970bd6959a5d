"""Needles in a haystack, in the manner of RULER (Hsieh et al. 2024), with sentences and words of our own."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from kvilt.lab.evaluate.tasks.base import Generated, Sample, listed, require
from kvilt.types import Document

RULE = "Provide a short answer directly separated by space. Short Answer:"
KINDS = ("single", "multikey", "multivalue", "multiquery")

_COLOURS = listed("amber,azure,coral,crimson,ebony,golden,hazel,indigo,ivory,jade,lilac,ochre,olive,pearl,ruby,silver")
_THINGS = listed("anchor,barrel,beacon,cabin,compass,dynamo,engine,ferry,gondola,hangar,kiln,lantern,mill,orchard,pier")

_WHO = listed(
    "the gardener,a young teacher,our neighbour,the old sailor,a quiet clerk,the baker,her cousin,the night guard,"
    "a passing cyclist,the librarian,his aunt,the painter,a tired nurse,the miller,one of the twins,the ferryman"
)
_DID = listed(
    "walked along,spoke about,thought of,wrote a letter about,took a picture of,stopped in front of,dreamed of,"
    "told a story about,waited near,looked for,sang about,came back to,made a drawing of,asked about"
)
_WHAT = listed(
    "the river,the empty square,a field of barley,the railway bridge,the harbour wall,a row of poplars,the frozen lake,"
    "the market,the hill behind the school,a narrow lane,the last tram,an open window,the church tower,the summer house"
)
_WHEN = listed(
    "before sunrise,in the rain,without a word,on a cold morning,after supper,for most of the day,late in the autumn,"
    "while the others slept,with a smile,as the bells rang,in the first snow,for no reason at all,once a week"
)


@dataclass(frozen=True)
class NeedleInAHaystack(Generated):
    """Seven-digit codes hidden in chatter that is cut into documents of `chunk` characters at sentence ends.

    single: one code, asked for. multikey: `needles` codes of different things, one asked for. multivalue: one thing
    with `needles` codes. multiquery: `needles` codes of different things, all asked for."""

    NAME: ClassVar[str] = "niah"
    ORDERED: ClassVar[bool] = True

    answer_tokens: int = 128
    kind: str = "single"
    characters: int = 32768  # about 8,192 tokens
    chunk: int = 4096
    needles: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.kind in KINDS, f"niah: unknown kind {self.kind!r}. Known: {', '.join(KINDS)}.")
        require(0 < self.chunk <= self.characters, "niah: needs 0 < chunk <= characters.")
        most = len(_COLOURS) * len(_THINGS)
        require(0 < self.needles <= min(most, self.characters // 200), f"niah: {self.needles} needles do not fit.")

    @property
    def metrics(self) -> tuple[str, ...]:
        """RULER's recall of all answers; KV Packet's corpus F1."""
        return "recall", "micro_f1_joined"

    def _sample(self, rng: random.Random, split: str, number: int) -> Sample:
        needles = self._needles(rng)
        asked = [key for key, _ in needles] if self.kind == "multiquery" else [needles[0][0]]
        answers = tuple(code for key, code in needles if key in asked)
        sentences = _haystack(rng, self.characters)
        places = sorted(rng.sample(range(len(sentences)), len(needles)), reverse=True)
        for place, (key, code) in zip(places, rng.sample(needles, len(needles)), strict=True):
            sentences.insert(place, f"The code of the {key} is {code}.")
        chunks = _chunks(sentences, self.chunk)
        gold = [i for i, text in enumerate(chunks) if any(code in text for code in answers)]
        wanted = ", ".join(f"the {key}" for key in dict.fromkeys(asked))
        asking = f"What are all the codes of {wanted} that the text above mentions?\n{RULE}"
        name, told = f"{self.kind}-{split}-{number}", {"kind": self.kind, "gold": gold}
        return Sample(name, asking, tuple(map(Document, chunks)), answers, told)

    def _needles(self, rng: random.Random) -> list[tuple[str, str]]:
        """(thing, code) pairs; the first thing is the one asked for."""
        count = 1 if self.kind == "single" else self.needles
        codes = rng.sample(range(1_000_000, 10_000_000), count)
        pairs = rng.sample([f"{colour} {thing}" for colour in _COLOURS for thing in _THINGS], count)
        keys = pairs[:1] * count if self.kind == "multivalue" else pairs
        return [(key, str(code)) for key, code in zip(keys, codes, strict=True)]


def _haystack(rng: random.Random, characters: int) -> list[str]:
    sentences, length = [], 0
    while length < characters:
        text = " ".join(rng.choice(words) for words in (_WHO, _DID, _WHAT, _WHEN))
        sentences.append(f"{text[0].upper()}{text[1:]}.")
        length += len(text) + 2
    return sentences


def _chunks(sentences: list[str], limit: int) -> list[str]:
    """Consecutive sentences packed into texts of at most `limit` characters (a longer sentence stands alone)."""
    chunks = [sentences[0]]
    for sentence in sentences[1:]:
        if len(chunks[-1]) + 1 + len(sentence) > limit:
            chunks.append(sentence)
        else:
            chunks[-1] += f" {sentence}"
    return chunks

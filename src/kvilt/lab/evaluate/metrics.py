"""Metrics of one answer, each a (numerator, denominator) pair: a score over samples is the ratio of the sums.

For a mean over samples the pair is (value, 1); corpus F1 is (2 TP, 2 TP + FP + FN)."""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

from kvilt.errors import MissingExtra, UserError

Pair = tuple[float, float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NOT_MENTIONED = re.compile(
    r"not (mentioned|provided|specified|stated|given|available|found)|no (information|mention)"
    r"|(do|does|did) not (say|mention|provide|contain|specify|state)|(cannot|can't|unable to) (find|answer|determine)"
    r"|(don't|do not) know"
)


def normalise(text: str) -> str:
    """SQuAD's normal form: lower case, no ASCII punctuation, no a/an/the, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def accuracy(text: str, answers: Sequence[str]) -> Pair:
    """Sub-string accuracy (KVLink A.2): is any normalised answer a part of the normalised text?"""
    return _mean(any(_inside(a, text) for a in answers))


def word_accuracy(text: str, answers: Sequence[str]) -> Pair:
    """Sub-string accuracy on whole words, so that "no" is not found in "north"."""
    return _mean(any(f" {normalise(a)} " in f" {normalise(text)} " for a in answers))


def recall(text: str, answers: Sequence[str]) -> Pair:
    """The share of answers that stand in the text (RULER asks for all of them)."""
    return sum(_inside(a, text) for a in answers) / len(answers), 1.0


def exact(text: str, answers: Sequence[str]) -> Pair:
    """Exact match after normalisation."""
    return _mean(any(normalise(a) == normalise(text) for a in answers))


def f1(text: str, answers: Sequence[str]) -> Pair:
    """SQuAD's token F1 of the best answer; its mean over samples is macro F1."""
    return max(_ratio(_counts(normalise(text).split(), normalise(a).split())) for a in answers), 1.0


def micro_f1(text: str, answers: Sequence[str]) -> Pair:
    """KV Packet's corpus F1 (2.6): lower case, no final period, counts summed over samples; the best answer counts."""
    return max((_counts(_light(text), _light(a)) for a in answers), key=_ratio)


def micro_f1_joined(text: str, answers: Sequence[str]) -> Pair:
    """KV Packet's corpus F1 where one text must hold all answers."""
    return micro_f1(text, [" ".join(answers)])


def not_mentioned(text: str, answers: Sequence[str]) -> Pair:
    """Whether the text says that the documents do not tell."""
    return _mean(bool(_NOT_MENTIONED.search(text.lower())))


def rouge_l(text: str, answers: Sequence[str]) -> Pair:
    """ROUGE-L F with the Porter stemmer, from the rouge-score package."""
    return max(float(_rouge().score(answer, text)["rougeL"].fmeasure) for answer in answers), 1.0


METRICS: dict[str, Callable[[str, Sequence[str]], Pair]] = {
    function.__name__: function
    for function in (accuracy, word_accuracy, recall, exact, f1, micro_f1, micro_f1_joined, not_mentioned, rouge_l)
}


def score(names: Sequence[str], text: str, answers: Sequence[str]) -> dict[str, Pair]:
    """The named metrics of one answer."""
    for name in names:
        if name not in METRICS:
            raise UserError(f"unknown metric {name!r}. Known: {', '.join(METRICS)}.")
    return {name: METRICS[name](text, answers) for name in names}


def _mean(right: bool) -> Pair:
    return float(right), 1.0


def _inside(answer: str, text: str) -> bool:
    part, whole = normalise(answer), normalise(text)
    return part in whole if part else not whole  # an answer that is all articles ("A") would be part of everything


def _light(text: str) -> list[str]:
    return text.lower().strip().rstrip(".").split()


def _counts(found: list[str], wanted: list[str]) -> Pair:
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2.0 * common, float(len(found) + len(wanted))


def _ratio(pair: Pair) -> float:
    return pair[0] / pair[1] if pair[1] else 1.0  # nothing said where nothing was wanted


@functools.cache
def _rouge() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        raise MissingExtra("rouge-score", "data") from None
    return cast(Any, rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True))

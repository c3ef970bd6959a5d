"""Metrics by hand-computed values."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from kvilt.errors import MissingExtra, UserError
from kvilt.lab.evaluate import metrics


def test_normalise_follows_squad():
    """Danger: figures cannot be compared with anybody else's."""
    assert metrics.normalise("The  Theatre, an “Old” one!") == "theatre “old” one"  # ASCII punctuation only
    assert metrics.normalise("U.S.") == "us"


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        ("It was Wilhelm Röntgen.", ["Marie Curie", "wilhelm röntgen"], 1.0),
        ("It was Röntgen.", ["Wilhelm Röntgen"], 0.0),
        ("going north", ["no"], 1.0),
        ("something else", ["A"], 0.0),  # an answer that is only an article is not part of everything
    ],
)
def test_substring_accuracy(text, answers, right):
    """Danger: an answer of articles alone is a part of everything."""
    assert metrics.accuracy(text, answers) == (right, 1.0)


def test_whole_words_exact_and_recall():
    """Danger: "no" is found in "north"."""
    assert metrics.word_accuracy("going north", ["no"]) == (0.0, 1.0)
    assert metrics.word_accuracy("No, she is not.", ["no"]) == (1.0, 1.0)
    assert metrics.exact("The Rhine.", ["rhine"]) == (1.0, 1.0)
    assert metrics.exact("The river Rhine.", ["rhine"]) == (0.0, 1.0)
    assert metrics.recall("1234 and 99", ["1234", "5678"]) == (0.5, 1.0)


def test_macro_f1_is_squads_best_over_answers():
    """Danger: the first of several answers counts instead of the best."""
    assert metrics.f1("the old red house", ["red house by the sea", "blue"])[0] == pytest.approx(2 * 2 / (3 + 4))
    assert metrics.f1("", ["house"]) == (0.0, 1.0)


def test_micro_f1_sums_counts_and_keeps_articles_and_punctuation():
    """Danger: KV Packet's F1 is computed as SQuAD's."""
    assert metrics.micro_f1("The cat.", ["the cat"]) == (4.0, 4.0)
    assert metrics.micro_f1("the, cat", ["the cat"]) == (2.0, 4.0)  # "the," is another word
    pairs = [metrics.micro_f1("a b c d", ["a"]), metrics.micro_f1("x", ["x"])]
    assert sum(p[0] for p in pairs) / sum(p[1] for p in pairs) == pytest.approx(4 / 7)  # 2 TP, 3 FP, 0 FN
    assert metrics.micro_f1_joined("1 2", ["1", "2"]) == (4.0, 4.0)


@pytest.mark.parametrize(
    "text", ["It is not mentioned.", "The text does not say.", "I cannot find it.", "I don't know"]
)
def test_not_mentioned(text):
    """Danger: a refusal counts as an answer, or an answer as a refusal."""
    assert metrics.not_mentioned(text, ["x"])[0] == 1.0
    assert metrics.not_mentioned("She is a doctor.", ["x"])[0] == 0.0


def test_unknown_metric_is_named():
    """Danger: a task of one's own ends in a KeyError."""
    with pytest.raises(UserError, match=r"'bleu'.*rouge_l"):
        metrics.score(["bleu"], "a", ["a"])


def test_rouge_uses_the_package_with_stemmer(monkeypatch):
    """Danger: ROUGE differs from the papers' by its stemmer."""
    made = []

    class Scorer:
        def __init__(self, names, use_stemmer):
            made.append((names, use_stemmer))

        def score(self, target, prediction):
            return {"rougeL": SimpleNamespace(fmeasure=0.75 if target == "near" else 0.25)}

    package = ModuleType("rouge_score")
    package.rouge_scorer = SimpleNamespace(RougeScorer=Scorer)
    monkeypatch.setitem(sys.modules, "rouge_score", package)
    metrics._rouge.cache_clear()
    try:
        assert metrics.rouge_l("text", ["far", "near"]) == (0.75, 1.0)
        assert made == [(["rougeL"], True)]
    finally:
        metrics._rouge.cache_clear()


def test_missing_rouge_names_the_extra(monkeypatch):
    """Danger: an ImportError instead of what to install."""
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    metrics._rouge.cache_clear()
    with pytest.raises(MissingExtra, match=r"kvilt\[data\]"):
        metrics.rouge_l("text", ["text"])

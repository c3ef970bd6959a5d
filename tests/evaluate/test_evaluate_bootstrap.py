"""Bootstrap intervals: seeded, near the normal approximation, paired, and by group."""

import numpy as np
import pytest

from kvilt.lab.evaluate.bootstrap import difference, interval


def pairs(values):
    return [(float(v), 1.0) for v in values]


def test_interval_is_seeded_and_near_the_normal_approximation():
    """Danger: intervals are too narrow, or others at every call."""
    right = pairs([1] * 300 + [0] * 200)
    found = interval(right)
    assert found == interval(right)
    assert found != interval(right, seed=1)
    half = 1.96 * (0.6 * 0.4 / 500) ** 0.5
    assert found.value == 0.6
    assert found.low == pytest.approx(0.6 - half, abs=0.006)
    assert found.high == pytest.approx(0.6 + half, abs=0.006)


def test_corpus_f1_is_a_ratio_of_sums():
    """Danger: a mean of ratios stands where a ratio of sums should."""
    found = interval([(2.0, 5.0), (2.0, 2.0), (0.0, 3.0)])
    assert found.value == pytest.approx(0.4)
    assert found.low <= 0.4 <= found.high


def test_groups_widen_the_interval():
    """Danger: ten places of one question count as ten questions."""
    rng = np.random.default_rng(0)
    values = np.repeat(rng.integers(0, 2, 50), 10)
    groups = [str(i // 10) for i in range(500)]
    alone, together = interval(pairs(values)), interval(pairs(values), groups)
    assert together.value == alone.value
    assert together.high - together.low > 2.5 * (alone.high - alone.low)  # ten equal samples say as much as one


def test_difference_is_paired():
    """Danger: a difference is as uncertain as two separate scores."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 2, 400)
    b = np.where(rng.random(400) < 0.05, 1 - a, a)  # nearly the same answers
    found = difference(pairs(a), pairs(b))
    assert found.value == pytest.approx(a.mean() - b.mean())
    assert found.high - found.low < 0.05  # two separate intervals of 400 are 0.1 wide each
    assert difference(pairs(a), pairs(a)) == (0.0, 0.0, 0.0)


def test_all_right_or_all_wrong_still_has_an_interval():
    """Danger: twelve right answers of twelve look like certainty."""
    assert interval(pairs([1] * 100)).low == pytest.approx(1 - 3.84 / 103.84, abs=1e-3)
    assert interval(pairs([0] * 100)).high == pytest.approx(3.84 / 103.84, abs=1e-3)


def test_many_samples_are_drawn_in_pieces():
    """Danger: a large table takes all memory."""
    assert interval(pairs(np.arange(30_000) % 2), resamples=300).value == 0.5

"""Paired bootstrap intervals over samples, or over groups of samples that belong together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvilt.lab.evaluate.metrics import Pair

_CHUNK = 1 << 22  # draws held in memory at a time
_Z2 = 1.959964**2  # the 97.5 % point of the normal distribution, squared


Groups = Sequence[str] | None  # to which group each sample belongs


class Interval(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def interval(pairs: Sequence[Pair], groups: Groups = None, seed: int = 0, resamples: int = 2000) -> Interval:
    """The ratio of sums of one strategy's (numerator, denominator) pairs.

    Samples of one group (the same question at ten gold positions) are drawn together."""
    sums = _group_sums(np.asarray(pairs, dtype=float), groups)
    value = float(_ratio(sums.sum(0)))
    if value in (0.0, 1.0):  # every resample is the same: Wilson's interval still knows how few samples there were
        far = _Z2 / (len(sums) + _Z2)
        return Interval(value, 0.0, far) if value == 0 else Interval(value, 1 - far, 1.0)
    return _interval(value, _ratio(_draw(sums, seed, resamples)))


def difference(
    a: Sequence[Pair], b: Sequence[Pair], groups: Groups = None, seed: int = 0, resamples: int = 2000
) -> Interval:
    """The score of `a` minus the score of `b`, both on the same samples in the same order."""
    sums = _group_sums(np.hstack([np.asarray(a, dtype=float), np.asarray(b, dtype=float)]), groups)
    total, drawn = sums.sum(0), _draw(sums, seed, resamples)
    return _interval(_ratio(total[:2]) - _ratio(total[2:]), _ratio(drawn[:, :2]) - _ratio(drawn[:, 2:]))


def _group_sums(columns: NDArray[np.float64], groups: Groups) -> NDArray[np.float64]:
    if groups is None:
        return columns
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.zeros((len(names), columns.shape[1]))  # (groups, columns)
    np.add.at(sums, index, columns)
    return sums


def _draw(sums: NDArray[np.float64], seed: int, resamples: int) -> NDArray[np.float64]:
    """Sums over each resample, (resamples, columns): a draw with replacement is a vector of multinomial counts."""
    rng, count = np.random.default_rng(seed), len(sums)
    step = max(1, _CHUNK // count)
    sizes = [min(step, resamples - done) for done in range(0, resamples, step)]
    return np.concatenate([rng.multinomial(count, np.full(count, 1 / count), size) @ sums for size in sizes])


def _ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(sums[..., 0], sums[..., 1], out=np.zeros(sums.shape[:-1]), where=sums[..., 1] > 0)


def _interval(value: Any, drawn: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float(value), float(low), float(high))

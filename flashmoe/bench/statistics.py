"""Medians with their spread, and how sure a ratio of two medians is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
_AT_ONCE = 500


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of ``n`` times, in ms."""

    median: float
    q1: float
    q3: float
    n: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        """The spread of at least one time; quartiles interpolate linearly between times."""
        q1, median, q3 = np.quantile(np.asarray(times, np.float64), [0.25, 0.5, 0.75])
        return cls(float(median), float(q1), float(q3), len(times))


@dataclass(frozen=True)
class Interval:
    """A ratio of medians with the bounds of its bootstrap interval."""

    ratio: float
    low: float
    high: float
    pairs: int


def bootstrap_ratio(
    upper: Sequence[float],
    lower: Sequence[float],
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """median(upper) / median(lower), and its percentile bootstrap interval.

    The two hold one time a round each.  Whole rounds are drawn with replacement, since what slows a
    round (a clock that falls, say) slows both of its times.
    """
    above, below = np.asarray(upper, np.float64), np.asarray(lower, np.float64)
    if above.shape != below.shape or above.ndim != 1 or not above.size:
        raise ValueError("a ratio of pairs needs as many times above as below, and at least one")
    generator = np.random.default_rng(seed)
    ratios = []
    for begin in range(0, resamples, _AT_ONCE):
        count = min(_AT_ONCE, resamples - begin)
        drawn = generator.integers(0, above.size, (count, above.size))
        ratios.append(np.median(above[drawn], axis=1) / np.median(below[drawn], axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    ratio = np.median(above) / np.median(below)
    return Interval(float(ratio), float(low), float(high), int(above.size))

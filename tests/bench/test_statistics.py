"""Medians, quartiles and the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.bench.statistics import Spread, bootstrap_ratio


def test_quartiles_interpolate() -> None:
    spread = Spread.of([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (spread.q1, spread.median, spread.q3, spread.n) == (2.0, 3.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)


@given(st.lists(st.floats(0.01, 1e3), min_size=1, max_size=50))
def test_quartiles_are_in_order(times: list[float]) -> None:
    spread = Spread.of(times)
    assert min(times) <= spread.q1 <= spread.median <= spread.q3 <= max(times)


def test_a_ratio_without_noise_is_certain() -> None:
    found = bootstrap_ratio([2.0] * 20, [1.0] * 20)
    assert (found.ratio, found.low, found.high, found.pairs) == (2.0, 2.0, 2.0, 20)


def test_the_interval_covers_the_true_ratio_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        below = generator.lognormal(0.0, 0.05, 60)
        above = 1.02 * generator.lognormal(0.0, 0.05, 60)
        found = bootstrap_ratio(above, below, resamples=400, seed=seed)
        assert found.low <= found.ratio <= found.high
        covered += found.low <= 1.02 <= found.high
    assert 87 <= covered <= 100


def test_what_slows_both_of_a_round_does_not_widen_the_interval() -> None:
    slow = np.random.default_rng(2).uniform(1.0, 2.0, 200)
    together = bootstrap_ratio(1.01 * slow, slow)
    apart = bootstrap_ratio(1.01 * slow, np.random.default_rng(3).permutation(slow))
    assert together.high - together.low < 0.2 * (apart.high - apart.low)


def test_the_same_seed_gives_the_same_interval() -> None:
    times = np.random.default_rng(4).uniform(1.0, 2.0, (2, 50))
    assert bootstrap_ratio(*times, seed=5) == bootstrap_ratio(*times, seed=5)
    assert bootstrap_ratio(*times, seed=5) != bootstrap_ratio(*times, seed=6)


def test_pairs_must_be_pairs() -> None:
    with pytest.raises(ValueError, match="as many"):
        bootstrap_ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_ratio([], [])

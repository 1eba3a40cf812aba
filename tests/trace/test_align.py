"""Clocks that are off and drift, simulated: offsets and bounds must hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flashmoe.trace import schema
from flashmoe.trace.align import Alignment, Exchange, align_rings, tightest


class Clock:
    """The own clock of a rank, as a function of the reference's."""

    def __init__(self, offset_ns: int, drift: float) -> None:
        self.offset_ns, self.drift = offset_ns, drift

    def own(self, reference: np.ndarray | int) -> np.ndarray:
        t = np.asarray(reference, np.int64)
        return t + self.offset_ns + np.rint(t * self.drift).astype(np.int64)


def exchanges(clock: Clock, at: int, rng: np.random.Generator, count: int = 30) -> Exchange:
    """Two-way exchanges with delays of 0.5 to 20 us each way, uneven ones too."""
    there_delay, back_delay = rng.integers(500, 20_000, (2, count))
    asked = at + np.arange(count) * 50_000
    there = asked + there_delay
    return tightest(clock.own(asked), there, clock.own(there + back_delay))


@settings(max_examples=80, deadline=None)
@example(
    offset=905, drift=0.0, seed=935, seconds=1.0
)  # left as it is, and further off than a bound
@given(
    offset=st.integers(-(10**12), 10**12),
    drift=st.floats(-2e-4, 2e-4),
    seed=st.integers(0, 1000),
    seconds=st.floats(0.01, 100.0),
)
def test_the_truth_lies_within_the_bounds(
    offset: int, drift: float, seed: int, seconds: float
) -> None:
    rng, clock = np.random.default_rng(seed), Clock(offset, drift)
    start = 10**13
    end = start + int(seconds * 1e9)
    how = Alignment.of(exchanges(clock, start, rng), exchanges(clock, end, rng))
    # Inside, and as far outside as the run is long.
    true = rng.integers(start - (end - start), end + (end - start), 200)
    own = clock.own(true)
    # While the exchanges last the clock drifts too: 1.5 ms of them.
    slack = 2 + abs(drift) * 2e6
    bound = how.bound_ns(own) + slack
    assert (np.abs(how.mapped(own) - true) <= bound).all()
    left = 0 if how.applied else np.abs(how.offset(own))
    assert (np.abs(how.to_reference(own) - true) <= bound + left).all()
    assert how.drift is not None
    assert abs(how.drift + drift / (1 + drift)) <= how.drift_bound + slack / (end - start)


def test_more_exchanges_never_widen_the_bound() -> None:
    clock, rng = Clock(123_456, 0.0), np.random.default_rng(1)
    few = exchanges(clock, 10**9, rng, 3)
    many = exchanges(clock, 10**9, np.random.default_rng(1), 300)
    assert many.bound_ns <= few.bound_ns
    assert abs(many.offset_ns + 123_456) <= many.bound_ns


def test_a_clock_that_steps_while_it_is_asked_is_still_measured() -> None:
    sent, back = np.array([0, 1000, 2000]), np.array([100, 1900, 2100])
    there = np.array([50, 1450, 1_002_050])  # a jump of a millisecond before the last
    found = tightest(sent, there, back)
    assert found.bound_ns == 50
    assert found.offset_ns in (0, 1_000_000)


def test_one_clock_is_left_as_it_is() -> None:
    how = Alignment.of(Exchange(0, 300, 400), Exchange(10**9, -100, 150))
    times = np.array([5, 10**9], np.uint64)
    assert not how.applied
    assert (how.to_reference(times) == times).all()


def test_without_an_end_the_bound_grows_by_what_crystals_may_drift() -> None:
    how = Alignment.of(Exchange(1000, 5_000_000, 200), None)
    assert how.drift is None
    assert how.bound_ns(np.array([1000]))[0] == 200
    assert how.bound_ns(np.array([1000 + 10**9]))[0] == pytest.approx(200 + 1e5)
    assert Alignment.from_dict(how.as_dict()) == how


def test_rings_are_moved_whole_and_spans_still_touch() -> None:
    how = Alignment.of(Exchange(10**9, -700, 10), Exchange(2 * 10**9, 99_300, 10))
    headers = np.zeros(2, schema.RING_HEADER)
    headers["begin_ns"], headers["end_ns"] = 10**9, [2 * 10**9, 0]
    records = np.zeros(1000, schema.RECORD)
    edges = np.sort(np.random.default_rng(0).integers(10**9, 2 * 10**9, 1001))
    records["t0_ns"], records["dur_ns"] = edges[:-1], np.diff(edges)
    records["dur_ns"][-1] = 0xFFFFFFFF
    align_rings(headers, [records], how)
    assert headers["end_ns"].tolist() == [2 * 10**9 + 99_300, 0]
    ends = records["t0_ns"] + records["dur_ns"]
    assert (ends[:-2] == records["t0_ns"][1:-1]).all()
    assert records["dur_ns"][-1] == 0xFFFFFFFF
    assert (records["t0_ns"] == how.to_reference(edges[:-1])).all()

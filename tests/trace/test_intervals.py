"""Interval sets against sets of whole nanoseconds."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.trace.intervals import Union, overlap_before, union

INTERVALS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=12)
TIMES = np.arange(-3, 80)


def points(intervals: list[tuple[int, int]]) -> set[int]:
    return {t for begin, length in intervals for t in range(begin, begin + length)}


def made(intervals: list[tuple[int, int]]) -> Union:
    begin = np.array([b for b, _ in intervals], np.int64)
    return union(begin, begin + np.array([length for _, length in intervals], np.int64))


@given(INTERVALS)
def test_a_union_covers_what_its_intervals_cover(intervals: list[tuple[int, int]]) -> None:
    got, want = made(intervals), points(intervals)
    pieces = list(zip(got.begin.tolist(), got.end.tolist(), strict=True))
    assert {t for a, b in pieces for t in range(a, b)} == want
    assert all(a < b for a, b in pieces)
    assert all(b < c for (_, b), (c, _) in itertools.pairwise(pieces))
    assert got.total() == len(want)


@given(INTERVALS)
def test_before_counts_what_lies_before(intervals: list[tuple[int, int]]) -> None:
    want = points(intervals)
    assert made(intervals).before(TIMES).tolist() == [sum(p < t for p in want) for t in TIMES]


@given(INTERVALS, INTERVALS)
def test_overlap_counts_what_both_cover(
    one: list[tuple[int, int]], two: list[tuple[int, int]]
) -> None:
    both = points(one) & points(two)
    want = [sum(p < t for p in both) for t in TIMES]
    assert overlap_before(made(one), made(two), TIMES).tolist() == want
    assert overlap_before(made(two), made(one), TIMES).tolist() == want

"""Times and sets of time intervals, as arrays of begins and ends.  Pure functions; all int64 ns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Later than any time.
NEVER = np.iinfo(np.int64).max


def least_by(keys: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """int64 [size]: of each key below ``size`` the least of its values, NEVER where it has none.

    ``keys``, ``values``: integers [n].
    """
    least = np.full(size, NEVER)
    np.minimum.at(least, keys, values)
    return least


@dataclass(frozen=True)
class Union:
    """A set of disjoint, ascending, non-touching intervals: begin [n], end [n]."""

    begin: np.ndarray
    end: np.ndarray

    def total(self) -> int:
        """The length of the set."""
        return int((self.end - self.begin).sum())

    def before(self, times: np.ndarray) -> np.ndarray:
        """int64 [m]: the length of the set's part that lies before each of ``times`` [m]."""
        if not len(self.begin):
            return np.zeros(len(times), np.int64)
        lengths = self.end - self.begin
        until = np.concatenate([[0], np.cumsum(lengths)])
        at = np.searchsorted(self.begin, times, side="right")
        last = np.maximum(at - 1, 0)
        over = np.clip(times - self.begin[last], 0, lengths[last])
        return np.where(at > 0, until[last] + over, 0)


def union(begin: np.ndarray, end: np.ndarray) -> Union:
    """The union of the intervals [begin, end), in any order; empty ones add nothing.

    Both ends are sorted on their own: interval i of the sorted begins starts a new piece exactly
    where all that began before it have ended, that is where it begins after the i-th end.
    """
    some = end > begin
    if not some.all():
        begin, end = begin[some], end[some]
    if not len(begin):
        return Union(np.zeros(0, np.int64), np.zeros(0, np.int64))
    # Events come as one ascending run an actor, which a merge sort is fastest at.
    starts, stops = np.sort(begin, kind="stable"), np.sort(end, kind="stable")
    fresh = np.flatnonzero(starts[1:] > stops[:-1])
    return Union(
        starts[np.concatenate([[0], fresh + 1])],
        stops[np.concatenate([fresh, [len(stops) - 1]])],
    )


def overlap_before(one: Union, two: Union, times: np.ndarray) -> np.ndarray:
    """int64 [m]: the length of the intersection of two sets that lies before each of ``times``."""
    if not len(one.begin):
        return np.zeros(len(times), np.int64)
    inside = two.before(one.end) - two.before(one.begin)
    until = np.concatenate([[0], np.cumsum(inside)])
    at = np.searchsorted(one.begin, times, side="right")
    last = np.maximum(at - 1, 0)
    cut = np.minimum(times, one.end[last])
    partial = two.before(cut) - two.before(one.begin[last])
    return np.where(at > 0, until[last] + partial, 0)

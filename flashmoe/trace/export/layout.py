"""What both formats draw: tracks on which slices nest, payload over time, and the words on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from flashmoe.trace.columns import Events
from flashmoe.trace.schema import BYTE_KINDS, LANE_NAME, EventKind, Lane, TimeClass

CATEGORY: Final = {
    TimeClass.NONE: "launch",
    TimeClass.BUSY: "busy",
    TimeClass.COMM: "comm",
    TimeClass.WAIT: "wait",
}
# What `aux` is called on a slice; kinds not named here have nothing to say in it.
AUX_NAME: Final[dict[EventKind, str]] = {
    EventKind.LAUNCH: "cycles",
    EventKind.GATE: "tokens",
    EventKind.GEMM1: "cycles",
    EventKind.GEMM2: "cycles",
    EventKind.LOAD: "cycles",
    EventKind.COMBINE: "tokens",
    EventKind.WAIT_BARRIER: "lacking",
    EventKind.WAIT_ROWS: "lacking",
    EventKind.WAIT_H: "lacking",
    **dict.fromkeys(BYTE_KINDS, "bytes"),
}
INSTANTS: Final = (EventKind.PUT,)


def world_label(meta: dict[str, Any]) -> str:
    """What the ranks of a run were, for the names that a viewer shows: never a bare number."""
    kind = (meta.get("world") or {}).get("kind", "")
    device = (meta.get("device") or {}).get("name", "")
    label = {"host": "host engine, not a GPU", "local": "virtual rank"}.get(kind, kind)
    return ", ".join(part for part in (label, "" if kind == "host" else device) if part)


@dataclass(frozen=True)
class Track:
    """Where slices of one actor are drawn; ``spill`` > 0 where they would not nest on the first."""

    rank: int
    sm: int
    lane: int
    spill: int

    @property
    def name(self) -> str:
        lane = LANE_NAME.get(Lane(self.lane), str(self.lane))
        return f"SM {self.sm} {lane}" + (f" (overlap {self.spill})" if self.spill else "")


@dataclass(frozen=True)
class Layout:
    """The order in which slices begin and end, track after track.

    ``event``: int64 [units], the event of a unit; ``is_end``: bool [units], true for the end of a
    ``launch``, whose begin is a unit of its own.  All other events are one unit: nothing nests in
    them.  ``track``: int32 [events], index into ``tracks``.
    """

    event: np.ndarray
    is_end: np.ndarray
    track: np.ndarray
    tracks: list[Track]


def lay_out(events: Events) -> Layout:
    """Puts every event on a track where it nests: one per (rank, SM, lane), and a second where two
    slices of an actor overlap, which a viewer would drop."""
    start = events.start_ns()
    track = np.zeros(len(events), np.int32)
    tracks: list[Track] = []
    units: list[np.ndarray] = []
    ends: list[np.ndarray] = []
    # An actor at a time: its events lie together and stay in the cache.
    for (rank, sm, lane), where in _actors(events):
        begin = events.t0_ns[where] - start
        end = begin + events.dur_ns[where]
        launch = events.kind[where] == EventKind.LAUNCH
        number = np.arange(where.start, where.stop) if isinstance(where, slice) else where
        todo = np.arange(len(number))
        spill = 0
        while len(todo):
            order, is_end, rest = _nest(begin[todo], end[todo], launch[todo])
            chosen = number[todo[order]]
            track[chosen] = len(tracks)
            tracks.append(Track(rank, sm, lane, spill))
            units.append(chosen)
            ends.append(is_end)
            todo, spill = todo[rest], spill + 1
    if not units:
        return Layout(np.empty(0, np.int64), np.empty(0, bool), track, tracks)
    return Layout(np.concatenate(units), np.concatenate(ends), track, tracks)


def _actors(events: Events) -> Iterator[tuple[tuple[int, int, int], slice | np.ndarray]]:
    """Each (rank, SM, lane), in order, and where its events are."""
    key = (events.rank.astype(np.int64) << 24) | (events.sm.astype(np.int64) << 8) | events.lane
    if not len(key):
        return
    heads = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
    tails = np.r_[heads[1:], len(key)]
    order = np.argsort(key[heads], kind="stable")
    for same in np.split(order, np.flatnonzero(np.diff(key[heads][order])) + 1):
        value = int(key[heads[same[0]]])
        if len(same) == 1:
            where: slice | np.ndarray = slice(int(heads[same[0]]), int(tails[same[0]]))
        else:
            where = np.concatenate([np.arange(heads[i], tails[i]) for i in same])
        yield (value >> 24, value >> 8 & 0xFFFF, value & 0xFF), where


def _nest(
    begin: np.ndarray, end: np.ndarray, launch: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Units of one track in order, which of them end a launch, and the events that do not nest."""
    # At one time: a launch begins (0), instants (1), a launch ends (2), spans begin (3).
    rank = np.where(launch, 0, np.where(begin == end, 1, 3))
    key = (begin << 2) | rank
    order = np.argsort(key, kind="stable")
    bad = _misfits(begin[order], end[order], launch[order])
    rest = np.sort(order[bad])
    order = order[~bad]
    closing = order[launch[order]]
    where = np.searchsorted(key[order], (end[closing] << 2) | 2)
    is_end = np.insert(np.zeros(len(order), bool), where, True)
    return np.insert(order, where, closing), is_end, rest


def _misfits(begin: np.ndarray, end: np.ndarray, launch: np.ndarray) -> np.ndarray:
    """Which of the events of a track, in order, would not nest among those before: bool [n]."""
    bad = np.zeros(len(begin), bool)
    leaf, around = np.flatnonzero(~launch), np.flatnonzero(launch)
    bad[leaf[1:]] = np.maximum.accumulate(end[leaf])[:-1] > begin[leaf[1:]]
    # Launches that touch do not nest either: the second's begin sorts before the first's end.
    bad[around[1:]] = np.maximum.accumulate(end[around])[:-1] >= begin[around[1:]]
    if not len(around) or not len(leaf):
        return bad
    at = np.searchsorted(around, leaf) - 1  # the launch before it in the order
    owner = around[np.maximum(at, 0)]
    inside = (at >= 0) & (begin[leaf] < end[owner])
    bad[leaf] |= inside & (end[leaf] > end[owner])
    # One that begins before a launch and reaches into it.
    after = around[np.minimum(at + 1, len(around) - 1)]
    bad[leaf] |= (after > leaf) & (end[leaf] > begin[after])
    return bad


@dataclass(frozen=True)
class Payload:
    """Bytes that crossed between ranks, growing over time: one point a transfer.

    ``pairs``: [(source, destination)]; ``pair``, ``t_ns`` (from the run's start, when the transfer
    ended) and ``total`` (bytes of the pair so far) have one entry a point, pair after pair.
    """

    pairs: list[tuple[int, int]]
    pair: np.ndarray
    t_ns: np.ndarray
    total: np.ndarray


def payload(events: Events) -> Payload:
    """Cumulative payload of every (source, destination), starting with a 0 at the run's start."""
    index = events.payload()
    key = (events.rank[index].astype(np.int64) << 16) | events.peer[index]
    names, pair = np.unique(key, return_inverse=True)
    time = events.t0_ns[index] + events.dur_ns[index] - events.start_ns()
    # A point at 0 for each pair, so that the curve begins there.
    pair = np.concatenate([np.arange(len(names)), pair])
    time = np.concatenate([np.zeros(len(names), np.int64), time])
    size = np.concatenate([np.zeros(len(names), np.int64), events.bytes[index].astype(np.int64)])
    order = np.lexsort((time, pair))
    pair, time = pair[order], time[order]
    total = np.cumsum(size[order])
    first = np.searchsorted(pair, np.arange(len(names)))
    before = np.r_[0, total][first]
    return Payload(
        [(int(k) >> 16, int(k) & 0xFFFF) for k in names], pair, time, total - before[pair]
    )

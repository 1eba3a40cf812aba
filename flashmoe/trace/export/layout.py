"""What both formats draw: tracks on which slices nest, payload over time, and the words on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from flashmoe.errors import FlashmoeError
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
    actor, actors = _actors(events)
    begin = events.t0_ns - start
    end = begin + events.dur_ns
    launch = events.kind == EventKind.LAUNCH
    spill = np.zeros(len(events), np.int64)
    todo = np.arange(len(events))
    level = 0
    orders = []
    while len(todo):
        order = todo[_order(actor[todo], begin[todo], events.dur_ns[todo], launch[todo])]
        bad = _misfits(actor[order], begin[order], end[order], launch[order])
        orders.append(order[~bad])
        level += 1
        todo = np.sort(order[bad])
        spill[todo] = level
    key = actor * max(level, 1) + spill
    used = np.flatnonzero(np.bincount(key, minlength=1)) if len(key) else key
    number = np.zeros(int(used.max(initial=0)) + 1, np.int32)
    number[used] = np.arange(len(used))
    track = number[key]
    tracks = []
    for k in used.tolist():
        rank, sm, lane = actors[k // max(level, 1)]
        tracks.append(Track(rank, sm, lane, k % max(level, 1)))
    # One level is the rule: its order already runs track after track.
    order = np.concatenate(orders) if orders else todo
    if level > 1:
        order = order[np.argsort(track[order], kind="stable")]
    closing = np.flatnonzero(launch)
    bits = int(end.max(initial=0)).bit_length()
    closing_key = _keys(track[closing], end[closing], 2, bits)
    where = np.searchsorted(
        _keys(track[order], begin[order], _ranks(events.dur_ns, launch)[order], bits), closing_key
    )
    event = np.insert(order, where, closing)
    is_end = np.insert(np.zeros(len(order), bool), where, True)
    return Layout(event, is_end, track, tracks)


def _actors(events: Events) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Number of each event's (rank, SM, lane), int64 [events], and what the numbers stand for."""
    key = (events.rank.astype(np.int64) << 24) | (events.sm.astype(np.int64) << 8) | events.lane
    heads = np.flatnonzero(np.r_[True, key[1:] != key[:-1]]) if len(key) else key
    names, number = np.unique(key[heads], return_inverse=True)
    actor = np.repeat(number, np.diff(np.r_[heads, len(key)]))
    return actor, [(int(k) >> 24, int(k) >> 8 & 0xFFFF, int(k) & 0xFF) for k in names]


def _ranks(duration: np.ndarray, launch: np.ndarray) -> np.ndarray:
    """Order among what happens at one time: a launch begins (0), instants (1), a launch ends (2),
    spans begin (3)."""
    return np.where(launch, 0, np.where(duration == 0, 1, 3))


def _keys(track: np.ndarray, time: np.ndarray, rank: np.ndarray | int, bits: int) -> np.ndarray:
    if int(track.max(initial=0)).bit_length() + bits + 2 > 63:
        raise FlashmoeError(
            "the run is too long to export: its times and tracks do not fit 63 bits",
            "trace fewer iterations",
        )
    return ((track.astype(np.int64) << bits | time) << 2) | rank


def _order(
    actor: np.ndarray, begin: np.ndarray, duration: np.ndarray, launch: np.ndarray
) -> np.ndarray:
    bits = int((begin + duration).max(initial=0)).bit_length()
    key = _keys(actor, begin, _ranks(duration, launch), bits)
    return np.argsort(key, kind="stable")


def _misfits(
    actor: np.ndarray, begin: np.ndarray, end: np.ndarray, launch: np.ndarray
) -> np.ndarray:
    """Which of the events, in order, would not nest among those before them: bool [n]."""
    # One ascending axis for all actors, so that one running maximum serves them all.
    length = int(end.max(initial=0)) + 2
    base = actor * length
    bad = np.zeros(len(actor), bool)
    for chosen in (np.flatnonzero(launch), np.flatnonzero(~launch)):
        if len(chosen) > 1:
            reached = np.maximum.accumulate((base + end)[chosen])
            # Launches that touch count as overlapping: their begin sorts before the other's end.
            room = 1 if launch[chosen[0]] else 0
            bad[chosen[1:]] = reached[:-1] + room > (base + begin)[chosen[1:]]
            bad[chosen[1:]] &= actor[chosen[1:]] == actor[chosen[:-1]]
    around = np.flatnonzero(launch)
    leaf = np.flatnonzero(~launch)
    if len(around) and len(leaf):
        at = np.searchsorted(around, leaf) - 1  # the launch before it in the order
        owner = around[np.maximum(at, 0)]
        inside = (at >= 0) & (actor[owner] == actor[leaf]) & (begin[leaf] < end[owner])
        bad[leaf] |= inside & (end[leaf] > end[owner])
        # One that begins before a launch and reaches into it.
        after = around[np.minimum(at + 1, len(around) - 1)]
        before = (actor[after] == actor[leaf]) & (begin[leaf] <= begin[after]) & (after > leaf)
        bad[leaf] |= before & (end[leaf] > begin[after])
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

"""What every actor's time went into, launch by launch: the sums every figure starts from.

One entry for each (actor, iteration).  An actor's wall time in an iteration is that of its rank:
from the first begin to the last end over the rank's actors.  Whatever no record covers is idle, or
unrecorded where the actor's ring dropped records, so the five classes add up to the wall exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flashmoe.trace import schema
from flashmoe.trace.columns import Events
from flashmoe.trace.intervals import NEVER, least_by
from flashmoe.trace.schema import EventKind, TimeClass

KINDS = np.array([k for k in EventKind if k not in (EventKind.NONE, EventKind.LAUNCH)])
CLASSES = ("busy", "comm", "wait", "idle", "unrecorded")
_PLACE = np.full(256, len(KINDS), np.int64)  # of a kind among KINDS; the last column is discarded
_PLACE[KINDS] = np.arange(len(KINDS))
_COLUMNS = len(KINDS) + 1
_MOST = 1 << 16  # launches that `iter` can tell apart


@dataclass(frozen=True)
class Actors:
    """The actors of a run, one entry each, in (rank, cta, lane) order.

    ``dropped``, ``count``: records; ``begin_ns``, ``end_ns``: of the last launch, end 0 if it never
    ended; ``cycles``: SM cycles of the last launch, 0 if unknown.
    """

    rank: np.ndarray
    sm: np.ndarray
    cta: np.ndarray
    lane: np.ndarray
    began: np.ndarray
    keep_last: np.ndarray
    dropped: np.ndarray
    count: np.ndarray
    begin_ns: np.ndarray
    end_ns: np.ndarray
    cycles: np.ndarray

    @classmethod
    def of(cls, meta: dict[str, Any]) -> Actors:
        """From run.json.  A ring that never began has no name of its own: its place gives it."""
        rings = meta["rings"]["per_ring"]
        get = {
            name: np.array([ring[name] for ring in rings], np.int64)
            for name in ("rank", "sm", "cta", "lane", "mode", "dropped", "count", "began",
                         "begin_ns", "end_ns", "begin_cycles", "end_cycles")
        }  # fmt: skip
        began = get["began"] != 0
        world = meta.get("world") or {}
        sms, ranks = int(world.get("sms_per_rank") or 0), int(world.get("ranks") or 0)
        keep = np.arange(len(rings))
        if sms and len(rings) == ranks * sms * schema.N_LANES:
            place = np.arange(len(rings))
            missing = ~began
            get["lane"][missing] = (place % schema.N_LANES)[missing]
            get["cta"][missing] = (place // schema.N_LANES % sms)[missing]
            get["sm"][missing] = (place // schema.N_LANES)[missing]
            get["rank"][missing] = (place // (schema.N_LANES * sms))[missing]
        else:
            keep = np.flatnonzero(began)
        get = {name: values[keep] for name, values in get.items()}
        return cls(
            rank=get["rank"],
            sm=get["sm"],
            cta=get["cta"],
            lane=get["lane"],
            began=began[keep],
            keep_last=get["mode"] == schema.RingMode.KEEP_LAST,
            dropped=get["dropped"],
            count=get["count"],
            begin_ns=get["begin_ns"],
            end_ns=get["end_ns"],
            cycles=np.where(get["end_ns"] > 0, get["end_cycles"] - get["begin_cycles"], 0),
        )

    def __len__(self) -> int:
        return len(self.rank)

    def index(self, rank: np.ndarray, cta: np.ndarray, lane: np.ndarray) -> np.ndarray:
        """int64 [n]: which actor each (rank, cta, lane) names; -1 where there is none."""
        ctas = int(max(self.cta.max(initial=0), cta.max(initial=0))) + 1
        ranks = int(max(self.rank.max(initial=0), rank.max(initial=0))) + 1
        table = np.full(ranks * ctas * 256, -1)
        table[(self.rank * ctas + self.cta) * 256 + self.lane] = np.arange(len(self))
        return table[(rank.astype(np.int64) * ctas + cta) * 256 + lane]


@dataclass(frozen=True)
class Account:
    """Per actor (axis 0) and iteration (axis 1), int64 ns.

    ``kind_ns`` [A, N, kinds]: spans by ``KINDS``, those of a tile or a load without their stall;
    ``stall_ns`` [A, N, kinds]: the stalls;  ``class_ns`` [A, N, 5]: by ``CLASSES``;  ``wall_ns``
    [A, N] of the actor's rank, 0 where the rank did not run;  ``begin_ns``, ``end_ns`` [A, N] of
    the actor, 0 where unknown;  ``bound`` [A, N]: records of this launch were dropped, so that
    shares are bounds;  ``iterations`` [N].  ``overlap_ns``: time that two records of one actor
    both claimed, counted once.
    """

    actors: Actors
    iterations: np.ndarray
    kind_ns: np.ndarray
    stall_ns: np.ndarray
    class_ns: np.ndarray
    wall_ns: np.ndarray
    begin_ns: np.ndarray
    end_ns: np.ndarray
    bound: np.ndarray
    overlap_ns: int

    def rank_window(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """First begin and last end [N] of a rank's actors; both 0 where the rank did not run."""
        mine = self.actors.rank == rank
        return _window(self.begin_ns[mine], self.end_ns[mine])


@dataclass(frozen=True)
class _Runs:
    """Consecutive events of one actor and one iteration: first row, one past the last, cell."""

    first: np.ndarray
    stop: np.ndarray
    cell: np.ndarray
    n: int


def account(events: Events, actors: Actors, launches: int = 1) -> Account:
    """Adds up ``events`` per actor and iteration; see the module's text for the rules.

    ``launches``: how many the run had, of which the last may have left no event.
    """
    iterations = max(min(launches, _MOST), int(events.iter.max(initial=0)) + 1)
    cells = len(actors) * iterations
    runs = _runs(events, actors, iterations)
    sums, stalls = _sums(events, runs, cells)
    begin, end, ended = _ends(events, actors, runs, iterations)
    shape = (len(actors), iterations)
    begin, end, ended = begin.reshape(shape), end.reshape(shape), ended.reshape(shape)
    wall = np.zeros(shape, np.int64)
    window = np.zeros((2, *shape), np.int64)
    for rank in np.unique(actors.rank):
        mine = actors.rank == rank
        first, last = _window(begin[mine], end[mine])
        wall[mine] = last - first
        window[0, mine], window[1, mine] = first, last
    net = sums - stalls
    over = np.flatnonzero(sums.sum(axis=1) > wall.ravel())
    overlap = 0
    if len(over):
        before = int(sums[over].sum())
        fixed, fixed_stalls = _clipped(events, runs, over, window.reshape(2, -1))
        net[over], stalls[over] = fixed - fixed_stalls, fixed_stalls
        overlap = before - int(fixed.sum())
    classes = schema.CLASS_OF[KINDS]
    by_class = np.zeros((cells, len(CLASSES)), np.int64)
    by_class[:, 0] = net[:, classes == TimeClass.BUSY].sum(axis=1)
    by_class[:, 1] = net[:, classes == TimeClass.COMM].sum(axis=1)
    by_class[:, 2] = net[:, classes == TimeClass.WAIT].sum(axis=1) + stalls.sum(axis=1)
    rest = wall.ravel() - by_class.sum(axis=1)
    bound = (_incomplete(actors, runs, ended, iterations) & (wall > 0)).ravel()
    by_class[:, 3] = np.where(bound, 0, rest)
    by_class[:, 4] = np.where(bound, rest, 0)
    return Account(
        actors,
        np.arange(iterations),
        net.reshape(*shape, len(KINDS)),
        stalls.reshape(*shape, len(KINDS)),
        by_class.reshape(*shape, len(CLASSES)),
        wall,
        begin,
        end,
        bound.reshape(shape),
        overlap,
    )


def _window(begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First begin and last end over axis 0, where 0 means unknown."""
    first = np.where(begin > 0, begin, NEVER).min(axis=0, initial=NEVER)
    last = end.max(axis=0, initial=0)
    ran = (first < NEVER) & (last > first)
    return np.where(ran, first, 0), np.where(ran, last, 0)


def _runs(events: Events, actors: Actors, iterations: int) -> _Runs:
    n = len(events)
    if not n:
        none = np.zeros(0, np.int64)
        return _Runs(none, none, none, 0)
    change = events.lane[1:] != events.lane[:-1]
    for name in ("cta", "rank", "iter"):
        column = getattr(events, name)
        change |= column[1:] != column[:-1]
    first = np.concatenate([[0], np.flatnonzero(change) + 1])
    stop = np.concatenate([first[1:], [n]])
    actor = actors.index(events.rank[first], events.cta[first], events.lane[first])
    known = actor >= 0
    cell = np.where(known, actor * iterations + events.iter[first], -1)
    return _Runs(first, stop, cell, n)


def _sums(events: Events, runs: _Runs, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Durations and stalls, int64 [cells, kinds] each."""
    wide = len(runs.first) * _COLUMNS
    place = _PLACE[events.kind]
    place += np.repeat(np.arange(0, wide, _COLUMNS), runs.stop - runs.first)
    # bincount adds in double precision: exact as long as a sum stays below 2^53 ns, 104 days.
    sums = np.bincount(place, events.dur_ns, wide)
    at = np.flatnonzero(events.stall_ns)
    stalls = np.bincount(place[at], events.stall_ns[at], wide)
    out = []
    for values in (sums, stalls):
        total = np.zeros((cells + 1, _COLUMNS), np.int64)  # the last row: actors unknown
        np.add.at(total, runs.cell, values.reshape(-1, _COLUMNS).astype(np.int64))
        out.append(total[:cells, :-1])
    return out[0], out[1]


def _ends(
    events: Events, actors: Actors, runs: _Runs, iterations: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each cell's begin and end (0 where unknown), and whether its launch record is there."""
    cells = len(actors) * iterations
    at = np.flatnonzero(events.kind == EventKind.LAUNCH)
    cell = runs.cell[np.searchsorted(runs.first, at, side="right") - 1]
    begin, end = least_by(cell, events.t0_ns[at], cells + 1), np.zeros(cells + 1, np.int64)
    np.maximum.at(end, cell, events.t0_ns[at] + events.dur_ns[at])
    ended = end > 0
    # Launches without their outermost record: dropped, or never ended.
    open_runs = np.flatnonzero(~ended[runs.cell])
    if len(open_runs):
        rows = _rows(runs, open_runs)
        of = np.repeat(runs.cell[open_runs], (runs.stop - runs.first)[open_runs])
        np.minimum.at(begin, of, events.t0_ns[rows])
        np.maximum.at(end, of, events.t0_ns[rows] + events.dur_ns[rows])
    # The ring's header knows its last launch: the one its last record is of, if that began in it.
    last_time = max(int(end[:cells].max(initial=0)), int(actors.end_ns.max(initial=0)))
    grid = begin[:cells].reshape(len(actors), iterations)
    known = grid < NEVER
    last_known = iterations - 1 - np.argmax(known[:, ::-1], axis=1)
    row = np.arange(len(actors))
    ends = end[:cells].reshape(grid.shape)
    own = known.any(axis=1) & (ends[row, last_known] > actors.begin_ns)
    where = row * iterations + np.where(own, last_known, iterations - 1)
    last_end = int(ends[:, -1].max(initial=0))
    own |= (last_end == 0) | (last_end > actors.begin_ns)
    add = np.flatnonzero(actors.began & ~ended[where] & (actors.begin_ns > 0) & own)
    at = where[add]
    begin[at] = np.minimum(begin[at], actors.begin_ns[add])
    stop = np.where(actors.end_ns[add] > 0, actors.end_ns[add], last_time)
    end[at] = np.maximum(end[at], stop)
    begin[begin == NEVER] = 0
    return begin[:cells], end[:cells], ended[:cells]


def _incomplete(actors: Actors, runs: _Runs, ended: np.ndarray, iterations: int) -> np.ndarray:
    """bool [A, N]: launches of which the actor's ring may have dropped records."""
    first = np.full(len(actors), iterations)
    known = runs.cell[runs.cell >= 0]
    np.minimum.at(first, known // iterations, known % iterations)
    # keep-first drops a launch's last record, its outermost, first; keep-last drops from the front.
    lost_last = ~ended
    lost_first = np.arange(iterations)[None, :] <= first[:, None]
    lost = np.where(actors.keep_last[:, None], lost_first, lost_last)
    return lost & (actors.dropped > 0)[:, None]


def _rows(runs: _Runs, which: np.ndarray) -> np.ndarray:
    """The rows of the runs ``which``, one after the other."""
    sizes = (runs.stop - runs.first)[which]
    offset = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.repeat(runs.first[which], sizes) + offset


def _clipped(
    events: Events, runs: _Runs, cells: np.ndarray, window: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the given cells with each span ended where the next begins, inside the wall."""
    place = np.full(window.shape[1] + 1, -1)
    place[cells] = np.arange(len(cells))
    which = np.flatnonzero(place[runs.cell] >= 0)
    rows = _rows(runs, which)
    cell = np.repeat(runs.cell[which], (runs.stop - runs.first)[which])
    spans = (events.dur_ns[rows] > 0) & (_PLACE[events.kind[rows]] < len(KINDS))
    rows, cell = rows[spans], cell[spans]
    order = np.lexsort((events.t0_ns[rows], cell))
    rows, cell = rows[order], cell[order]
    t0 = events.t0_ns[rows]
    t1 = np.minimum(t0 + events.dur_ns[rows], window[1][cell])
    same = cell[1:] == cell[:-1]
    t1[:-1] = np.where(same, np.minimum(t1[:-1], t0[1:]), t1[:-1])
    length = np.maximum(t1 - np.maximum(t0, window[0][cell]), 0)
    stall = np.minimum(events.stall_ns[rows].astype(np.int64), length)
    at = (place[cell], _PLACE[events.kind[rows]])
    sums = np.zeros((len(cells), len(KINDS)), np.int64)
    stalls = np.zeros_like(sums)
    np.add.at(sums, at, length)
    np.add.at(stalls, at, stall)
    return sums, stalls

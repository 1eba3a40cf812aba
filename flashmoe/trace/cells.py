"""The timeline as a grid: for each row of SMs and each bin of time, what it was mostly doing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from flashmoe.errors import FlashmoeError
from flashmoe.trace import schema
from flashmoe.trace.account import Account, Actors, account
from flashmoe.trace.columns import Events
from flashmoe.trace.rundir import Run
from flashmoe.trace.schema import EventKind


class State(IntEnum):
    """What a cell can show beside the kinds of events, whose values it keeps."""

    IDLE = 0
    WAIT_OPERANDS = 48
    WAIT_STAGE = 49
    UNRECORDED = 50
    OUTSIDE = 51  # no launch of the rank at that time


N_STATES = max(State) + 1
STATE_NAME: dict[int, str] = {
    **{int(kind): name for kind, name in schema.KIND_NAME.items() if kind > EventKind.LAUNCH},
    **{int(state): state.name.lower() for state in State},
}
STATE_CLASS: dict[int, str] = {
    **{int(k): c.name.lower() for k, c in schema.KIND_CLASS.items() if k > EventKind.LAUNCH},
    State.IDLE: "idle",
    State.WAIT_OPERANDS: "wait",
    State.WAIT_STAGE: "wait",
    State.UNRECORDED: "unrecorded",
    State.OUTSIDE: "outside",
}
_STALL_STATE = {"operands": State.WAIT_OPERANDS, "stage": State.WAIT_STAGE}
_DOING = np.array([s for s, c in STATE_CLASS.items() if c in ("busy", "comm")])
_WAITING = np.array([s for s, c in STATE_CLASS.items() if c == "wait"])
# In the order in which a launch meets them.
_BY_STAGE = np.array(
    [
        *(EventKind.WAIT_LOGITS, EventKind.WAIT_BARRIER, EventKind.WAIT_COUNTS),
        *(EventKind.WAIT_ROWS, EventKind.WAIT_H),
        *(State.WAIT_OPERANDS, State.WAIT_STAGE, EventKind.WAIT_RETURN),
    ]
)
# Handing out tiles says least of what an SM does: it stands for a cell only where nothing else can.
_TELLING = _DOING[_DOING != EventKind.SCHEDULE]
_ARITHMETIC = np.array([s for s in _TELLING if STATE_CLASS[s] == "busy"])
_REST = np.array([State.IDLE, State.UNRECORDED, State.OUTSIDE, EventKind.SCHEDULE])
_RECORDED = np.concatenate([_DOING, _WAITING])


@dataclass(frozen=True)
class Row:
    """A row of the grid: SMs ``first_sm`` to ``last_sm`` of a rank; ``lane`` None: all chosen."""

    rank: int
    first_sm: int
    last_sm: int
    sms: int
    lane: str | None


@dataclass(frozen=True)
class Cells:
    """``states`` uint8 [rows, columns]: the dominant state; ``share`` float32 [rows, columns]: its
    share of the time of the row's actors.

    Column c covers begin_ns + [c, c + 1) x bin_ns, both from ``start_ns``, the begin of the run or
    of the chosen iteration.
    """

    states: np.ndarray
    share: np.ndarray
    rows: list[Row]
    start_ns: int
    begin_ns: int
    end_ns: int

    @property
    def bin_ns(self) -> float:
        """Width of a column."""
        return (self.end_ns - self.begin_ns) / max(1, self.states.shape[1])


def timeline_cells(
    run: Run,
    rows: int,
    columns: int,
    lanes: Sequence[str] | None = None,
    sm: Sequence[int] | None = None,
    window: tuple[int, int | None] | None = None,
    iteration: int | None = None,
    rank: int | None = None,
    split_lanes: bool = False,
) -> Cells:
    """At most about ``rows`` rows of ``columns`` cells, SMs of one rank grouped where too many.

    ``window`` in ns from the start; ``lanes``, ``sm`` (as the SM numbers of the events) and
    ``rank`` choose actors, None all; ``split_lanes`` gives each lane a row of its own.

    In a row of one lane a cell shows the state that took most of its time.  In a row of several it
    shows the largest of busy (handing out tiles apart) if these together fill at least half of the
    SMs' time, so that communication shows where nothing hides it; else the largest of busy and
    communication if all these do, else the wait of the earliest stage that does (what holds the SMs
    up: the later waits, such as those for returned rows, follow from it), else the largest wait if
    all together do, else whether it was idle.  Raises FlashmoeError where nothing is chosen.
    """
    events = Events.of(run.events)
    spent = account(events, Actors.of(run.meta), int(run.meta.get("iterations") or 1))
    chosen = _chosen(spent.actors, lanes, sm, rank)
    row_of, described = _rows(spent.actors, chosen, rows, split_lanes)
    start, begin, end = _window(spent, window, iteration)
    scale = columns / (end - begin)
    time = np.zeros((len(described), N_STATES, columns))
    in_row = np.bincount(row_of[chosen], minlength=len(described))

    index = spent.actors.index(events.rank, events.cta, events.lane)
    row = np.where(index >= 0, row_of[index], -1)
    t0 = events.t0_ns - (start + begin)
    seen = (row >= 0) & (t0 < end - begin) & (t0 + events.dur_ns > 0)
    seen &= (events.dur_ns > 0) & (events.kind != EventKind.LAUNCH)
    if iteration is not None:
        seen &= events.iter == iteration
    at = np.flatnonzero(seen)
    row, kind = row[at], events.kind[at].astype(np.int64)
    a, b = t0[at] * scale, (t0[at] + events.dur_ns[at]) * scale
    stalled = events.stall_ns[at] / events.dur_ns[at]
    _add(time, row, kind, a, b, 1 - stalled)
    some = np.flatnonzero(stalled > 0)
    stall_state = np.zeros(256, np.int64)
    for which, reason in schema.STALL_REASON.items():
        stall_state[which] = _STALL_STATE[reason]
    _add(time, row[some], stall_state[kind[some]], a[some], b[some], stalled[some])
    _fill_rest(time, spent, chosen, row_of, start + begin, scale, iteration)
    sms = np.array([r.sms for r in described])
    states, share = _dominant(time, in_row, sms)
    return Cells(states, share, described, start, begin, end)


def _chosen(
    actors: Actors, lanes: Sequence[str] | None, sm: Sequence[int] | None, rank: int | None
) -> np.ndarray:
    """Indices of the chosen actors."""
    keep = np.ones(len(actors), bool)
    if lanes is not None:
        keep &= np.isin(actors.lane, [k for k, name in schema.LANE_NAME.items() if name in lanes])
    if sm is not None:
        keep &= np.isin(actors.sm, list(sm))
    if rank is not None:
        keep &= actors.rank == rank
    chosen = np.flatnonzero(keep)
    if not len(chosen):
        there = f"ranks 0-{actors.rank.max(initial=0)}, SMs 0-{actors.sm.max(initial=0)}"
        raise FlashmoeError("the run has no such SM, lane or rank", f"it has {there}", 2)
    return chosen


def _rows(
    actors: Actors, chosen: np.ndarray, rows: int, split_lanes: bool
) -> tuple[np.ndarray, list[Row]]:
    """The row of each actor [A], -1 where not chosen, and what each row is."""
    wide = int(actors.cta.max(initial=0)) + 1
    key = (actors.rank * (int(actors.sm.max(initial=0)) + 1) + actors.sm) * wide + actors.cta
    _, first, place = np.unique(key[chosen], return_index=True, return_inverse=True)
    rank, sm = actors.rank[chosen][first], actors.sm[chosen][first]
    lanes = np.unique(actors.lane[chosen]) if split_lanes else np.zeros(1, np.int64)
    per_rank = np.bincount(rank)
    group = 1
    while (-(-per_rank // group)).sum() * len(lanes) > max(rows, len(lanes)) and (
        group < per_rank.max()
    ):
        group += 1
    within = np.arange(len(rank)) - np.searchsorted(rank, rank)
    before = np.cumsum(-(-per_rank // group)) - -(-per_rank // group)
    of_sm = before[rank] + within // group
    described = [
        Row(
            int(rank[mine[0]]),
            int(sm[mine[0]]),
            int(sm[mine[-1]]),
            len(mine),
            schema.LANE_NAME[schema.Lane(int(lane))] if split_lanes else None,
        )
        for mine in np.split(np.arange(len(rank)), np.flatnonzero(np.diff(of_sm)) + 1)
        for lane in lanes
    ]
    row_of = np.full(len(actors), -1)
    offset = np.searchsorted(lanes, actors.lane[chosen]) if split_lanes else 0
    row_of[chosen] = of_sm[place] * len(lanes) + offset
    return row_of, described


def _window(
    spent: Account, window: tuple[int, int | None] | None, iteration: int | None
) -> tuple[int, int, int]:
    """Start of the run or iteration, absolute; begin and end of the window, from there.  All ns."""
    at = slice(None) if iteration is None else slice(iteration, iteration + 1)
    begins, ends = spent.begin_ns[:, at], spent.end_ns[:, at]
    what = "the run" if iteration is None else f"iteration {iteration}"
    if not (begins > 0).any():
        raise FlashmoeError(
            f"there are no events in {what}",
            f"the run has {len(spent.iterations)} iterations, counted from 0",
            2,
        )
    start, end = int(begins[begins > 0].min()), int(ends.max())
    begin, stop = window or (0, None)
    if begin >= end - start:
        raise FlashmoeError(
            f"the window begins at {begin / 1000:g} us, after the end of {what}",
            f"it ends at {(end - start) / 1000:g} us",
            2,
        )
    return start, begin, max(begin + 1, end - start if stop is None else stop)


def _add(
    time: np.ndarray, row: np.ndarray, state: np.ndarray, a: np.ndarray, b: np.ndarray,
    weight: np.ndarray | float,
) -> None:  # fmt: skip
    """Adds spans [a, b), in columns, to ``time`` [rows, states, columns], weighted."""
    columns = time.shape[2]
    a, b = np.clip(a, 0, columns), np.clip(b, 0, columns)
    weight = np.broadcast_to(weight, a.shape)
    low, high = a.astype(np.int64), b.astype(np.int64)
    line = (row * time.shape[1] + state) * (columns + 1)
    one = low == high
    size = time.shape[0] * time.shape[1] * (columns + 1)
    # Parts of the first and of the last column, then whole columns between, by their ends.
    first = np.where(one, b - a, low + 1 - a)
    parts = np.bincount(line + low, first * weight, size)
    parts += np.bincount(line + high, np.where(one, 0, b - high) * weight, size)
    many = np.flatnonzero(high > low + 1)
    steps = np.bincount(line[many] + low[many] + 1, weight[many], size)
    steps -= np.bincount(line[many] + high[many], weight[many], size)
    shape = (*time.shape[:2], columns + 1)
    whole = np.cumsum(steps.reshape(shape), axis=2)
    time += (parts.reshape(shape) + whole)[:, :, :columns]


def _fill_rest(
    time: np.ndarray, spent: Account, chosen: np.ndarray, row_of: np.ndarray,
    origin: int, scale: float, iteration: int | None,
) -> None:  # fmt: skip
    """Fills in what no event covers: idle, unrecorded, or outside of any launch."""
    rows, columns = time.shape[0], time.shape[2]
    covered = time[:, _RECORDED].sum(axis=1)
    inside = np.zeros((rows, 2, columns))  # by whether the launch's records are complete
    for rank in np.unique(spent.actors.rank[chosen]):
        first, last = spent.rank_window(int(rank))
        mine = chosen[spent.actors.rank[chosen] == rank]
        ran = last > first
        if iteration is not None:
            ran &= spent.iterations == iteration
        actor, launch = np.meshgrid(mine, np.flatnonzero(ran), indexing="ij")
        actor, launch = actor.ravel(), launch.ravel()
        a, b = (first[launch] - origin) * scale, (last[launch] - origin) * scale
        _add(inside, row_of[actor], spent.bound[actor, launch].astype(np.int64), a, b, 1.0)
    total = np.bincount(row_of[chosen], minlength=rows)[:, None]
    rest = np.maximum(inside.sum(axis=1) - covered, 0)
    # In a row where some actors' records are incomplete, what is lacking is first put down to them.
    lost = np.minimum(rest, inside[:, 1])
    time[:, State.UNRECORDED] = lost
    time[:, State.IDLE] = rest - lost
    time[:, State.OUTSIDE] = np.maximum(total - inside.sum(axis=1), 0)


def _dominant(
    time: np.ndarray, actors: np.ndarray, sms: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """State and its share, both [rows, columns]; see ``timeline_cells`` for the rule."""

    def largest(states: np.ndarray) -> np.ndarray:
        return states[np.argmax(time[:, states], axis=1)]

    half = (sms / 2)[:, None]
    arithmetic, doing, waiting = (
        time[:, of].sum(axis=1) >= half for of in (_ARITHMETIC, _TELLING, _WAITING)
    )
    early = time[:, _BY_STAGE] >= half[:, None]
    held_up = np.where(early.any(axis=1), _BY_STAGE[early.argmax(axis=1)], largest(_WAITING))
    at_rest = np.where(waiting, held_up, largest(_REST))
    at_work = np.where(arithmetic, largest(_ARITHMETIC), largest(_TELLING))
    several = np.where(doing, at_work, at_rest)
    single = np.argmax(time, axis=1)
    states = np.where((actors == sms)[:, None], single, several).astype(np.uint8)
    share = np.take_along_axis(time, states[:, None, :].astype(np.int64), axis=1)[:, 0]
    return states, (share / actors[:, None]).astype(np.float32)

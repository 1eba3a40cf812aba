"""A launch as a grid: what each SM, or each lane, did in each stretch of time.

The picture of ``flashmoe timeline``.  Rows are SMs (or neighbouring SMs together) or single lanes,
columns equal stretches of the window; a cell holds the time spent in each state, and one state
stands for it (``dominant``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashmoe.errors import FlashmoeError
from flashmoe.trace import schema
from flashmoe.trace.account import Actors
from flashmoe.trace.columns import Events
from flashmoe.trace.schema import EventKind, TimeClass

_SPAN_KINDS = [
    kind
    for kind, cls in schema.KIND_CLASS.items()
    if cls is not TimeClass.NONE and kind is not EventKind.PUT
]
#: Names of the states: kinds of work and moving, ``wait:REASON``, ``idle``, ``unrecorded``.
STATES: tuple[str, ...] = (
    *(schema.KIND_NAME[k] for k in _SPAN_KINDS if k not in schema.WAIT_REASON),
    *(f"wait:{reason}" for reason in schema.REASONS),
    "idle",
    "unrecorded",
)
IDLE, UNRECORDED = len(STATES) - 2, len(STATES) - 1

# Of each kind's byte: the state of its span, and of the stall inside it; -1: none.
_STATE_OF = np.full(256, -1, np.int64)
_STALL_STATE_OF = np.full(256, -1, np.int64)
for _kind in _SPAN_KINDS:
    _reason = schema.WAIT_REASON.get(_kind)
    _name = schema.KIND_NAME[_kind] if _reason is None else f"wait:{_reason}"
    _STATE_OF[_kind] = STATES.index(_name)
for _kind, _reason in schema.STALL_REASON.items():
    _STALL_STATE_OF[_kind] = STATES.index(f"wait:{_reason}")

# What stands for a cell of several lanes: the first of these groups that fills half a lane.
_TELLING = (
    ("gemm1", "gemm2", "gate", "combine"),
    ("dispatch", "give_back", "counts", "plan"),
    tuple(name for name in STATES if name.startswith("wait:")),
    ("load", "schedule"),
)
_ENOUGH = 0.5


@dataclass(frozen=True)
class Cells:
    """The grid of one launch.

    ``rank`` [R]; ``sms`` [R]: first and last SM of the row; ``lane`` [R]: name, or None for all;
    ``state`` int8 [R, C]: index into ``STATES``; ``present``: the states that occur.  Column c
    spans ``begin_ns + c * column_ns`` onward; ``begin_ns``, ``end_ns`` from the launch's start.
    """

    iteration: int
    rank: list[int]
    sms: list[tuple[int, int]]
    lane: list[str | None]
    state: np.ndarray
    begin_ns: float
    end_ns: float
    launch_ns: int
    sms_per_row: int

    @property
    def column_ns(self) -> float:
        """Time of one column."""
        return (self.end_ns - self.begin_ns) / max(self.state.shape[1], 1)


def timeline_cells(
    events: Events,
    meta: dict[str, Any],
    *,
    iteration: int,
    columns: int,
    max_rows: int | None = None,
    sms: Sequence[int] | None = None,
    rank: int | None = None,
    lane: str | None = None,
    window_ns: tuple[float, float | None] | None = None,
) -> Cells:
    """The grid of launch ``iteration``, ``columns`` wide.

    ``sms`` and ``rank`` leave out others; ``lane`` None makes a row of an SM, ``all`` a row of each
    lane, a name a row of that lane in each SM.  Where that gives more than ``max_rows`` rows,
    neighbouring SMs of a rank share one.  Raises FlashmoeError (exit code 2) where nothing is left.
    """
    actors = Actors.of(meta)
    mine = np.flatnonzero(events.iter == iteration)
    if not len(mine):
        raise _nothing(f"the run has no launch {iteration}", _launches(events))
    t0 = events.t0_ns[mine]
    start = int(t0.min())
    launch_ns = int((t0 + events.dur_ns[mine]).max()) - start
    begin, end = _window(window_ns, launch_ns)
    chosen = _choose(actors, sms, rank, lane)
    row_of, rows, per_row = _rows(actors, chosen, lane, max_rows)
    actor = actors.index(events.rank[mine], events.cta[mine], events.lane[mine])
    row = np.where(actor >= 0, row_of[actor], -1)
    spans = (row >= 0) & (_STATE_OF[events.kind[mine]] >= 0) & (events.dur_ns[mine] > 0)
    mine, row = mine[spans], row[spans]
    scale = columns / (end - begin)
    a = (events.t0_ns[mine] - start - begin) * scale
    b = a + events.dur_ns[mine] * scale
    weight = _fill(events, mine, row, a, b, len(rows), columns)
    lanes = np.bincount(row_of[row_of >= 0], minlength=len(rows))
    rest = np.maximum(lanes[:, None] - weight.sum(axis=2), 0)
    lossy = _lossy(events, actors, iteration, row_of, len(rows))
    weight[:, :, IDLE] = np.where(lossy[:, None], 0, rest)
    weight[:, :, UNRECORDED] = np.where(lossy[:, None], rest, 0)
    alone = lane is not None and per_row == 1
    state = weight.argmax(axis=2) if alone else _dominant(weight, per_row)
    return Cells(
        iteration,
        [int(r[0]) for r in rows],
        [(r[1], r[2]) for r in rows],
        [r[3] for r in rows],
        state.astype(np.int8),
        begin,
        end,
        launch_ns,
        per_row,
    )


def _nothing(message: str, hint: str) -> FlashmoeError:
    return FlashmoeError(message, hint, exit_code=2)


def _launches(events: Events) -> str:
    known = np.unique(events.iter)
    return f"its launches are {known[0]} to {known[-1]}" if len(known) else "it holds no event"


def _window(window_ns: tuple[float, float | None] | None, launch_ns: int) -> tuple[float, float]:
    begin, end = (0.0, None) if window_ns is None else window_ns
    end = float(launch_ns) if end is None else end
    if begin >= launch_ns or end <= begin:
        raise _nothing(
            f"the window begins at {begin:.0f} ns, and the launch lasted {launch_ns} ns",
            "choose one inside it",
        )
    return begin, end


def _choose(
    actors: Actors, sms: Sequence[int] | None, rank: int | None, lane: str | None
) -> np.ndarray:
    """Indices of the actors to draw."""
    keep = np.ones(len(actors), bool)
    if rank is not None:
        keep &= actors.rank == rank
        if not keep.any():
            raise _nothing(f"the run has no rank {rank}", _span("ranks", actors.rank))
    if sms is not None:
        known = actors.sm[keep]
        keep &= np.isin(actors.sm, np.asarray(sms))
        if not keep.any():
            raise _nothing(f"the run has none of SM {_brief(sms)}", _span("SMs", known))
    if lane not in (None, "all"):
        keep &= actors.lane == [*schema.LANE_NAME.values()].index(lane or "")
        if not keep.any():
            raise _nothing(f"the run has no lane {lane}", "leave --lane out to see all")
    return np.flatnonzero(keep)


def _span(what: str, values: np.ndarray) -> str:
    return f"its {what} are {values.min()} to {values.max()}" if len(values) else "it is empty"


def _brief(sms: Sequence[int]) -> str:
    return f"{sms[0]}" if len(sms) == 1 else f"{sms[0]} to {sms[-1]}"


def _rows(
    actors: Actors, chosen: np.ndarray, lane: str | None, max_rows: int | None
) -> tuple[np.ndarray, list[tuple[int, int, int, str | None]], int]:
    """(row of each actor or -1, (rank, first SM, last SM, lane) of each row, SMs a row)."""
    by_lane = lane is not None
    order = chosen[np.lexsort((actors.lane[chosen], actors.sm[chosen], actors.rank[chosen]))]
    places: dict[int, list[int]] = {}
    for r, sm in zip(actors.rank[order].tolist(), actors.sm[order].tolist(), strict=True):
        of_rank = places.setdefault(r, [])
        if not of_rank or of_rank[-1] != sm:
            of_rank.append(sm)
    lanes = len(np.unique(actors.lane[order])) if by_lane else 1
    most = max(len(s) for s in places.values())
    per_row = 1
    while max_rows and per_row < most:
        total = sum(-(-len(s) // per_row) for s in places.values()) * lanes
        if total <= max_rows:
            break
        per_row += 1
    rows: dict[tuple[int, int, int], int] = {}
    labels: list[tuple[int, int, int, str | None]] = []
    row_of = np.full(len(actors), -1)
    index = {r: {sm: i for i, sm in enumerate(s)} for r, s in places.items()}
    names = [*schema.LANE_NAME.values()]
    for i in order.tolist():
        r, sm, code = int(actors.rank[i]), int(actors.sm[i]), int(actors.lane[i])
        group = index[r][sm] // per_row
        key = (r, group, code if by_lane else -1)
        if key not in rows:
            members = places[r][group * per_row : (group + 1) * per_row]
            rows[key] = len(labels)
            labels.append((r, members[0], members[-1], names[code] if by_lane else None))
        row_of[i] = rows[key]
    return row_of, labels, per_row


def _fill(
    events: Events,
    mine: np.ndarray,
    row: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    rows: int,
    columns: int,
) -> np.ndarray:
    """float64 [rows, columns, states]: lanes in each state, on average over the cell."""
    inside = (b > 0) & (a < columns)
    mine, row = mine[inside], row[inside]
    a, b = np.clip(a[inside], 0, columns), np.clip(b[inside], 0, columns)
    kind = events.kind[mine]
    dur, stall = events.dur_ns[mine], events.stall_ns[mine]
    stalled = np.where(_STALL_STATE_OF[kind] >= 0, stall / np.maximum(dur, 1), 0.0)
    states, wide = len(STATES), columns + 1
    whole = np.zeros(rows * states * wide)
    part = np.zeros_like(whole)

    def add(state: np.ndarray, share: np.ndarray, at: np.ndarray) -> None:
        base = (row[at] * states + state) * wide
        for edge, sign in ((a[at], share), (b[at], -share)):
            column = edge.astype(np.int64)
            whole[:] += np.bincount(base + column, sign, len(whole))
            part[:] += np.bincount(base + column, -sign * (edge - column), len(whole))

    every = np.arange(len(mine))
    add(_STATE_OF[kind], 1 - stalled, every)
    some = np.flatnonzero(stalled > 0)
    add(_STALL_STATE_OF[kind[some]], stalled[some], some)
    whole = whole.reshape(rows, states, wide).cumsum(axis=2) + part.reshape(rows, states, wide)
    return np.maximum(whole[:, :, :columns], 0).transpose(0, 2, 1).copy()


def _lossy(
    events: Events, actors: Actors, iteration: int, row_of: np.ndarray, rows: int
) -> np.ndarray:
    """bool [rows]: some actor of the row lost records of this launch."""
    lossy = np.zeros(rows, bool)
    lost = actors.dropped > 0
    if not lost.any():
        return lossy
    ends = np.flatnonzero((events.kind == EventKind.LAUNCH) & (events.iter == iteration))
    whole = np.zeros(len(actors), bool)
    whole[actors.index(events.rank[ends], events.cta[ends], events.lane[ends])] = True
    # keep-first loses a launch's last record first: where that is there, nothing is lost.
    lost &= actors.keep_last | ~whole
    hit = row_of[lost & (row_of >= 0)]
    lossy[hit] = True
    return lossy


def _dominant(weight: np.ndarray, per_row: int) -> np.ndarray:
    """The state that stands for each cell [R, C] of several lanes.

    Computing is shown before moving, moving before waiting, waiting before housekeeping, each where
    it fills at least half a lane of each SM; else whatever most time went to.
    """
    state = np.where(weight[:, :, UNRECORDED] > 0, UNRECORDED, IDLE)
    undecided = np.ones(state.shape, bool)
    for names in _TELLING:
        of = np.array([STATES.index(name) for name in names])
        group = weight[:, :, of]
        here = undecided & (group.sum(axis=2) >= _ENOUGH * per_row)
        state[here] = of[group.argmax(axis=2)][here]
        undecided &= ~here
    return state

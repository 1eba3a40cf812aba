"""The timeline's grid against a count of every nanosecond."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks import synthetic
from flashmoe.errors import FlashmoeError
from flashmoe.trace import schema
from flashmoe.trace.cells import STATE_CLASS, STATE_NAME, State, timeline_cells
from flashmoe.trace.columns import Events
from flashmoe.trace.rundir import Run, open_run
from flashmoe.trace.schema import EventKind, Lane


@pytest.fixture(scope="module")
def run(run_path: Path) -> Run:
    return open_run(run_path)


def test_every_state_has_a_name_and_a_class() -> None:
    assert STATE_NAME.keys() == STATE_CLASS.keys()
    assert len(set(STATE_NAME.values())) == len(STATE_NAME)
    assert not {int(s) for s in State} & {int(k) for k in EventKind if k}


def shares(run: Run, lane: Lane, begin: int, size: int, columns: int) -> np.ndarray:
    """What each state took of the lane of rank 0's SM 1 in launch 1: [256, columns]."""
    events = Events.of(run.events)
    mine = (events.rank == 0) & (events.sm == 1) & (events.lane == lane) & (events.iter == 1)
    share = np.zeros((256, size))
    reasons = {"operands": State.WAIT_OPERANDS, "stage": State.WAIT_STAGE}
    for i in np.flatnonzero(mine & (events.kind != EventKind.LAUNCH)):
        kind, a = int(events.kind[i]), int(events.t0_ns[i]) - begin
        stalled = events.stall_ns[i] / max(1, events.dur_ns[i])
        share[kind, a : a + events.dur_ns[i]] += 1 - stalled
        if stalled:
            share[reasons[schema.STALL_REASON[kind]], a : a + events.dur_ns[i]] += stalled
    share[State.IDLE] = 1 - share.sum(axis=0)
    edges = np.linspace(0, size, columns + 1)
    until = np.concatenate([np.zeros((256, 1)), np.cumsum(share, axis=1)], axis=1)
    places = np.arange(size + 1)
    at = np.array([np.interp(edges, places, u) for u in until])
    return np.diff(at, axis=1) * columns / size


def test_one_actors_row_shows_the_state_that_took_most(run: Run) -> None:
    columns = 40
    got = timeline_cells(run, 1, columns, lanes=["load"], sm=[1], iteration=1, rank=0)
    want = shares(run, Lane.LOAD, got.start_ns, got.end_ns - got.begin_ns, columns)
    inside = want.max(axis=0) > 0
    assert inside.all()
    top = np.take_along_axis(want, got.states.astype(int), axis=0)[0]
    # The last column reaches past the rank's end, where the other rank still runs.
    assert top[:-1] == pytest.approx(want.max(axis=0)[:-1], abs=2e-3)
    assert got.share[0, :-1] == pytest.approx(top[:-1], abs=2e-3)


def test_a_whole_sm_shows_work_before_movement_and_movement_before_waiting(run: Run) -> None:
    columns = 120
    got = timeline_cells(run, 1, columns, sm=[1], iteration=1, rank=0)
    size = got.end_ns - got.begin_ns
    want = sum(shares(run, lane, got.start_ns, size, columns) for lane in Lane)
    kinds = {
        of: [s for s, c in STATE_CLASS.items() if c in of.split() and s != EventKind.SCHEDULE]
        for of in ("busy", "busy comm", "wait")
    }
    seen = set()
    for column in range(columns - 1):
        spent, state = want[:, column], int(got.states[0, column])
        filled = {of: spent[states].sum() for of, states in kinds.items()}
        if any(abs(part - 0.5) < 0.01 for part in filled.values()):
            continue  # too near to tell
        of = next((of for of, part in filled.items() if part > 0.5), "none")
        seen.add(of)
        if of.startswith("busy"):
            assert spent[state] == pytest.approx(spent[kinds[of]].max(), abs=5e-3)
            assert state in kinds[of]
        elif of == "wait":
            assert state in kinds[of]
    assert {"busy", "busy comm"} <= seen


def test_time_between_launches_is_outside(run: Run) -> None:
    got = timeline_cells(run, 1, 300, lanes=["math0"])
    begins = [timeline_cells(run, 1, 1, iteration=i).start_ns for i in range(3)]
    ends = [b + timeline_cells(run, 1, 1, iteration=i).end_ns for i, b in enumerate(begins)]
    middle = got.start_ns + (np.arange(300) + 0.5) * got.bin_ns
    outside = got.states[0] == State.OUTSIDE
    for end, begin in zip(ends, begins[1:], strict=False):
        between = (middle > end + got.bin_ns) & (middle < begin - got.bin_ns)
        assert between.any()
        assert outside[between].all()
    assert not outside[: int(300 * 0.2)].any()


def test_a_window_zooms(run: Run) -> None:
    whole = timeline_cells(run, 6, 100, iteration=0)
    end = whole.end_ns
    half = timeline_cells(run, 6, 50, iteration=0, window=(0, end // 2 * 1))
    assert half.begin_ns == 0
    assert half.bin_ns == pytest.approx(whole.bin_ns, rel=1e-3)
    assert (half.states == whole.states[:, :50]).mean() > 0.97
    late = timeline_cells(run, 6, 50, iteration=0, window=(end // 2, None))
    assert (late.states == whole.states[:, 50:]).mean() > 0.97
    with pytest.raises(FlashmoeError, match="after the end"):
        timeline_cells(run, 6, 50, window=(10**12, None))


def test_rows_group_sms_of_one_rank(tmp_path: Path, shape: synthetic.Shape) -> None:
    wide = dataclasses.replace(shape, sms=13, iterations=1)
    synthetic.write(tmp_path / "wide.fmoe", wide)
    run = open_run(tmp_path / "wide.fmoe")
    every = timeline_cells(run, 100, 10)
    assert [(r.rank, r.first_sm, r.last_sm, r.sms) for r in every.rows] == [
        (i // 13, i, i, 1) for i in range(26)
    ]
    few = timeline_cells(run, 6, 10)
    assert len(few.rows) <= 6
    assert sum(r.sms for r in few.rows) == 26
    assert {r.rank for r in few.rows} == {0, 1}
    assert all((r.first_sm < 13) == (r.last_sm < 13) for r in few.rows)
    assert few.states.shape == (len(few.rows), 10)
    apart = timeline_cells(run, 100, 10, sm=[3, 4], split_lanes=True)
    assert [r.lane for r in apart.rows] == list(schema.LANE_NAME.values()) * 2
    one = timeline_cells(run, 100, 10, lanes=["math1"], split_lanes=True)
    assert [r.lane for r in one.rows] == ["math1"] * 26


def test_a_choice_of_nothing_is_an_error(run: Run) -> None:
    with pytest.raises(FlashmoeError, match="no such SM") as found:
        timeline_cells(run, 10, 10, sm=[999])
    assert found.value.exit_code == 2
    with pytest.raises(FlashmoeError, match="no events in iteration 77"):
        timeline_cells(run, 10, 10, iteration=77)


def test_what_was_dropped_shows_as_unrecorded(tmp_path: Path, shape: synthetic.Shape) -> None:
    cut = dataclasses.replace(shape, capacity=15, iterations=1)
    synthetic.write(tmp_path / "cut.fmoe", cut)
    got = timeline_cells(open_run(tmp_path / "cut.fmoe"), 100, 20, lanes=["math0"])
    headers = synthetic.make(cut)[0].headers
    lost = (headers["count"] > cut.capacity)[headers["lane"] == Lane.MATH0]
    assert lost.any()
    assert not lost.all()
    unrecorded = got.states == State.UNRECORDED
    assert unrecorded[lost].any(axis=1).all()
    assert not unrecorded[~lost].any()

"""Flows, held to a plain search through rows one by one."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.trace import flows
from flashmoe.trace.columns import Events
from flashmoe.trace.schema import EventKind, Lane

from .synthetic import Run, run_of


def plain(run: Run) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """The edges by their definition, row by row."""
    e = Events.of(run.events)
    plan = {(p["iter"], p["rank"], p["tile"]): p for p in run.plan.to_pylist()}
    row_tile_of: dict[tuple[int, int, int], tuple[int, int]] = {}  # (iter, expert, row)
    for p in plan.values():
        if p["gemm"] == 1 and p["col_tile"] == 0:
            first = sum(
                q["rows"]
                for q in plan.values()
                if (q["iter"], q["gemm"], q["col_tile"], q["expert"])
                == (p["iter"], 1, 0, p["expert"])
                and q["row_tile"] < p["row_tile"]
            )
            for row in range(first, first + p["rows"]):
                row_tile_of[p["iter"], p["expert"], row] = (p["rank"], p["row_tile"])
    moved: dict[tuple[int, int, int, int], list[tuple[int, int]]] = {}
    at: dict[tuple[int, int], int] = {}
    keys = sorted(run.counts.to_pylist(), key=lambda c: (c["source"], c["chunk"]))
    for c in keys:
        group = (c["iter"], c["expert"])
        for _ in range(c["rows"]):
            where = row_tile_of[(*group, at.get(group, 0))]
            at[group] = at.get(group, 0) + 1
            moved.setdefault((c["iter"], c["source"], c["chunk"], c["expert"]), []).append(where)
    tiles: dict[tuple[int, str, int, int], list[int]] = {}
    for i in range(len(e)):
        if e.kind[i] in (EventKind.GEMM1, EventKind.GEMM2):
            p = plan[int(e.iter[i]), int(e.rank[i]), int(e.tile[i])]
            key = (p["iter"], f"gemm{p['gemm']}", p["rank"], p["row_tile"])
            tiles.setdefault(key, []).append(i)
    begin = e.t0_ns
    end = e.t0_ns + e.dur_ns
    dispatches, combines = set(), set()
    together = {wave[0]: wave for wave in run.waves}
    for i in np.flatnonzero(e.kind == EventKind.DISPATCH):
        unit = (int(e.iter[i]), int(e.rank[i]), int(e.tile[i]))
        group = [moved.get((*unit, expert), []) for expert in together[int(e.expert[i])]]
        places = {place for rows in group for place in rows}
        users = [j for place in places for j in tiles.get((unit[0], "gemm1", *place), [])]
        if users:
            dispatches.add((int(i), int(min(users, key=lambda j: (begin[j], j)))))
    for (it, gemm, rank, row_tile), members in tiles.items():
        if gemm != "gemm2":
            continue
        last = max(members, key=lambda j: end[j])
        for source in {u[1] for u, w in moved.items() if u[0] == it and (rank, row_tile) in w}:
            chunks = {
                u[2] for u, w in moved.items() if u[:2] == (it, source) and (rank, row_tile) in w
            }
            users = [
                j
                for j in np.flatnonzero(e.kind == EventKind.COMBINE)
                if e.iter[j] == it and e.rank[j] == source and e.tile[j] in chunks
            ]
            after = [j for j in users if begin[j] >= end[last]]
            if after:
                combines.add((int(last), int(min(after, key=lambda j: (begin[j], j)))))
    return dispatches, combines


def found(run: Run, row_bytes: int | None = None) -> tuple[set[tuple[int, int]], ...]:
    f = flows.assign(run.events, run.plan, run.counts, row_bytes)
    pairs = list(zip(f.source.tolist(), f.target.tolist(), strict=True))
    of_dispatch = f.kind == EventKind.DISPATCH
    assert len(set(pairs)) == len(pairs)
    return (
        {pair for pair, mine in zip(pairs, of_dispatch, strict=True) if mine},
        {pair for pair, mine in zip(pairs, of_dispatch, strict=True) if not mine},
    )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    world=st.integers(1, 3),
    chunks=st.integers(1, 3),
    experts=st.integers(1, 5),
    iterations=st.integers(1, 2),
    tile_m=st.integers(1, 6),
    wave=st.integers(1, 3),
    by_lanes=st.booleans(),
)
def test_edges_are_those_of_a_plain_search(
    seed: int,
    world: int,
    chunks: int,
    experts: int,
    iterations: int,
    tile_m: int,
    wave: int,
    by_lanes: bool,
) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 6, (iterations, world, chunks, experts))
    counts[0, 0, 0, 0] += 1
    run = run_of(counts, tile_m, seed=seed, wave=wave, by_lanes=by_lanes)
    expected = plain(run)
    assert found(run) == expected
    assert found(run, row_bytes=96) == expected


@pytest.fixture(params=[False, True], ids=["by one lane", "by lanes"])
def run(request: pytest.FixtureRequest) -> Run:
    counts = np.random.default_rng(3).integers(0, 7, (2, 3, 3, 6))
    return run_of(counts, wave=1 + request.param, by_lanes=request.param)


def test_every_dispatch_has_one_edge_and_the_flow_column_finds_it(run: Run) -> None:
    e = Events.of(run.events)
    f = flows.assign(e, run.plan, run.counts)
    dispatches = np.flatnonzero(e.kind == EventKind.DISPATCH)
    edges = f.kind == EventKind.DISPATCH
    assert sorted(f.source[edges].tolist()) == dispatches.tolist()
    assert np.array_equal(f.flow[f.source[edges]], f.flow[f.target[edges]])
    assert (f.flow[dispatches] > 0).all()


def test_combine_knows_the_tile_it_waited_for_last(run: Run) -> None:
    e = Events.of(run.events)
    f = flows.assign(e, run.plan, run.counts)
    end = e.t0_ns + e.dur_ns
    edges = np.flatnonzero(f.kind == EventKind.GEMM2)
    for target in np.unique(f.target[edges]):
        mine = edges[f.target[edges] == target]
        last = f.source[mine][np.argmax(end[f.source[mine]])]
        others = f.target[edges[f.source[edges] == last]]
        numbers = {int(f.flow[other]) for other in others}
        assert int(f.flow[last]) in numbers


def test_a_dropped_dispatch_lends_its_rows_to_no_other() -> None:
    """Waves of two experts, of which the second's record fell out of the ring."""
    counts = np.zeros((1, 1, 1, 2), int)
    counts[0, 0, 0] = (2, 3)
    run = run_of(counts)
    e = Events.of(run.events)
    dispatches = np.flatnonzero(e.kind == EventKind.DISPATCH)
    # The tile of expert 1 runs first, as another order of tiles would have it.
    early = int(np.flatnonzero((e.kind == EventKind.GEMM1) & (e.expert == 1))[0])
    (mine,) = (i for i in dispatches if e.expert[i] == 0)
    times = e.t0_ns.copy()
    times[early] = times[mine] + 1
    keep = [i for i in range(len(e)) if i not in dispatches or i == mine]
    table = run.events.set_column(
        run.events.schema.get_field_index("t0_ns"), "t0_ns", pa.array(times)
    ).take(keep)
    held = flows.assign(table, run.plan, run.counts, row_bytes=96)
    target = held.target[held.kind == EventKind.DISPATCH]
    assert Events.of(table).expert[target].tolist() == [0]
    loose = flows.assign(table, run.plan, run.counts)
    target = loose.target[loose.kind == EventKind.DISPATCH]
    assert Events.of(table).expert[target].tolist() == [1]


def of_one_chunk(counts: list[int]) -> Run:
    """One rank, one chunk, an expert a wave, as a GPU records it; tiles of 2 rows."""
    return run_of(np.array(counts).reshape(1, 1, 1, -1), tile_m=2, by_lanes=True)


def dispatch_edges(run: Run, keep: np.ndarray) -> list[tuple[int, int, int]]:
    """(lane, expert of the record, expert of its tile) of each, of the events in ``keep``."""
    table = run.events.filter(pa.array(keep))
    e = Events.of(table)
    f = flows.assign(table, run.plan, run.counts, row_bytes=96)
    mine = f.kind == EventKind.DISPATCH
    ends = zip(f.source[mine].tolist(), f.target[mine].tolist(), strict=True)
    return sorted((int(e.lane[a]), int(e.expert[a]), int(e.expert[b])) for a, b in ends)


def test_every_lane_that_shared_a_dispatch_leads_to_its_tile() -> None:
    """13 rows by twelve warps of six lanes, then 5 rows halved; a lane may have moved none."""
    run = of_one_chunk([13, 5])
    halves = [(lane, 1, 1) for lane in (Lane.COMM0, Lane.COMM1)]
    assert dispatch_edges(run, np.full(run.events.num_rows, True)) == sorted(
        [(lane, 0, 0) for lane in Lane] + halves
    )
    one_row = of_one_chunk([1, 1])
    e = Events.of(one_row.events)
    bytes_of = e.bytes[(e.kind == EventKind.DISPATCH) & (e.expert == 0)]
    assert bytes_of.tolist() == [96, 0, 0, 0, 0, 0]
    assert dispatch_edges(one_row, np.full(len(e), True)) == [
        *[(lane, 0, 0) for lane in list(Lane)[:3]],
        (Lane.COMM1, 0, 0),
        (Lane.COMM1, 1, 1),
        *[(lane, 0, 0) for lane in list(Lane)[4:]],
    ]


def test_a_dispatch_that_lost_some_lanes_still_leads_to_its_own_tile() -> None:
    run = of_one_chunk([13, 5])
    e = Events.of(run.events)
    dispatch = e.kind == EventKind.DISPATCH
    lost = dispatch & ((e.lane == Lane.COMM0) | (e.expert == 0) & (e.lane != Lane.MATH1))
    assert dispatch_edges(run, ~lost) == [(Lane.COMM1, 1, 1), (Lane.MATH1, 0, 0)]
    # With the second wave's records lost too, the first one's bytes keep it to its own rows, though
    # the second's tile ran first.
    times = e.t0_ns.copy()
    times[(e.kind == EventKind.GEMM1) & (e.expert == 1)] = e.t0_ns[dispatch].max() + 1
    at = run.events.schema.get_field_index("t0_ns")
    run.events = run.events.set_column(at, "t0_ns", pa.array(times))
    assert dispatch_edges(run, ~(dispatch & (e.expert == 1))) == [(lane, 0, 0) for lane in Lane]


def test_nothing_to_follow_gives_no_edges(run: Run) -> None:
    for events, plan, counts in [
        (run.events.slice(0, 0), run.plan, run.counts),
        (run.events, run.plan.slice(0, 0), run.counts),
        (run.events, run.plan, run.counts.slice(0, 0)),
    ]:
        f = flows.assign(events, plan, counts)
        assert len(f.source) == 0 and not f.flow.any() and len(f.flow) == events.num_rows

"""What the host engine's actors recorded, against what they must have done."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from flashmoe.config import MoEConfig
from flashmoe.trace.schema import NO_EXPERT, EventKind, Lane, RecordFlag
from flashmoe.world.base import Status
from flashmoe.world.host import HostEngine

from .layers import SMALL, engine_for, layer

TOKENS = [30, 0, 41]
LAUNCHES = 3
UNEVEN = MoEConfig(64, 72, 8, 3)


def written(engine: HostEngine) -> list[tuple[Any, np.ndarray]]:
    """(header, records) of each actor, none dropped."""
    dump = engine.rings()
    assert (dump.headers["count"] <= engine.ring_capacity).all()
    return [(h, r[: h["count"]].copy()) for h, r in zip(dump.headers, dump.records, strict=True)]


@pytest.fixture(scope="module")
def run() -> Any:
    """Rings, outputs' ids and routing of LAUNCHES launches of three ranks."""
    what = layer(UNEVEN, sum(TOKENS))
    with engine_for(what, TOKENS, sms_per_rank=2, traced=True) as engine:
        for _ in range(LAUNCHES):
            assert engine.launch().status is Status.OK
        ids = [o.ids.numpy() for o in engine.outputs()]
        return written(engine), ids, engine.routing()


def test_one_launch_record_an_actor_and_launch(run: Any) -> None:
    rings, _, _ = run
    assert len(rings) == len(TOKENS) * 2 * len(Lane)
    places = [(h["rank"], h["cta"], h["lane"]) for h, _ in rings]
    assert places == sorted(set(places))
    for _, records in rings:
        launches = records[records["kind"] == EventKind.LAUNCH]
        assert launches["iter"].tolist() == list(range(LAUNCHES))


def test_spans_lie_in_their_launch_and_do_not_overlap(run: Any) -> None:
    for header, records in run[0]:
        for i in range(LAUNCHES):
            mine = records[records["iter"] == i]
            outer, inner = mine[-1], mine[:-1]
            assert outer["kind"] == EventKind.LAUNCH
            inner = inner[(inner["flags"] & RecordFlag.OPEN) == 0]
            begin = inner["t0_ns"].astype(np.int64)
            end = begin + inner["dur_ns"]
            assert (begin[1:] >= end[:-1]).all(), header
            assert (begin >= outer["t0_ns"]).all()
            assert (end <= outer["t0_ns"] + outer["dur_ns"]).all()


def test_each_open_wait_is_closed_by_the_next_record(run: Any) -> None:
    opened = 0
    for _, records in run[0]:
        for at in np.flatnonzero(records["flags"] & RecordFlag.OPEN):
            now, then = records[at], records[at + 1]
            assert now["dur_ns"] == 0 and then["flags"] == 0
            assert (now["kind"], now["t0_ns"]) == (then["kind"], then["t0_ns"])
            opened += 1
    assert opened > 0


def test_every_tile_is_taken_loaded_and_computed_once_a_launch(run: Any) -> None:
    rings, _, routing = run
    tiles = routing.tiles
    planned = {(t["rank"], t["tile"]): (t["gemm"], t["expert"]) for t in tiles}
    for kind, lane in (
        (EventKind.SCHEDULE, Lane.SCHED),
        (EventKind.LOAD, Lane.LOAD),
        (None, Lane.MATH0),
    ):
        seen: Counter[tuple[int, int, int]] = Counter()
        for header, records in rings:
            if header["lane"] != lane:
                continue
            kinds = [EventKind.GEMM1, EventKind.GEMM2] if kind is None else [kind]
            for r in records[np.isin(records["kind"], kinds)]:
                gemm, expert = planned[header["rank"], r["tile"]]
                assert r["expert"] == expert
                if kind is None:
                    assert r["kind"] == (EventKind.GEMM1 if gemm == 1 else EventKind.GEMM2)
                    assert 0 <= r["stall_cycles"] <= r["aux"]
                seen[int(header["rank"]), int(r["tile"]), int(r["iter"])] += 1
        assert set(seen.values()) == {1}
        assert len(seen) == len(planned) * LAUNCHES


def test_bytes_of_the_rings_are_those_of_the_ids(run: Any) -> None:
    rings, ids, routing = run
    ranks, experts = len(TOKENS), UNEVEN.experts
    owner = np.array([((e + 1) * ranks - 1) // experts for e in range(experts)])
    expected = np.zeros((ranks, ranks), np.int64)
    for source, chosen in enumerate(ids):
        np.add.at(expected[source], owner[chosen.reshape(-1)], UNEVEN.row_bytes)
    dispatched, returned = np.zeros_like(expected), np.zeros_like(expected)
    given_back = 0
    for header, records in rings:
        for r in records:
            if r["kind"] == EventKind.DISPATCH:
                dispatched[header["rank"], r["peer"]] += r["aux"]
                assert owner[r["expert"]] == r["peer"]
            elif r["kind"] == EventKind.PUT:
                returned[r["peer"], header["rank"]] += r["aux"]
                assert r["dur_ns"] == 0
            elif r["kind"] == EventKind.GIVE_BACK:
                given_back += int(r["aux"])
    assert (dispatched == LAUNCHES * expected).all()
    assert (returned == LAUNCHES * expected).all()
    assert given_back == LAUNCHES * expected.sum()
    counts = np.zeros((ranks, experts), np.int64)
    for source, chosen in enumerate(ids):
        np.add.at(counts[source], chosen.reshape(-1), 1)
    assert (routing.chunk_counts.sum(axis=1) == counts).all()


def test_gate_and_combine_count_each_token_once_a_launch(run: Any) -> None:
    for kind in (EventKind.GATE, EventKind.COMBINE):
        tokens = np.zeros((len(TOKENS), LAUNCHES), np.int64)
        for header, records in run[0]:
            for r in records[records["kind"] == kind]:
                tokens[header["rank"], r["iter"]] += r["aux"]
        assert (tokens == np.array(TOKENS)[:, None]).all(), kind


def test_counts_go_to_every_rank(run: Any) -> None:
    for rank in range(len(TOKENS)):
        sent = sum(
            int(records["aux"][records["kind"] == EventKind.COUNTS].sum())
            for header, records in run[0]
            if header["rank"] == rank
        )
        assert sent == LAUNCHES * 8 * len(TOKENS) * UNEVEN.experts


def test_a_full_ring_keeps_its_first_or_last_records_and_counts_all() -> None:
    what = layer(SMALL, 64)
    with engine_for(what, [64], traced=True, sms_per_rank=1) as engine:
        engine.launch()
        whole = engine.rings().headers["count"].copy()
    for mode in ("keep-first", "keep-last"):
        options = {"traced": True, "sms_per_rank": 1, "ring_capacity": 10, "ring_mode": mode}
        with engine_for(what, [64], **options) as engine:
            engine.launch()
            dump = engine.rings()
            assert dump.records.shape == (len(Lane), 10)
            # Only waits come and go with timing.
            load = dump.headers[Lane.MATH0]
            assert load["count"] > 10 and whole[Lane.MATH0] > 10
            kinds = dump.records[Lane.MATH0]["kind"].tolist()
            if mode == "keep-first":
                assert kinds[0] == EventKind.GATE
                assert EventKind.LAUNCH not in kinds
            else:
                assert EventKind.GATE not in kinds
                assert kinds[(int(load["count"]) - 1) % 10] == EventKind.LAUNCH


def test_reset_rings_begins_at_iteration_0() -> None:
    what = layer(SMALL, 16)
    with engine_for(what, [16], traced=True) as engine:
        assert [engine.launch().iteration for _ in range(2)] == [0, 1]
        engine.reset_rings()
        assert engine.launch().iteration == 0
        for _, records in written(engine):
            assert (records["iter"] == 0).all()


def test_untraced_leaves_no_rings() -> None:
    with engine_for(layer(SMALL, 16), [16]) as engine:
        engine.launch()
        dump = engine.rings()
        assert len(dump.headers) == 0 and len(dump.records) == 0


def test_idle_lanes_share_the_wait_of_their_scheduler() -> None:
    # Rank 1 is late, so that every tile of rank 0 waits for its rows.
    from flashmoe.world.base import Fault

    what = layer(SMALL, 32)
    slow = Fault("slow", 1, seconds=0.02)
    with engine_for(what, [16, 16], traced=True, sms_per_rank=1, faults=(slow,)) as engine:
        assert engine.launch().status is Status.OK
        waited = {}
        for header, records in written(engine):
            if header["rank"] == 0:
                ends = records[(records["flags"] & RecordFlag.OPEN) == 0]
                rows = ends[ends["kind"] == EventKind.WAIT_ROWS]
                assert (rows["expert"] != NO_EXPERT).all()
                waited[Lane(header["lane"])] = int(rows["dur_ns"].sum())
    assert waited[Lane.SCHED] > 10e6
    for lane in (Lane.LOAD, Lane.MATH0, Lane.MATH1):
        assert 0.5 * waited[Lane.SCHED] < waited[lane] <= waited[Lane.SCHED] * 1.001
    assert waited[Lane.COMM0] == waited[Lane.COMM1] == 0


def test_clock_is_measured() -> None:
    with engine_for(layer(SMALL, 4), [4]) as engine:
        clock = engine.clock()
    assert clock.source == "CLOCK_MONOTONIC"
    assert 0 < clock.step_ns < 1e6
    assert 0 < clock.record_cost_ns < 1e5
    assert clock.sm_mhz is not None and clock.sm_mhz > 100

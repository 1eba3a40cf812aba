"""Where every actor's time went: exact sums, whatever was dropped, open, or overlapped."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import synthetic
from flashmoe.trace import schema
from flashmoe.trace.account import CLASSES, KINDS, Account, Actors, account
from flashmoe.trace.columns import Events
from flashmoe.trace.decode import decode
from flashmoe.trace.rings import Rings, from_dump
from flashmoe.trace.rundir import describe_rings, open_run
from flashmoe.trace.schema import EventKind, RecordFlag, TimeClass


def spent_by(rings: Rings, world: dict[str, Any] | None = None) -> tuple[Events, Account]:
    events = Events.of(decode(rings))
    meta = {"rings": describe_rings(rings), "world": world or {}}
    return events, account(events, Actors.of(meta))


def slowly(events: Events) -> dict[tuple[int, int, int, int], dict[str, int]]:
    """Class sums per (rank, cta, lane, iter), event by event."""
    sums: dict[tuple[int, int, int, int], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for i in range(len(events)):
        key = tuple(int(getattr(events, n)[i]) for n in ("rank", "cta", "lane", "iter"))
        kind, stall = EventKind(int(events.kind[i])), int(events.stall_ns[i])
        if kind == EventKind.LAUNCH:
            continue
        name = {TimeClass.BUSY: "busy", TimeClass.COMM: "comm", TimeClass.WAIT: "wait"}[
            schema.KIND_CLASS[kind]
        ]
        sums[key][name] += int(events.dur_ns[i]) - stall  # type: ignore[index]
        sums[key]["wait"] += stall  # type: ignore[index]
    return sums


def check_exact(spent: Account) -> None:
    assert (spent.class_ns >= 0).all()
    assert (spent.class_ns.sum(axis=2) == spent.wall_ns).all()
    classes = schema.CLASS_OF[KINDS]
    for at, cls in enumerate((TimeClass.BUSY, TimeClass.COMM)):
        of_kind = spent.kind_ns[:, :, classes == cls].sum(axis=2)
        assert (of_kind == spent.class_ns[:, :, at]).all()
    waits = spent.kind_ns[:, :, classes == TimeClass.WAIT].sum(axis=2)
    assert (waits + spent.stall_ns.sum(axis=2) == spent.class_ns[:, :, 2]).all()
    assert (spent.class_ns[:, :, 3][spent.bound] == 0).all()
    assert (spent.class_ns[:, :, 4][~spent.bound] == 0).all()


@given(
    seed=st.integers(0, 1000),
    ranks=st.integers(1, 3),
    tokens=st.integers(1, 120),
    iterations=st.integers(1, 4),
    capacity=st.none() | st.integers(1, 60),
    keep_last=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_sums_are_exact_and_those_of_a_plain_loop(
    seed: int, ranks: int, tokens: int, iterations: int, capacity: int | None, keep_last: bool
) -> None:
    shape = synthetic.Shape(
        ranks=ranks, sms=2, tokens=tokens, hidden=64, intermediate=64, experts=4, top_k=2,
        iterations=iterations, capacity=capacity, keep_last=keep_last, seed=seed, wall_us=50,
    )  # fmt: skip
    dump, _, meta = synthetic.make(shape)
    rings = from_dump(dump)
    events, spent = spent_by(rings, meta["world"])
    check_exact(spent)
    assert spent.overlap_ns == 0
    found = slowly(events)
    actors = spent.actors
    for a in range(len(actors)):
        for i in range(len(spent.iterations)):
            key = (int(actors.rank[a]), int(actors.cta[a]), int(actors.lane[a]), i)
            want = [found[key][name] for name in ("busy", "comm", "wait")]
            assert spent.class_ns[a, i, :3].tolist() == want
    if not rings.dropped.any():
        assert not spent.bound.any()
        assert spent.class_ns[:, :, CLASSES.index("unrecorded")].sum() == 0


def one_rank(*rings: list[tuple[int, int, EventKind]], **header: Any) -> Rings:
    """One rank's actors, each of (t0, t1, kind) spans; a LAUNCH span closes."""
    headers = np.zeros(len(rings), schema.RING_HEADER)
    headers["magic"], headers["lane"] = schema.RING_MAGIC, np.arange(len(rings))
    stored = []
    for i, spans in enumerate(rings):
        records = np.zeros(len(spans), schema.RECORD)
        for record, (a, b, kind) in zip(records, spans, strict=True):
            record["t0_ns"], record["dur_ns"], record["kind"] = a, b - a, kind
        headers[i]["count"] = headers[i]["capacity"] = len(spans)
        if spans and spans[-1][2] == EventKind.LAUNCH:
            headers[i]["begin_ns"], headers[i]["end_ns"] = spans[-1][0], spans[-1][1]
        stored.append(records)
    for name, value in header.items():
        headers[name] = value
    return Rings(headers, stored)


def classes_of(spent: Account, actor: int) -> dict[str, int]:
    return dict(zip(CLASSES, spent.class_ns[actor, 0].tolist(), strict=True))


def test_the_wall_is_the_ranks_and_time_outside_the_actor_is_idle() -> None:
    rings = one_rank(
        [(1000, 1400, EventKind.GATE), (1000, 1500, EventKind.LAUNCH)],
        [(1200, 1300, EventKind.DISPATCH), (1100, 2000, EventKind.LAUNCH)],
    )
    _, spent = spent_by(rings)
    assert spent.wall_ns.ravel().tolist() == [1000, 1000]
    assert classes_of(spent, 0) == {"busy": 400, "comm": 0, "wait": 0, "idle": 600, "unrecorded": 0}
    assert classes_of(spent, 1) == {"busy": 0, "comm": 100, "wait": 0, "idle": 900, "unrecorded": 0}


def test_a_stall_is_a_wait_and_not_work() -> None:
    rings = one_rank([(1000, 1400, EventKind.GEMM1), (1000, 1500, EventKind.LAUNCH)])
    rings.stored[0]["aux"][0], rings.stored[0]["stall_cycles"][0] = 800, 200
    _, spent = spent_by(rings)
    assert classes_of(spent, 0) == {
        "busy": 300,
        "comm": 0,
        "wait": 100,
        "idle": 100,
        "unrecorded": 0,
    }
    place = KINDS.tolist().index(EventKind.GEMM1)
    assert spent.stall_ns[0, 0, place] == 100


def test_spans_that_claim_the_same_time_count_once() -> None:
    rings = one_rank(
        [
            (1000, 1600, EventKind.GATE),
            (1500, 2100, EventKind.COUNTS),
            (1000, 2000, EventKind.LAUNCH),
        ]
    )
    _, spent = spent_by(rings)
    check_exact(spent)
    assert classes_of(spent, 0) == {"busy": 500, "comm": 500, "wait": 0, "idle": 0, "unrecorded": 0}
    assert spent.overlap_ns == 200


def test_what_a_full_ring_dropped_is_unrecorded_not_idle() -> None:
    spans = [(1000, 1100, EventKind.GATE), (1000, 2000, EventKind.LAUNCH)]
    lost = one_rank(spans, [(1000, 1300, EventKind.GATE)], count=[2, 9], capacity=[9, 1])
    lost.headers["begin_ns"][1], lost.headers["end_ns"][1] = 1000, 1900
    _, spent = spent_by(lost)
    check_exact(spent)
    assert spent.bound.ravel().tolist() == [False, True]
    assert classes_of(spent, 0) == {"busy": 100, "comm": 0, "wait": 0, "idle": 900, "unrecorded": 0}
    assert classes_of(spent, 1) == {"busy": 300, "comm": 0, "wait": 0, "idle": 0, "unrecorded": 700}


def test_launches_that_left_nothing_but_headers_are_unrecorded() -> None:
    shape = synthetic.Shape(
        ranks=2, sms=1, tokens=64, hidden=64, intermediate=64, experts=4, top_k=1, iterations=5,
        capacity=10,
    )  # fmt: skip
    dump, _, meta = synthetic.make(shape)
    events = Events.of(decode(from_dump(dump)))
    assert events.iter.max() < 4
    rings = describe_rings(from_dump(dump))
    spent = account(events, Actors.of(meta | {"rings": rings}), shape.iterations)
    check_exact(spent)
    begin, end = dump.headers["begin_ns"][:6].min(), dump.headers["end_ns"][:6].max()
    assert spent.wall_ns[:6, 4].tolist() == [end - begin] * 6
    assert spent.class_ns[:6, 4].tolist() == [[0, 0, 0, 0, end - begin]] * 6
    assert (spent.wall_ns[:, :4] < 2 * spent.wall_ns[0, 4]).all()


def test_keep_last_doubts_only_the_oldest_launch_it_holds() -> None:
    shape = synthetic.Shape(
        ranks=1, sms=1, tokens=64, hidden=64, intermediate=64, experts=4, top_k=1, iterations=5
    )
    whole, _, meta = synthetic.make(shape)
    capacity = int(whole.headers["count"].max()) * 2 // 5
    cut, _, _ = synthetic.make(
        synthetic.Shape(**{**shape.__dict__, "capacity": capacity, "keep_last": True})
    )
    _, all_of_it = spent_by(from_dump(whole), meta["world"])
    _, spent = spent_by(from_dump(cut), meta["world"])
    check_exact(spent)
    busiest = int(whole.headers["count"].argmax())
    assert not spent.bound[busiest, 4]
    assert spent.bound[busiest, 3]
    assert (spent.class_ns[:, 4] == all_of_it.class_ns[:, 4]).all()


def test_an_open_wait_fills_its_actors_time_in_a_run_that_hung() -> None:
    rings = one_rank(
        [(1000, 1100, EventKind.GATE), (1100, 1100, EventKind.WAIT_COUNTS)],
        [(1000, 9000, EventKind.WAIT_ROWS), (1000, 9000, EventKind.LAUNCH)],
    )
    rings.stored[0]["flags"][1] = RecordFlag.OPEN
    rings.headers["begin_ns"] = 1000
    _, spent = spent_by(rings)
    check_exact(spent)
    assert classes_of(spent, 0) == {
        "busy": 100,
        "comm": 0,
        "wait": 7900,
        "idle": 0,
        "unrecorded": 0,
    }


def test_an_actor_that_never_began_is_idle_under_its_own_name() -> None:
    spans = [(1000, 1100, EventKind.GATE), (1000, 2000, EventKind.LAUNCH)]
    rings = one_rank(*([spans] * 5), [])
    rings.headers[5] = np.zeros((), schema.RING_HEADER)
    _, spent = spent_by(rings, {"ranks": 1, "sms_per_rank": 1})
    assert spent.actors.lane.tolist() == [0, 1, 2, 3, 4, 5]
    assert spent.actors.began.tolist() == [True] * 5 + [False]
    assert classes_of(spent, 5) == {"busy": 0, "comm": 0, "wait": 0, "idle": 1000, "unrecorded": 0}


def test_a_rank_that_never_began_has_no_wall() -> None:
    spans = [(1000, 1100, EventKind.GATE), (1000, 2000, EventKind.LAUNCH)]
    rings = one_rank(*([spans] * 6), *([[]] * 6))
    rings.headers[6:] = np.zeros((), schema.RING_HEADER)
    _, spent = spent_by(rings, {"ranks": 2, "sms_per_rank": 1})
    assert spent.actors.rank.tolist() == [0] * 6 + [1] * 6
    assert spent.wall_ns.ravel().tolist() == [1000] * 6 + [0] * 6
    check_exact(spent)


def test_events_in_another_order_give_the_same_sums(run_path: Path) -> None:
    run = open_run(run_path)
    actors = Actors.of(run.meta)
    ordered = account(Events.of(run.events), actors)
    by_time = account(Events.of(run.events.sort_by("t0_ns")), actors)
    for name in ("class_ns", "kind_ns", "stall_ns", "wall_ns", "begin_ns", "end_ns"):
        assert (getattr(ordered, name) == getattr(by_time, name)).all(), name


@pytest.mark.parametrize("world", [{}, {"ranks": 1, "sms_per_rank": 1}])
def test_a_trace_without_events_has_no_time(world: dict[str, int]) -> None:
    rings = Rings(np.zeros(6, schema.RING_HEADER), [np.zeros(0, schema.RECORD)] * 6)
    _, spent = spent_by(rings, world)
    assert spent.wall_ns.sum() == 0
    check_exact(spent)

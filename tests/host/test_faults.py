"""When it goes wrong: hangs within their deadline, overflow, bad ids, Ctrl-C, memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from flashmoe.config import MoEConfig, Routing
from flashmoe.errors import FlashmoeError
from flashmoe.trace.diagnosis import diagnose
from flashmoe.trace.schema import ActorState, EventKind, RecordFlag
from flashmoe.world import host
from flashmoe.world.base import EngineOptions, Fault, RingMode, Status

from .layers import SMALL, engine_for, forward, layer

DEADLINE_S = 0.4
EXTERNAL = MoEConfig(32, 24, 6, 2, routing=Routing("external"))


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (Fault("never-starts", 1), "never-started"),
        (Fault("lost-signal", 1, expert=7), "lost-signal"),
        (Fault("wrong-count", 1, peer=2, expert=7), "wrong-count"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_fault_ends_within_the_deadline_and_is_explained(fault: Fault, cause: str) -> None:
    what = layer(SMALL, 90)
    options = {"deadline_s": DEADLINE_S, "first_deadline_s": DEADLINE_S, "traced": True}
    with engine_for(what, [30, 30, 30], faults=(fault,), **options) as engine:
        begin = time.monotonic()
        launch = engine.launch()
        assert launch.status is Status.HANG
        assert DEADLINE_S <= time.monotonic() - begin < DEADLINE_S + 5
        report = diagnose(
            engine.flight(),
            ranks=3,
            deadline_s=DEADLINE_S,
            now_ns=time.monotonic_ns(),
            counts_seen=engine.counts_seen(),
            chunk_counts=engine.routing().chunk_counts,
            tiles=engine.routing().tiles,
        )
        assert (report.cause, report.culprit) == (cause, 1), report.reason
        assert all(o.y.isnan().all() for o in engine.outputs())
        # The rings tell of it too: somebody's wait ended by giving up, after the deadline.
        dump = engine.rings()
        gave_up = dump.records[(dump.records["flags"] & RecordFlag.GAVE_UP) != 0]
        assert gave_up["dur_ns"].max() >= DEADLINE_S * 1e9
        # Sticky: the next launch returns at once, and reset() alone clears it.
        begin = time.monotonic()
        assert engine.launch().status is Status.HANG
        assert time.monotonic() - begin < DEADLINE_S / 2


def test_an_actor_that_never_starts_says_so() -> None:
    options = {"deadline_s": DEADLINE_S, "first_deadline_s": DEADLINE_S}
    faults = (Fault("never-starts", 0),)
    with engine_for(layer(SMALL, 20), [10, 10], faults=faults, **options) as engine:
        engine.launch()
        slots = engine.flight()
        assert (slots["state"][slots["rank"] == 0] == ActorState.NEVER_STARTED).all()
        others = slots[slots["rank"] == 1]
        assert (others["state"] != ActorState.NEVER_STARTED).all()
        stuck = others[others["kind"] == EventKind.WAIT_COUNTS]
        assert len(stuck) and (stuck["peer"] == 0).all()
        seen = engine.counts_seen()
        assert (seen[1, 0] == 0xFFFFFFFF).all() and (seen[1, 1] < 100).all()


def test_the_first_launch_has_a_longer_deadline() -> None:
    faults = (Fault("never-starts", 1),)
    options = {"deadline_s": 0.1, "first_deadline_s": 0.6}
    with engine_for(layer(SMALL, 20), [10, 10], faults=faults, **options) as engine:
        launch = engine.launch()
        assert launch.status is Status.HANG and launch.elapsed_ms >= 600
    assert EngineOptions().first_deadline_s is None


def test_reset_makes_a_hung_engine_whole() -> None:
    # The signal of an expert that gets rows only in the first launch.
    what = layer(EXTERNAL, 20)
    assert what.ids is not None and what.shares is not None
    hit = torch.tensor([[0, 5]] * 20, dtype=torch.int32)
    spared = torch.tensor([[0, 1]] * 20, dtype=torch.int32)
    what.ids = hit
    options = {"deadline_s": DEADLINE_S, "first_deadline_s": DEADLINE_S}
    faults = (Fault("lost-signal", 0, expert=5),)
    with engine_for(what, [8, 12], faults=faults, **options) as engine:
        assert engine.launch().status is Status.HANG
        engine.reset()
        engine.load(
            what.split([8, 12]), list(spared.split([8, 12])), list(what.shares.split([8, 12]))
        )
        for _ in range(2):
            assert engine.launch().status is Status.OK
        y = torch.cat([o.y for o in engine.outputs()])
    what.ids = spared
    assert torch.equal(y, forward(what, [20]).y)


def test_a_slow_rank_is_no_hang() -> None:
    what = layer(SMALL, 40)
    slow = Fault("slow", 1, seconds=0.01)
    with engine_for(what, [20, 20], faults=(slow,), deadline_s=5.0) as engine:
        launch = engine.launch()
        assert launch.status is Status.OK
        assert launch.elapsed_ms > 20
        y = torch.cat([o.y for o in engine.outputs()])
    assert torch.equal(y, forward(what, [40]).y)


def test_long_arithmetic_is_no_hang() -> None:
    # The comm lanes wait for the first row for longer than the deadline: 6.4 GFLOP come before it.
    what = layer(MoEConfig(1024, 2048, 2, 2), 256)
    options = {"deadline_s": 0.02, "first_deadline_s": 0.02}
    with engine_for(what, [256], sms_per_rank=1, **options) as engine:
        launch = engine.launch()
        assert launch.status is Status.OK and launch.elapsed_ms > 20


def test_a_crowded_core_is_no_hang() -> None:
    # Twelve thousand stages go from lane to lane; none may wait for the end of a time slice.
    what = layer(MoEConfig(1024, 2048, 2, 2), 256)
    options = {"deadline_s": 0.02, "first_deadline_s": 0.02}
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # of what is started below, too
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        with engine_for(what, [256], sms_per_rank=1, **options) as engine:
            assert engine.launch().status is Status.OK
    finally:
        os.sched_setaffinity(0, cores)
        for process in busy:
            process.kill()
            process.wait()


def test_overflow_says_the_rows_needed_and_moves_none() -> None:
    what = layer(SMALL, 64)
    with engine_for(what, [32, 32], traced=True) as engine:
        engine.launch()
        per_owner = engine.routing().chunk_counts.sum(axis=(0, 1)).reshape(2, -1).sum(axis=1)
    needed = int(per_owner.max())
    with engine_for(what, [32, 32], pool_rows=needed - 1, traced=True) as engine:
        for _ in range(2):  # not sticky, and the same again
            launch = engine.launch()
            assert launch.status is Status.OVERFLOW
            assert launch.rows_needed == needed
            assert all(o.y.isnan().all() for o in engine.outputs())
        dump = engine.rings()
        kinds = np.concatenate(
            [r[: h["count"]]["kind"] for h, r in zip(dump.headers, dump.records, strict=True)]
        )
        assert EventKind.DISPATCH not in kinds and EventKind.LAUNCH in kinds
    with engine_for(what, [32, 32], pool_rows=needed) as engine:
        assert engine.launch().status is Status.OK


def test_launches_after_an_overflow_start_afresh() -> None:
    # The counters that the launch before the overflow used serve again in the one after it.
    what = layer(EXTERNAL, 40)
    assert what.shares is not None
    even = torch.tensor([[0, 5]] * 40, dtype=torch.int32)
    crowded = torch.tensor([[0, 1]] * 40, dtype=torch.int32)
    options = {"deadline_s": 2.0, "first_deadline_s": 2.0}
    with engine_for(what, [20, 20], pool_rows=40, **options) as engine:
        for ids, status in (
            (even, Status.OK),
            (crowded, Status.OVERFLOW),
            (even, Status.OK),
            (crowded, Status.OVERFLOW),
            (crowded, Status.OVERFLOW),
            (even, Status.OK),
        ):
            engine.load(what.split([20, 20]), list(ids.split(20)), list(what.shares.split(20)))
            assert engine.launch().status is status
        y = torch.cat([o.y for o in engine.outputs()])
    what.ids = even
    assert torch.equal(y, forward(what, [40]).y)


@pytest.mark.parametrize("ring_mode", ["keep-first", "keep-last"])
def test_pools_below_the_worst_case_grow(
    monkeypatch: pytest.MonkeyPatch, ring_mode: RingMode
) -> None:
    # All tokens go to the first rank's two experts: three times the mean.
    what = layer(EXTERNAL, 96)
    what.ids = torch.tensor([[1, 0]] * 96, dtype=torch.int32)
    expected = forward(what, [96]).y
    monkeypatch.setattr(host, "available_bytes", lambda: 1 << 10)
    monkeypatch.setattr(host, "_require_memory", lambda needed: None)
    options = {"traced": True, "ring_mode": ring_mode}
    with engine_for(what, [32] * 3, sms_per_rank=1, **options) as engine:
        first, second = engine.launch(), engine.launch()
        assert first.status is second.status is Status.OK
        assert (first.rows_needed, second.rows_needed) == (192, 0)
        assert (first.iteration, second.iteration) == (0, 1)
        assert torch.equal(torch.cat([o.y for o in engine.outputs()]), expected)
        dump = engine.rings()
        for header, records in zip(dump.headers, dump.records, strict=True):
            mine = records[: header["count"]]
            launches = mine[mine["kind"] == EventKind.LAUNCH]
            assert launches["iter"].tolist() == [0, 1]  # the undone launch left nothing


@pytest.mark.parametrize("bad", [-1, 6, "twice"])
def test_bad_ids_are_refused_before_a_row_moves(bad: int | str) -> None:
    what = layer(EXTERNAL, 30)
    assert what.ids is not None
    good = what.ids.clone()
    what.ids[25, 1] = what.ids[25, 0] if bad == "twice" else int(bad)
    with engine_for(what, [10, 20], traced=True) as engine:
        assert engine.launch().status is Status.BAD_IDS
        assert engine.launch().status is Status.BAD_IDS
        dump = engine.rings()
        assert not (dump.records["kind"] == EventKind.DISPATCH).any()
        engine.reset()
        what.ids.copy_(good)
        assert what.shares is not None
        engine.load(
            what.split([10, 20]), list(good.split([10, 20])), list(what.shares.split([10, 20]))
        )
        assert engine.launch().status is Status.OK


def test_ctrl_c_ends_a_launch() -> None:
    faults = (Fault("never-starts", 1),)
    options = {"deadline_s": 60.0, "first_deadline_s": 60.0}
    with engine_for(layer(SMALL, 20), [10, 10], faults=faults, **options) as engine:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            engine.launch()
        assert time.monotonic() - begin < 10
        assert engine.launch().status is Status.HOST_ABORT


def test_flight_recorder_is_readable_during_a_launch() -> None:
    faults = (Fault("never-starts", 1),)
    options = {"deadline_s": 1.0, "first_deadline_s": 1.0}
    with engine_for(layer(SMALL, 20), [10, 10], faults=faults, **options) as engine:
        launched = threading.Thread(target=engine.launch)
        launched.start()
        time.sleep(0.5)
        slots = engine.flight()
        waiting = slots[slots["state"] == ActorState.WAITING]
        assert len(waiting) and (waiting["peer"] == 1).all()
        launched.join()


def test_too_little_memory_is_said_with_the_figure() -> None:
    config = MoEConfig(1024, 1024, 8, 2)
    what = layer(config, 1)
    with pytest.raises(FlashmoeError, match=r"needs \d+\.\d GB of memory"):
        host.HostEngine(config, what.weights, [500_000_000] * 2, EngineOptions(ranks=2))
    with pytest.raises(FlashmoeError, match="rows"):
        host.HostEngine(config, what.weights, [10**10], EngineOptions())


@pytest.mark.parametrize(
    ("tokens", "options", "match"),
    [
        ([4] * 9, EngineOptions(ranks=9), "1 to 8"),
        ([4], EngineOptions(ranks=2), "1 numbers of tokens for 2 ranks"),
        ([4], EngineOptions(sms_per_rank=0), "0 SMs"),
        ([4], EngineOptions(faults=(Fault("slow", 3),)), "rank 3"),
    ],
)
def test_what_no_engine_runs_is_refused(
    tokens: list[int], options: EngineOptions, match: str
) -> None:
    what = layer(SMALL, 4)
    with pytest.raises(FlashmoeError, match=match) as caught:
        host.HostEngine(SMALL, what.weights, tokens, options)
    assert caught.value.exit_code == 2


def test_inputs_of_another_shape_are_refused() -> None:
    what = layer(SMALL, 8)
    with engine_for(what, [8]) as engine:
        with pytest.raises(FlashmoeError, match=r"x of rank 0 has shape \[7, 64\]"):
            engine.load([what.x[:7]])
        with pytest.raises(FlashmoeError, match="2 ranks for 1"):
            engine.load([what.x, what.x])


def test_close_is_safe_to_call_twice() -> None:
    what = layer(SMALL, 8)
    with engine_for(what, [8], traced=True) as engine:
        engine.launch()
        records = engine.rings().records
        engine.close()
        engine.close()
        assert (records["kind"] == EventKind.LAUNCH).any()  # the view keeps its memory alive

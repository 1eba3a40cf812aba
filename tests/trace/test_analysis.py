"""The figures of the timeline: they add up, and follow from their definitions."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import synthetic
from flashmoe.errors import FlashmoeError
from flashmoe.trace import schema
from flashmoe.trace.account import CLASSES
from flashmoe.trace.analysis import TIMELINE_SCHEMA, timeline_summary
from flashmoe.trace.columns import Events
from flashmoe.trace.routed import RoutedWork
from flashmoe.trace.rundir import Run, open_run
from flashmoe.trace.schema import EventKind

SUMS = [f"{name}_ns" for name in CLASSES]


@pytest.fixture(scope="module")
def run(run_path: Path) -> Run:
    return open_run(run_path)


@pytest.fixture(scope="module")
def summary(run: Run) -> dict[str, Any]:
    return timeline_summary(run)


def entries(summary: dict[str, Any]) -> list[dict[str, Any]]:
    groups = ("ranks", "iterations", "lanes", "sms", "actors")
    return [summary["total"], *(entry for group in groups for entry in summary[group])]


def test_every_entry_adds_up_exactly(summary: dict[str, Any]) -> None:
    for entry in entries(summary):
        assert sum(entry[name] for name in SUMS) == entry["actor_ns"] > 0
        assert sum(entry["kinds_ns"].values()) == entry["busy_ns"] + entry["comm_ns"]
        assert sum(entry["waits_ns"].values()) == entry["wait_ns"]
        assert sum(entry["share"].values()) == pytest.approx(1)
        assert not entry["bounds"]


def test_every_grouping_adds_up_to_the_total(
    summary: dict[str, Any], shape: synthetic.Shape
) -> None:
    for group in ("ranks", "iterations", "lanes", "sms", "actors"):
        for name in ("actor_ns", *SUMS):
            assert sum(e[name] for e in summary[group]) == summary["total"][name], (group, name)
    assert len(summary["ranks"]) == shape.ranks
    assert len(summary["iterations"]) == shape.ranks * shape.iterations
    assert len(summary["sms"]) == shape.ranks * shape.sms
    assert len(summary["actors"]) == shape.ranks * shape.sms * schema.N_LANES
    assert [e["lane"] for e in summary["lanes"]] == list(schema.LANE_NAME.values())


def test_the_summary_is_plain_json(summary: dict[str, Any], run: Run) -> None:
    assert summary["schema"] == TIMELINE_SCHEMA
    back = json.loads(json.dumps(summary))
    assert back["total"] == summary["total"]
    assert summary["events"] == run.events.num_rows
    assert summary["rings"]["dropped"] == 0
    assert summary["world"] == "local"


def test_one_iteration_alone_is_its_entry(run: Run, summary: dict[str, Any]) -> None:
    alone = timeline_summary(run, 1)
    want = [e for e in summary["iterations"] if e["iter"] == 1]
    assert alone["iterations"] == want
    for got, entry in zip(alone["ranks"], want, strict=True):
        assert got == {k: v for k, v in entry.items() if k != "iter"}
    with pytest.raises(FlashmoeError, match="no iteration 9") as found:
        timeline_summary(run, 9)
    assert found.value.exit_code == 2


def test_one_iteration_counts_its_own_events_and_the_whole_runs_tracing(
    run: Run, summary: dict[str, Any], shape: synthetic.Shape
) -> None:
    alone = [timeline_summary(run, i) for i in range(shape.iterations)]
    assert sum(one["events"] for one in alone) == summary["events"]
    assert all(one["tracer"] == summary["tracer"] for one in alone)


def test_hidden_communication_is_the_intersection(run: Run, summary: dict[str, Any]) -> None:
    events = Events.of(run.events)
    start = events.start_ns()
    size = int((events.t0_ns + events.dur_ns).max()) - start
    for entry in summary["ranks"]:
        covered = {}
        for name, kinds in (("comm", schema.COMM_KINDS), ("tensor", schema.TENSOR_KINDS)):
            steps = np.zeros(size + 1, np.int64)
            mine = (events.rank == entry["rank"]) & np.isin(events.kind, kinds)
            np.add.at(steps, events.t0_ns[mine] - start, 1)
            np.add.at(steps, events.t0_ns[mine] + events.dur_ns[mine] - start, -1)
            covered[name] = np.cumsum(steps) > 0
        comm, tensor = covered["comm"], covered["tensor"]
        hidden = entry["hidden"]
        assert hidden["comm_ns"] == comm.sum()
        assert hidden["tensor_ns"] == tensor.sum()
        assert hidden["hidden_ns"] == (comm & tensor).sum() > 0
        assert hidden["share"] == hidden["hidden_ns"] / hidden["comm_ns"]


def test_tensor_work_is_that_of_the_definition(
    run: Run, summary: dict[str, Any], shape: synthetic.Shape
) -> None:
    rows = by_rank = np.zeros(shape.ranks, np.int64)
    _, routed, _ = synthetic.make(shape)
    per_expert = routed.chunk_counts.sum(axis=(0, 1)).astype(np.int64)
    for rank in range(shape.ranks):
        by_rank[rank] = per_expert[shape.first_expert(rank) : shape.first_expert(rank + 1)].sum()
    # SwiGLU: three matrices of H x I, a multiply and an add each.
    flop = 2 * rows * 3 * shape.hidden * shape.intermediate * shape.iterations
    for entry in summary["ranks"]:
        tensor = entry["tensor"]
        assert tensor["flop"] == flop[entry["rank"]]
        cycles = shape.sms * entry["wall_ns"] * summary["clock"]["sm_mhz_mean"] / 1000
        assert tensor["useful_share"] == pytest.approx(tensor["flop"] / 4096 / cycles)
        assert tensor["tflop_per_s"] == pytest.approx(tensor["flop"] / entry["wall_ns"] / 1000)
    assert summary["clock"]["sm_mhz_mean"] == pytest.approx(synthetic.MHZ, rel=1e-3)
    assert summary["tiles"]["ran"] == summary["tiles"]["planned"] == run.plan.num_rows
    assert summary["tiles"]["rows"] == per_expert.sum() * shape.iterations
    first = (routed.tiles["gemm"] == 1) & (routed.tiles["col_tile"] == 0)
    computed = routed.tiles["height"][first].sum()
    assert summary["tiles"]["computed_rows"] == computed * shape.iterations
    assert summary["tiles"]["fill"] == pytest.approx(per_expert.sum() / computed)
    assert 0 < summary["tiles"]["fill"] < 1


def test_rows_per_expert_are_those_routed(
    summary: dict[str, Any], shape: synthetic.Shape, run: Run
) -> None:
    _, routed, _ = synthetic.make(shape)
    rows = routed.chunk_counts.sum(axis=(0, 1)).astype(np.int64)
    assert summary["experts"]["rows"] == (rows * shape.iterations).tolist()
    assert summary["experts"]["busiest"] == rows.argmax()
    assert timeline_summary(run, 0)["experts"]["max"] == rows.max()


def test_what_each_rank_was_given_to_do(
    summary: dict[str, Any], shape: synthetic.Shape, run: Run
) -> None:
    _, routed, meta = synthetic.make(shape)
    rows = routed.chunk_counts.sum(axis=(0, 1)).astype(np.int64)
    tiles = routed.tiles[(routed.tiles["gemm"] == 1) & (routed.tiles["col_tile"] == 0)]
    alone = timeline_summary(run, 1)
    for launches, found in (
        (shape.iterations, summary["ranks"]),
        (1, summary["iterations"]),
        (1, alone["ranks"]),
    ):
        for entry in found:
            own = tiles[tiles["rank"] == entry["rank"]]
            fill = int(own["rows"].sum()) / int(own["height"].sum())
            assert entry["tile_fill"] == pytest.approx(fill)
            a, b = meta["world"]["experts_of_rank"][entry["rank"]]
            assert entry["rows_per_expert"] == {
                "experts": b - a,
                "min": launches * rows[a:b].min(),
                "max": launches * rows[a:b].max(),
            }


def test_what_is_not_known_of_a_rank_is_none(run: Run) -> None:
    empty = Run(
        run.path, run.meta | {"world": run.meta["world"] | {"experts_of_rank": [[0, 8], [8, 8]]}}
    )
    nothing = RoutedWork(empty, np.array([0xFFFF]))
    assert nothing.of_rank(0) == {"tile_fill": None, "rows_per_expert": None}
    known = RoutedWork(empty, np.array([0, 1]))
    assert known.of_rank(1)["rows_per_expert"] == {"experts": 0, "min": None, "max": None}
    assert known.of_rank(7) == {"tile_fill": None, "rows_per_expert": None}


def test_the_tracers_own_cost_counts_every_record(
    summary: dict[str, Any], shape: synthetic.Shape
) -> None:
    dump, _, meta = synthetic.make(shape)
    written = int(dump.headers["count"].sum())
    assert summary["tracer"]["records"] == written > summary["events"]
    assert summary["tracer"]["cost_ns"] == written * meta["clock"]["record_cost_ns"]
    assert summary["clock"]["step_ns"] == 32.0


@pytest.mark.parametrize("keep_last", [False, True])
def test_drops_are_shown_and_shares_are_bounds(
    tmp_path: Path, shape: synthetic.Shape, keep_last: bool
) -> None:
    synthetic.write(
        tmp_path / "cut.fmoe", dataclasses.replace(shape, capacity=25, keep_last=keep_last)
    )
    got = timeline_summary(open_run(tmp_path / "cut.fmoe"))
    assert got["bounds"]
    assert got["rings"]["dropped"] > 0
    assert got["rings"]["with_drops"] == sum(a["dropped"] > 0 for a in got["actors"]) > 0
    assert got["total"]["unrecorded_ns"] > 0
    for entry in entries(got):
        assert sum(entry[name] for name in SUMS) == entry["actor_ns"]
        assert entry["bounds"] or entry["unrecorded_ns"] == 0
    assert got["tiles"]["ran"] < got["tiles"]["planned"]


def test_the_host_engine_has_no_tensor_cores(run_path: Path) -> None:
    run = open_run(run_path)
    run.meta["world"]["kind"] = "host"
    got = timeline_summary(run)
    assert got["clock"]["sm_mhz_mean"] is None
    assert {e["tensor"]["useful_share"] for e in got["ranks"]} == {None}


def test_a_run_without_events_has_figures_of_zero(tmp_path: Path) -> None:
    from flashmoe.trace.rundir import RunWriter

    with RunWriter(tmp_path / "none.fmoe"):
        pass
    got = timeline_summary(open_run(tmp_path / "none.fmoe"))
    assert got["events"] == 0
    assert got["total"]["actor_ns"] == 0
    assert got["experts"] is None
    assert got["tiles"]["fill"] is None


def test_kinds_cover_every_class_once() -> None:
    from flashmoe.trace.account import KINDS

    assert sorted(KINDS) == [k for k in EventKind if k > EventKind.LAUNCH]


def test_reading_a_run_needs_neither_torch_nor_cuda(run_path: Path) -> None:
    code = f"""
import sys
for name in ("torch", "cuda", "pynvml", "nvtx", "flashmoe._host"):
    sys.modules[name] = None
from flashmoe.trace import analysis, cells, rundir, traffic
run = rundir.open_run({str(run_path)!r})
analysis.timeline_summary(run)
traffic.traffic_summary(run)
cells.timeline_cells(run, 10, 40)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

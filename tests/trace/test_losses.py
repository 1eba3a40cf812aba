"""Where launches' time went, by benchmarks/losses.py: known parts, and parts that add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import losses, synthetic
from flashmoe.errors import FlashmoeError
from flashmoe.trace import schema
from flashmoe.trace.analysis import timeline_summary
from flashmoe.trace.rundir import RunWriter, open_run
from flashmoe.trace.schema import EventKind as K
from flashmoe.trace.schema import Lane, RecordFlag

# Of a math group: kind, begin and end in us, share of it in which it waits for operands, tile.
Span = tuple[K, float, float, float, int]
BEFORE: list[Span] = [
    (K.GATE, 0, 10, 0, 0),
    (K.WAIT_BARRIER, 10, 12, 0, 0),
    (K.COUNTS, 12, 15, 0, 0),
    (K.PLAN, 15, 20, 0, 0),
]


def record(path: Path, groups: list[list[Span]], scales: list[float], tiles: list[int]) -> Any:
    """A run of one SM whose launches last 100 us times their scale; its column.

    ``groups``: the spans of math0 and math1.  ``tiles``: the GEMM of each tile of the plan.
    """
    lanes = [[] for lane in Lane if lane not in (Lane.MATH0, Lane.MATH1)] + groups
    headers = np.zeros(len(lanes), schema.RING_HEADER)
    spans = [[*own, (K.LAUNCH, 0, 100, 0, 0)] for own in lanes]
    longest = max(map(len, spans)) * len(scales)
    records = np.zeros((len(lanes), longest), schema.RECORD)
    for lane, own in enumerate(spans):
        header = headers[lane]
        header["magic"], header["capacity"], header["lane"] = schema.RING_MAGIC, longest, lane
        header["count"] = len(own) * len(scales)
        for i, scale in enumerate(scales):
            start = 1_000_000 * (i + 1)
            for j, (kind, a, b, stall, tile) in enumerate(own):
                r = records[lane, i * len(own) + j]
                r["kind"], r["iter"], r["tile"] = kind, i, tile
                r["t0_ns"], r["dur_ns"] = start + round(1000 * a * scale), 1000 * (b - a) * scale
                r["aux"], r["stall_cycles"] = 1000, 1000 * stall
            header["begin_ns"] = start
            header["end_ns"] = header["begin_ns"] + round(100_000 * scale)
            header["end_cycles"] = header["end_ns"] - header["begin_ns"]  # 1 GHz
    shape = synthetic.Shape(
        ranks=1, sms=1, tokens=8, hidden=64, intermediate=64, experts=1, top_k=1,
        iterations=len(scales),
    )  # fmt: skip
    counts = np.full((1, 1, 1), 8, np.uint32)
    plan = np.resize(synthetic.plan(shape, counts), len(tiles))
    plan["tile"], plan["gemm"], plan["col_tile"] = np.arange(len(tiles)), tiles, 0
    plan["rows"], plan["height"], plan["cols"], plan["depth"] = 6, 8, 64, 64
    with RunWriter(path) as out:
        out.meta.update(synthetic.meta(shape))
        out.add_rings(synthetic.Dump(headers, records))
        out.add_routing(range(len(scales)), synthetic.Routed(counts, plan))
    return losses.losses(open_run(path))


def test_parts_of_a_run_with_tiles_are_what_it_was_made_of(tmp_path: Path) -> None:
    first = [*BEFORE, (K.GEMM1, 26, 46, 0.25, 0), (K.GEMM1, 47, 57, 0, 1)]
    second = [*BEFORE, (K.GEMM1, 28, 48, 0.25, 0), (K.GEMM1, 49, 59, 0, 1)]
    both: list[Span] = [
        (K.WAIT_H, 59, 61, 0, 0),
        (K.GEMM2, 61, 71, 0.1, 2),
        (K.GIVE_BACK, 71, 75, 0, 2),
        (K.COMBINE, 80, 99, 0, 0),
    ]
    column = record(tmp_path / "a.fmoe", [first + both, second + both], [1, 5, 2], [1, 1, 2])
    assert column["launches"] == 3
    assert column["launch_us"] == 200  # the median launch is twice as long
    assert column["tiles"] == {"gemm1": 2, "gemm2": 1}
    assert not column["by_units"]
    assert {name: us / 2 for name, us in column["parts_us"].items()} == pytest.approx(
        {
            "gate": 10,
            "waits": 2,
            "plan": 8,
            "first": 7,
            "gemm1": 25,
            "gemm1_operands": 5,
            "gemm2": 9,
            "gemm2_operands": 1,
            "give_back": 4,
            "between": 4,
            "last": 25,
            "no_tile": 0,
        }
    )
    assert column["parts_sum_us"] == pytest.approx(200)
    flop = 2 * 6 * 64 * 64 * (2 + 2 + 1)  # GEMM1 is gated
    assert column["tensor_use"] == pytest.approx(flop / (200_000 * 4096))
    assert column["tile_fill"] == 0.75
    text = losses.table([column])
    assert "| products of GEMM1 | 2.0 tiles, 50.0 |" in text
    assert "| waiting for logits, barrier and counts | 4.0 |" in text
    assert "without a tile" not in text


def test_parts_of_a_run_by_units(tmp_path: Path) -> None:
    first: list[Span] = [
        (K.GATE, 0, 10, 0, 0),
        (K.PLAN, 10, 12, 0, 0),
        (K.GEMM1, 20, 40, 0.5, 0),
        (K.COUNTS, 40, 46, 0, 0),
        (K.WAIT_H, 46, 50, 0, 0),
        (K.GEMM2, 50, 60, 0.2, 1),
        (K.GIVE_BACK, 60, 62, 0, 1),
        (K.COMBINE, 62, 90, 0, 0),
    ]
    second: list[Span] = [(K.GATE, 0, 10, 0, 0), (K.PLAN, 10, 12, 0, 0), (K.COUNTS, 12, 14, 0, 0)]
    column = record(tmp_path / "units.fmoe", [first, second], [1], [1, 2])
    assert column["by_units"]
    assert column["tiles"] == {"gemm1": 0.5, "gemm2": 0.5}
    assert column["parts_us"] == pytest.approx(
        {
            "gate": 10,
            "waits": 0,
            "plan": 2 + (6 + 2) / 2,
            "first": 4,
            "gemm1": 5,
            "gemm1_operands": 5,
            "gemm2": 4,
            "gemm2_operands": 1,
            "give_back": 1,
            "between": 2,
            "last": 19,
            "no_tile": 43,
        }
    )
    assert column["parts_sum_us"] == pytest.approx(100)
    text = losses.table([column])
    assert "0.5 units, 5.0" in text
    assert "| groups without a tile, after the plan | 43.0 |" in text


def test_counts_told_before_a_groups_first_unit_are_no_part_of_its_wait(tmp_path: Path) -> None:
    group: list[Span] = [
        (K.GATE, 0, 10, 0, 0),
        (K.PLAN, 10, 12, 0, 0),
        (K.COUNTS, 13, 19, 0, 0),
        (K.WAIT_H, 19, 30, 0, 0),
        (K.GEMM2, 30, 40, 0, 0),
        (K.GIVE_BACK, 40, 42, 0, 0),
    ]
    parts = record(tmp_path / "late.fmoe", [group, group], [1], [2])["parts_us"]
    some = {name: us for name, us in parts.items() if us}
    assert some == pytest.approx(
        {"gate": 10, "plan": 8, "first": 12, "gemm2": 10, "give_back": 2, "last": 58}
    )


def test_parts_add_up_in_every_launch(run_path: Path) -> None:
    run = open_run(run_path)
    column = losses.losses(run)
    summary = timeline_summary(run)
    walls = [i["wall_ns"] / 1000 for i in summary["iterations"] if i["rank"] == 0]
    assert column["launch_us_each"] == pytest.approx(walls, rel=0.05)  # the mean of two ranks'
    assert column["parts_sum_us"] == pytest.approx(column["launch_us"], rel=0.01)
    lanes = [a for a in summary["lanes"] if a["lane"].startswith("math")]
    stalls = sum(a["waits_ns"]["operands"] for a in lanes) / sum(a["actor_ns"] for a in lanes)
    parts = column["parts_us"]
    waited = (parts["gemm1_operands"] + parts["gemm2_operands"]) / column["launch_us"]
    assert waited == pytest.approx(stalls, rel=0.01)


def test_medians_that_do_not_add_up_are_said(tmp_path: Path) -> None:
    column = record(tmp_path / "a.fmoe", [[*BEFORE], [*BEFORE]], [1], [1])
    assert "add up to" not in losses.table([column])
    column["parts_sum_us"] = 98.0
    assert "the parts add up to 98.0 % of the whole launch" in losses.table([column])


def test_the_command_prints_a_table_and_writes_json(
    run_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses.main([str(run_path), str(run_path), "--json", str(tmp_path / "out.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].count("|") == 4
    assert any(line.startswith("| after the last tile |") for line in lines)
    written = json.loads((tmp_path / "out.json").read_text())
    assert [r["run"] for r in written["runs"]] == [run_path.name] * 2


def test_what_is_no_run_is_said_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        losses.main([str(tmp_path)])
    assert ended.value.code
    assert "is not a flashmoe run" in capsys.readouterr().err


def test_launches_that_lack_records_are_refused(tmp_path: Path, shape: synthetic.Shape) -> None:
    path = tmp_path / "short.fmoe"
    synthetic.write(path, synthetic.Shape(**{**shape.__dict__, "capacity": 20}))
    with pytest.raises(FlashmoeError, match="records were dropped"):
        losses.losses(open_run(path))


def test_a_launch_that_gave_up_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hung.fmoe"
    dump, routed, meta = synthetic.make(synthetic.Shape(ranks=1, sms=2, tokens=64, experts=8))
    wait = dump.records["kind"] == K.WAIT_BARRIER
    dump.records["flags"][wait & (dump.records["flags"] == 0)] = RecordFlag.GAVE_UP
    with RunWriter(path) as out:
        out.meta.update(meta)
        out.add_rings(dump)
        out.add_routing(0, routed)
    with pytest.raises(FlashmoeError, match="one did not end well"):
        losses.losses(open_run(path))

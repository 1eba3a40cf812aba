"""Decoding: columns, stalls, bytes, and durations that do not fit a record."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import synthetic
from flashmoe.errors import FlashmoeError
from flashmoe.trace import decode as decoding
from flashmoe.trace import schema
from flashmoe.trace.decode import EVENTS, decode, kind_codes, lane_codes, stall_ns
from flashmoe.trace.rings import from_dump
from flashmoe.trace.rundir import RunWriter, open_run
from flashmoe.trace.schema import EventKind, RecordFlag

COLUMNS = [
    "rank",
    "sm",
    "cta",
    "lane",
    "kind",
    "t0_ns",
    "dur_ns",
    "peer",
    "expert",
    "tile",
    "aux",
    "stall_ns",
    "iter",
    "flow",
    "flags",
    "bytes",
]


def one_ring(records: np.ndarray, begin: int = 0, end: int = 0, **header: int) -> synthetic.Dump:
    headers = np.zeros(1, schema.RING_HEADER)
    headers["count"] = headers["capacity"] = len(records)
    headers["magic"] = schema.RING_MAGIC
    headers["begin_ns"], headers["end_ns"] = begin, end
    for name, value in header.items():
        headers[name] = value
    return synthetic.Dump(headers, records[None, :])


def records(*rows: dict[str, int]) -> np.ndarray:
    out = np.zeros(len(rows), schema.RECORD)
    for record, row in zip(out, rows, strict=True):
        for name, value in row.items():
            record[name] = value
    return out


def test_columns_are_those_documented(run_path: Path) -> None:
    assert EVENTS.names == COLUMNS
    events = open_run(run_path).events
    assert events.column_names == COLUMNS
    assert events.schema.field("kind").type.value_type == pa.string()
    assert set(events["lane"].unique().to_pylist()) == set(schema.LANE_NAME.values())


def test_every_field_reaches_its_column() -> None:
    record = records(
        {
            "t0_ns": 2**60 + 3,
            "dur_ns": 70,
            "kind": EventKind.DISPATCH,
            "flags": 4,
            "peer": 3,
            "expert": 9,
            "iter": 5,
            "tile": 11,
            "aux": 4096,
            "stall_cycles": 6,
        }
    )
    table = decode(from_dump(one_ring(record, rank=1, sm=77, cta=2, lane=schema.Lane.COMM1)))
    assert table.to_pylist() == [
        {
            "rank": 1,
            "sm": 77,
            "cta": 2,
            "lane": "comm1",
            "kind": "dispatch",
            "t0_ns": 2**60 + 3,
            "dur_ns": 70,
            "peer": 3,
            "expert": 9,
            "tile": 11,
            "aux": 4096,
            "stall_ns": 0,
            "iter": 5,
            "flow": 0,
            "flags": 4,
            "bytes": 4096,
        }
    ]


def test_only_transfers_have_bytes_and_only_tiles_and_loads_have_stalls() -> None:
    rows = [{"kind": k, "dur_ns": 100, "aux": 1000, "stall_cycles": 250} for k in EventKind if k]
    table = decode(from_dump(one_ring(records(*rows))))
    for row in table.to_pylist():
        kind = EventKind[row["kind"].upper()]
        assert row["bytes"] == (1000 if kind in schema.BYTE_KINDS else 0)
        assert row["stall_ns"] == (25 if kind in schema.STALL_REASON else 0)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_a_stall_is_the_rounded_share_of_its_span(dur: int, stall: int, cycles: int) -> None:
    arrays = (np.array([v], np.uint32) for v in (dur, stall, cycles))
    got = int(stall_ns(*arrays)[0])
    assert 0 <= got <= dur
    if 0 < stall <= cycles:
        assert abs(got - dur * stall / cycles) <= 0.5 + dur * 2**-50
    if stall == 0:
        assert got == 0


def test_an_open_wait_lasts_to_its_actors_end_or_the_last_time_seen() -> None:
    opening = {"t0_ns": 500, "kind": EventKind.WAIT_COUNTS, "flags": RecordFlag.OPEN, "peer": 1}
    first = {"t0_ns": 100, "dur_ns": 400, "kind": EventKind.GATE}
    ended = decode(from_dump(one_ring(records(first, opening), begin=100, end=10**10)))
    assert ended["dur_ns"].to_pylist() == [400, 10**10 - 500]
    assert ended["flags"].to_pylist() == [0, int(RecordFlag.OPEN)]
    longer = {"t0_ns": 100, "dur_ns": 2000, "kind": EventKind.GATE}
    headers = np.zeros(2, schema.RING_HEADER)
    headers["count"], headers["capacity"], headers["magic"] = [2, 1], 2, schema.RING_MAGIC
    headers["lane"] = [0, 1]
    both = np.zeros((2, 2), schema.RECORD)
    both[0], both[1, :1] = records(first, opening), records(longer)
    hung = decode(from_dump(synthetic.Dump(headers, both)))
    assert hung["dur_ns"].to_pylist() == [400, 1600, 2000]


def test_a_saturated_duration_lasts_to_what_follows() -> None:
    full = 2**32 - 1
    rows = records(
        {
            "t0_ns": 100,
            "dur_ns": full,
            "kind": EventKind.WAIT_ROWS,
            "flags": RecordFlag.SATURATED | RecordFlag.GAVE_UP,
        },
        {"t0_ns": 9 * 10**9, "dur_ns": 50, "kind": EventKind.GEMM1},
        {
            "t0_ns": 9 * 10**9 + 50,
            "dur_ns": full,
            "kind": EventKind.WAIT_H,
            "flags": RecordFlag.SATURATED,
        },
        {"t0_ns": 100, "dur_ns": full, "kind": EventKind.LAUNCH, "flags": RecordFlag.SATURATED},
    )
    table = decode(from_dump(one_ring(rows, begin=100, end=20 * 10**9)))
    assert table["dur_ns"].to_pylist() == [9 * 10**9 - 100, 50, 11 * 10**9 - 50, 20 * 10**9 - 100]


def test_codes_survive_another_order_of_names(run_path: Path) -> None:
    events = open_run(run_path).events
    for name, codes, values in (
        ("kind", kind_codes, {n: v for v, n in enumerate(schema.NAME_OF)}),
        ("lane", lane_codes, {n: int(v) for v, n in schema.LANE_NAME.items()}),
    ):
        plain = events[name].to_pylist()
        shuffled = pa.chunked_array(
            [pa.array(plain[:100]).dictionary_encode(), pa.array(plain[100:]).dictionary_encode()]
        )
        at = events.column_names.index(name)
        other = events.set_column(at, name, shuffled)
        assert codes(other).tolist() == [values[n] for n in plain] == codes(events).tolist()


@pytest.mark.parametrize("block", [1, 7, 16384])
def test_blocks_do_not_show(
    block: int, shape: synthetic.Shape, run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_BLOCK", block)
    dump, routed, _ = synthetic.make(shape)
    table = decode(from_dump(dump))
    saved = open_run(run_path).events
    assert table.drop_columns(["flow", "kind", "lane"]).equals(
        saved.drop_columns(["flow", "kind", "lane"])
    )
    assert table["kind"].to_pylist() == saved["kind"].to_pylist()
    assert len(routed.tiles) > 0


@pytest.mark.parametrize(
    ("kind", "lane", "said"),
    [(200, 0, "kind kind200"), (25, 0, "kind kind25"), (0, 0, "kind none"), (4, 9, "lane lane9")],
)
def test_what_no_engine_writes_is_kept_and_told_to_readers(
    kind: int, lane: int, said: str, tmp_path: Path
) -> None:
    record = records({"t0_ns": 5, "dur_ns": 1, "kind": kind})
    with RunWriter(tmp_path / "odd.fmoe") as writer:
        writer.add_rings(one_ring(record, lane=lane))
    for missing in ("none", "events.parquet"):
        (tmp_path / "odd.fmoe" / missing).unlink(missing_ok=True)
        with pytest.raises(FlashmoeError, match=said):
            _ = open_run(tmp_path / "odd.fmoe").events

"""Holds the tables of docs/trace-format.md to the code that writes the files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from flashmoe.trace import schema
from flashmoe.trace.decode import EVENTS
from flashmoe.trace.rundir import COUNTS, PLAN, SCHEMA

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "trace-format.md").read_text()
SIZES = {"u64": 8, "u32": 4, "u16": 2, "u8": 1}


def table(after: str) -> list[list[str]]:
    """The cells of the first table behind the text ``after``, without its head."""
    lines = iter(TEXT[TEXT.index(after) :].splitlines())
    rows = []
    for line in lines:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            break
    return rows[2:]


def bare(cell: str) -> str:
    return cell.strip("`")


@pytest.mark.parametrize(
    ("after", "dtype"),
    [
        ("\nFile header:", schema.FILE_HEADER),
        ("\nRing header:", schema.RING_HEADER),
        ("\nRecord:", schema.RECORD),
        ("\n## flight.bin", schema.FLIGHT_SLOT),
    ],
)
def test_bytes_are_those_of_the_structs(after: str, dtype: np.dtype) -> None:
    told = []
    for offset, kind, name, _ in table(after):
        size = SIZES.get(kind) or int(kind.removesuffix(" bytes"))
        told.append((bare(name), int(offset), size))
    fields = dtype.fields
    assert fields is not None
    assert told == [(name, at, of.itemsize) for name, (of, at, *_) in fields.items()]
    assert told[-1][1] + told[-1][2] == dtype.itemsize


def test_magic_numbers_and_versions() -> None:
    assert f"`{schema.FILE_MAGIC.decode()}`" in TEXT
    assert f"{schema.RING_MAGIC:#x} once" in TEXT
    sizes = {row[2]: row[3] for row in table("\nFile header:")}
    assert sizes["`version`"] == str(schema.FILE_VERSION)
    assert sizes["`record_bytes`"] == str(schema.RECORD.itemsize)
    assert sizes["`header_bytes`"] == str(schema.RING_HEADER.itemsize)
    assert f"`schema` in run.json is the version of the directory, now {SCHEMA};" in TEXT
    assert f"that of its layout, now {schema.FILE_VERSION}." in TEXT


def test_kinds_lanes_flags_and_states() -> None:
    kinds = {bare(row[0]): row for row in table("\n## Event kinds")}
    assert {name: (int(row[1]), row[2]) for name, row in kinds.items()} == {
        schema.KIND_NAME[kind]: (int(kind), schema.KIND_CLASS[kind].name.lower())
        for kind in schema.EventKind
        if kind
    }
    moves = {name for name, row in kinds.items() if row[5].startswith("bytes")}
    assert moves == {schema.KIND_NAME[kind] for kind in schema.BYTE_KINDS}
    stalls = {n for n, row in kinds.items() if "stall" in row[4] or "as gemm1" in row[4]}
    assert stalls == {schema.KIND_NAME[kind] for kind in schema.STALL_REASON}
    lanes = {bare(row[0]): int(row[1]) for row in table("\n| lane | value")}
    assert lanes == {name: int(lane) for lane, name in schema.LANE_NAME.items()}
    for after, of in (("\n| flag |", schema.RecordFlag), ("\n| state |", schema.ActorState)):
        told = {row[0].replace("-", "_").upper(): int(row[1]) for row in table(after)}
        assert told == {item.name: int(item) for item in of}


@pytest.mark.parametrize(
    ("after", "of"),
    [
        ("\n## events.parquet", EVENTS),
        ("\n## plan.parquet", PLAN),
        ("A row of `counts.parquet`", COUNTS),
    ],
)
def test_columns_are_those_of_the_tables(after: str, of: pa.Schema) -> None:
    def name(kind: pa.DataType) -> str:
        return "dictionary of string" if pa.types.is_dictionary(kind) else str(kind)

    told = [(bare(row[0]), row[1]) for row in table(after)]
    assert told == [(field.name, name(field.type)) for field in of]


def test_keys_of_run_json(tmp_path: Path) -> None:
    pytest.importorskip("flashmoe._host")
    from flashmoe.presets import PRESETS
    from flashmoe.session import Request, run

    out = tmp_path / "one.fmoe"
    tiny = PRESETS["tiny"].config
    run(Request("tiny", "tiny", tiny, (16,), world="host", traced=True, out=out), lambda *_: None)
    meta = json.loads((out / "run.json").read_text())
    written = set()
    for key, value in meta.items():
        parts = value if key in ("world", "rings", "timing") else [""]
        written |= {f"{key}.{part}".rstrip(".") for part in parts}
    told = {bare(row[0]): row[2] for row in table("\n## run.json")}
    assert set(told) - written <= {"world.tile_rows"}
    assert written <= set(told)
    for outer, text in (
        ("tool", told["tool"]),
        ("config", told["config"]),
        ("clock", told["clock"]),
        ("check", told["check"]),
        ("status", told["status"]),
    ):
        assert set(meta[outer]) <= set(re.findall(r"`(\w+)`", text)), outer
    assert set(meta["rings"]["per_ring"][0]) <= set(re.findall(r"`(\w+)`", told["rings.per_ring"]))

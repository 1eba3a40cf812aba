"""Holds flashmoe/trace/schema.py to csrc/core: events.h, records.h and flight.h, parsed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from flashmoe.trace import schema

CORE = Path(__file__).resolve().parents[2] / "csrc" / "core"
EVENTS = (CORE / "events.h").read_text()
STRUCTS = (CORE / "records.h").read_text() + (CORE / "flight.h").read_text()
C_TYPES = {"uint64_t": 8, "uint32_t": 4, "uint16_t": 2, "uint8_t": 1}


def macro(name: str) -> str:
    """The body of an X-macro, its continued lines joined."""
    text = EVENTS.replace("\\\n", " ")
    found = re.search(rf"#define {name}\(X\)(.*)", text)
    assert found is not None
    return found.group(1)


def c_enum(name: str) -> dict[str, int]:
    found = re.search(rf"enum (?:class )?{name}\b[^{{]*{{(.*?)}};", EVENTS, re.DOTALL)
    assert found is not None
    body = re.sub(r"//.*", "", found.group(1))
    return {n: int(v) for n, v in re.findall(r"\bk(\w+)\s*=\s*(\d+)", body)}


def snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).upper()


def c_struct(name: str) -> tuple[list[tuple[str, int, int]], int]:
    """Fields as (name, bytes of one element, elements), and the struct's alignment."""
    found = re.search(rf"struct alignas\((\d+)\) {name} {{(.*?)\n}};", STRUCTS, re.DOTALL)
    assert found is not None
    fields = [
        (field, C_TYPES[ctype], int(count or 1))
        for ctype, field, count in re.findall(
            r"^\s*(uint\d+_t) (\w+)(?:\[(\d+)\])?;", found.group(2), re.MULTILINE
        )
    ]
    return fields, int(found.group(1))


def test_kinds_are_those_of_the_header() -> None:
    rows = re.findall(r"X\((\w+), (\d+), k(\w+), \"", macro("FLASHMOE_EVENT_KINDS"))
    assert len(rows) >= 17
    header = {name: (int(value), cls.upper()) for name, value, cls in rows}
    mirror = {
        schema.KIND_NAME[kind]: (int(kind), schema.KIND_CLASS[kind].name)
        for kind in schema.EventKind
        if kind
    }
    assert mirror == header
    for name, (value, cls) in header.items():
        assert schema.NAME_OF[value] == name
        assert schema.CLASS_OF[value] == schema.TimeClass[cls]


def test_kinds_that_move_bytes_are_those_the_header_says() -> None:
    rows = re.findall(r"X\((\w+), (\d+), k\w+,\s+\"([^\"]*)\"\)", macro("FLASHMOE_EVENT_KINDS"))
    assert {int(v) for _, v, aux in rows if aux.startswith("bytes")} == set(schema.BYTE_KINDS)
    spans = {int(v) for name, v, aux in rows if "cycles of the span" in aux}
    assert spans == set(schema.STALL_REASON)


def test_lanes_are_those_of_the_header() -> None:
    rows = re.findall(r"X\((\w+), (\d+)\)", macro("FLASHMOE_LANES"))
    header = {name: int(value) for name, value in rows}
    assert header == {name: int(lane) for lane, name in schema.LANE_NAME.items()}
    assert f"kLanes = {schema.N_LANES};" in EVENTS


@pytest.mark.parametrize(
    ("c_name", "mirror", "prefix"),
    [
        ("TimeClass", schema.TimeClass, ""),
        ("RecordFlags", schema.RecordFlag, "Flag"),
        ("ActorState", schema.ActorState, ""),
    ],
)
def test_enums_are_those_of_the_header(c_name: str, mirror: type, prefix: str) -> None:
    header = {snake(name.removeprefix(prefix)): v for name, v in c_enum(c_name).items()}
    assert header == {name: int(value) for name, value in mirror.__members__.items()}


def test_ring_modes_and_sentinels_are_those_of_the_header() -> None:
    found = re.search(r"enum class RingMode[^{]*{([^}]*)}", STRUCTS)
    assert found is not None
    header = {snake(n): int(v) for n, v in re.findall(r"k(\w+) = (\d+)", found.group(1))}
    assert header == {name: int(v) for name, v in schema.RingMode.__members__.items()}
    words = {
        name: int(value, 16)
        for name, value in re.findall(r"k(\w+) = (0x[0-9a-f]+)u?;", EVENTS + STRUCTS)
    }
    assert words == {
        "NoPeer": schema.NO_PEER,
        "NoExpert": schema.NO_EXPERT,
        "NoTile": schema.NO_TILE,
        "RingMagic": schema.RING_MAGIC,
    }
    assert schema.RING_MAGIC.to_bytes(4, "little") == b"FOMR"


@pytest.mark.parametrize(
    ("c_name", "dtype"),
    [
        ("Record", schema.RECORD),
        ("RingHeader", schema.RING_HEADER),
        ("FlightSlot", schema.FLIGHT_SLOT),
    ],
)
def test_structs_are_those_of_the_header(c_name: str, dtype: np.dtype) -> None:
    fields, alignment = c_struct(c_name)
    offset = 0
    for name, size, count in fields:
        offset = -(-offset // size) * size  # the compiler's natural alignment
        assert dtype.fields is not None
        kind, at = dtype.fields[name][:2]
        assert (at, kind.itemsize) == (offset, size * count), name
        offset += size * count
    assert dtype.itemsize == -(-offset // alignment) * alignment
    names = set(dtype.names or ()) - {"padding"}
    assert names == {name for name, _, _ in fields}
    assert f"static_assert(sizeof({c_name}) == {dtype.itemsize}," in STRUCTS


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
def test_offsets_are_those_the_compiler_gives(tmp_path: Path) -> None:
    structs = {
        "Record": schema.RECORD,
        "RingHeader": schema.RING_HEADER,
        "FlightSlot": schema.FLIGHT_SLOT,
        "TileImage": schema.TILE_IMAGE,
        "StepImage": schema.STEP_IMAGE,
        "LogCursor": schema.LOG_CURSOR,
        "Tile": schema.TILE_IMAGE["tile"],
        "TileStamps": schema.TILE_IMAGE["stamps"].base,
        "LoadStamps": schema.TILE_IMAGE["loads"].base,
        "ReturnPath": schema.TILE_IMAGE["returns"].base,
    }
    named = ("records", "flight", "images")
    headers = [f'#include "core/{name}.h"' for name in named]
    lines = [*headers, "using namespace flashmoe;"]
    for name, dtype in structs.items():
        lines.append(f"static_assert(sizeof({name}) == {dtype.itemsize});")
        for field in dtype.names or ():
            if field != "padding":
                assert dtype.fields is not None
                kind, at = dtype.fields[field][:2]
                lines.append(f"static_assert(offsetof({name}, {field}) == {at});")
                lines.append(f"static_assert(sizeof({name}::{field}) == {kind.itemsize});")
    source = tmp_path / "layout.cpp"
    source.write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        ["g++", "-std=c++20", "-fsyntax-only", f"-I{CORE.parent}", str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_file_header_is_32_bytes() -> None:
    assert schema.FILE_HEADER.itemsize == 32
    assert len(schema.FILE_MAGIC) == 8

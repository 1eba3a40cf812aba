"""rings.bin: what is written comes back, and what is not ours is refused in one sentence."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.synthetic import Dump
from flashmoe.errors import FlashmoeError
from flashmoe.trace import schema
from flashmoe.trace.decode import decode
from flashmoe.trace.rings import Rings, from_dump, read_rings, write_rings
from flashmoe.trace.schema import EventKind, RecordFlag, RingMode


def write_as_an_engine(written: list[np.void], capacity: int, mode: RingMode) -> Dump:
    """One ring, filled record by record as csrc/core/actor.h does."""
    headers = np.zeros(1, schema.RING_HEADER)
    records = np.zeros((1, capacity), schema.RECORD)
    for index, record in enumerate(written):
        if index < capacity:
            records[0, index] = record
        elif mode == RingMode.KEEP_LAST and capacity:
            records[0, index % capacity] = record
    headers["count"], headers["capacity"] = len(written), capacity
    headers["magic"], headers["mode"] = schema.RING_MAGIC, mode
    headers["begin_ns"], headers["end_ns"] = 1, 10**6
    return Dump(headers, records)


def make_records(n: int, waits: list[bool]) -> list[np.void]:
    """``n`` spans of 10 ns each, in turn; a wait is preceded by its opening record."""
    out = []
    for i in range(n):
        record = np.zeros((), schema.RECORD)
        record["t0_ns"], record["dur_ns"] = 100 + 10 * i, 10
        record["kind"] = EventKind.WAIT_ROWS if waits[i] else EventKind.PLAN
        record["tile"] = i
        if waits[i]:
            opening = record.copy()
            opening["flags"], opening["dur_ns"] = RecordFlag.OPEN, 0
            out.append(opening[()])
        out.append(record[()])
    return out


def expected(written: list[np.void], capacity: int, mode: RingMode) -> list[tuple[int, int, int]]:
    """(tile, dur_ns, flags) of what a reader must find, said in the plainest way."""
    n = len(written)
    if n <= capacity:
        kept = written
    elif mode == RingMode.KEEP_LAST:
        kept = written[n - capacity :]
    else:
        kept = written[:capacity]
    rows = []
    for i, record in enumerate(kept):
        if record["flags"] & RecordFlag.OPEN:
            if i + 1 < len(kept) or (mode == RingMode.KEEP_FIRST and n > capacity):
                continue
            rows.append((int(record["tile"]), 10**6 - int(record["t0_ns"]), 1))
        else:
            rows.append((int(record["tile"]), 10, 0))
    return rows


@given(
    waits=st.lists(st.booleans(), min_size=0, max_size=40),
    capacity=st.integers(1, 50),
    mode=st.sampled_from(RingMode),
    cut=st.booleans(),
)
def test_decoding_finds_what_a_ring_kept(
    waits: list[bool], capacity: int, mode: RingMode, cut: bool
) -> None:
    written = make_records(len(waits), waits)
    if cut and written and len(written) > 1 and waits[-1]:
        written = written[:-1]  # the last wait never closed
    dump = write_as_an_engine(written, capacity, mode)
    rings = from_dump(dump)
    assert rings.dropped.tolist() == [max(0, len(written) - capacity)]
    table = decode(rings)
    rows = list(
        zip(*(table[name].to_pylist() for name in ("tile", "dur_ns", "flags")), strict=True)
    )
    assert rows == expected(written, capacity, mode)


@given(
    counts=st.lists(st.integers(0, 12), max_size=6),
    capacity=st.integers(1, 8),
    mode=st.sampled_from(RingMode),
)
def test_a_written_file_reads_back_bit_for_bit(
    counts: list[int], capacity: int, mode: RingMode, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(len(counts))
    headers = np.zeros(len(counts), schema.RING_HEADER)
    headers["count"], headers["capacity"], headers["mode"] = counts, capacity, mode
    headers["magic"] = schema.RING_MAGIC
    raw = rng.integers(0, 256, (len(counts), capacity * schema.RECORD.itemsize), np.uint8)
    dump = Dump(headers, raw.view(schema.RECORD))
    path = tmp_path_factory.mktemp("rings") / "rings.bin"
    with path.open("wb") as file:
        size = write_rings(file, from_dump(dump))
    assert path.stat().st_size == size
    back = read_rings(path)
    assert back.headers.tobytes() == headers.tobytes()
    for i, count in enumerate(counts):
        assert back.stored[i].tobytes() == dump.records[i, : min(count, capacity)].tobytes()


def test_the_file_is_laid_out_as_documented(tmp_path: Path) -> None:
    headers = np.zeros(2, schema.RING_HEADER)
    headers["count"], headers["capacity"] = [3, 1], 2
    records = np.zeros((2, 2), schema.RECORD)
    records["t0_ns"] = [[7, 8], [9, 0]]
    out = io.BytesIO()
    write_rings(out, from_dump(Dump(headers, records)))
    data = out.getvalue()
    assert data[:8] == b"FMOERING"
    assert np.frombuffer(data, "<u4", 4, 8).tolist() == [1, 32, 128, 2]
    assert len(data) == 32 + (128 + 2 * 32) + (128 + 32)
    assert np.frombuffer(data, "<u8", 1, 32 + 128).tolist() == [7]
    assert np.frombuffer(data, "<u8", 1, 32 + 128 + 64).tolist() == [1]  # second ring's count
    assert np.frombuffer(data, "<u8", 1, 32 + 128 + 64 + 128).tolist() == [9]


def written(path: Path) -> bytes:
    dump = write_as_an_engine(make_records(4, [False] * 4), 8, RingMode.KEEP_FIRST)
    with path.open("wb") as file:
        write_rings(file, from_dump(dump))
    return path.read_bytes()


@pytest.mark.parametrize("keep", [0, 5, 31, 32, 100, 160, 287])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "rings.bin"
    path.write_bytes(written(path)[:keep])
    with pytest.raises(FlashmoeError, match="truncated") as found:
        read_rings(path)
    assert found.value.hint


def test_more_rings_than_the_file_can_hold_are_not_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rings.bin"
    data = written(path)
    path.write_bytes(data[:20] + b"\xff\xff\xff\xff" + data[24:])
    monkeypatch.setattr(np, "zeros", lambda *shape: pytest.fail("allocated"))
    with pytest.raises(FlashmoeError, match="truncated"):
        read_rings(path)


def test_a_foreign_and_a_newer_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rings.bin"
    data = written(path)
    path.write_bytes(b"PK" + data[2:])
    with pytest.raises(FlashmoeError, match="not a flashmoe trace"):
        read_rings(path)
    path.write_bytes(data[:8] + (2).to_bytes(4, "little") + data[12:])
    with pytest.raises(FlashmoeError, match="version 2"):
        read_rings(path)
    path.write_bytes(data[:12] + (48).to_bytes(4, "little") + data[16:])
    with pytest.raises(FlashmoeError, match="48 bytes"):
        read_rings(path)


def test_rings_that_never_began_give_no_events() -> None:
    dump = write_as_an_engine(make_records(3, [False] * 3), 8, RingMode.KEEP_FIRST)
    dump.headers["magic"] = 0
    rings = from_dump(dump)
    assert rings.began.tolist() == [False]
    assert decode(rings).num_rows == 0
    assert decode(Rings(np.zeros(0, schema.RING_HEADER), [])).num_rows == 0

"""A PE's part: what goes in comes out, and one that was cut short is none."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from flashmoe.part import Part, read_part, write_part
from flashmoe.trace import schema


def written(path: Path, part: Part) -> int:
    with path.open("wb") as file:
        write_part(file, part)
    return path.stat().st_size


def made_up() -> Part:
    rng = np.random.default_rng(0)
    arrays = {
        "ring_headers": np.frombuffer(rng.bytes(3 * 128), schema.RING_HEADER),
        "ring0": np.frombuffer(rng.bytes(32 * 5), schema.RECORD),
        "ring1": np.zeros(0, schema.RECORD),
        "flight": np.frombuffer(rng.bytes(64 * 2), schema.FLIGHT_SLOT),
        "counts": rng.integers(0, 9, (2, 3, 4)).astype(np.uint32),
        "y": rng.integers(0, 9, (0, 8)).astype(np.uint16),
    }
    return Part({"rank": 3, "message": "ok", "nested": {"list": [1, None, 2.5]}}, arrays)


def test_it_comes_back_whole(tmp_path: Path) -> None:
    part = made_up()
    written(tmp_path / "part", part)
    with (tmp_path / "part").open("rb") as file:
        found = read_part(file)
    assert found is not None
    assert found.report == part.report
    assert list(found.arrays) == list(part.arrays)
    for name, array in part.arrays.items():
        assert found.arrays[name].dtype == array.dtype
        assert found.arrays[name].shape == array.shape
        assert found.arrays[name].tobytes() == array.tobytes()
    found.arrays["counts"][:] = 7  # its own copy: aligning clocks writes into rings
    with (tmp_path / "part").open("rb") as file:
        again = read_part(file)
    assert again is not None
    assert (again.arrays["counts"] == part.arrays["counts"]).all()


@pytest.mark.parametrize("kept", [0, 7, 15, 16, 100, -1, -8, -9, -17])
def test_cut_short_it_is_none(tmp_path: Path, kept: int) -> None:
    size = written(tmp_path / "part", made_up())
    data = (tmp_path / "part").read_bytes()[: kept if kept >= 0 else size + kept]
    (tmp_path / "part").write_bytes(data)
    with (tmp_path / "part").open("rb") as file:
        assert read_part(file) is None


def test_it_starts_at_the_files_start() -> None:
    file = io.BytesIO(b"what was here before")
    file.seek(5)
    write_part(file, Part({}, {}))
    assert file.getvalue()[0] != ord("w")

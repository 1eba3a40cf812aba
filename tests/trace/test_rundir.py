"""The run directory: whole or not at all, never overwritten unasked, and clear when it is wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import synthetic
from flashmoe.errors import FlashmoeError
from flashmoe.trace import rundir, schema
from flashmoe.trace.rundir import COUNTS, PLAN, RunWriter, find_run, list_runs, open_run


@pytest.fixture
def copied(run_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_path, tmp_path / "copied.fmoe"))


def files(path: Path) -> set[str]:
    return {p.name for p in path.iterdir()}


def test_a_run_reads_back_as_it_was_written(run_path: Path, shape: synthetic.Shape) -> None:
    dump, routed, meta = synthetic.make(shape)
    run = open_run(run_path)
    assert files(run_path) == {
        "run.json", "rings.bin", "events.parquet", "plan.parquet", "counts.parquet"
    }  # fmt: skip
    assert {k: run.meta[k] for k in meta} == json.loads(json.dumps(meta))
    assert run.meta["schema"] == rundir.SCHEMA
    assert run.meta["rings"]["n"] == len(dump.headers) == len(run.meta["rings"]["per_ring"])
    assert run.meta["rings"]["dropped"] == 0
    assert run.plan.schema.names == PLAN.names
    assert run.counts.schema.names == COUNTS.names
    assert run.plan.num_rows == shape.iterations * len(routed.tiles)
    rows = run.counts["rows"].to_numpy()
    assert rows.sum() == shape.iterations * routed.chunk_counts.sum()
    assert rows.min() > 0
    assert run.rings.headers.tobytes() == dump.headers.tobytes()
    assert run.flight is None


@pytest.mark.parametrize("known", [128, None])
def test_tiles_of_an_older_run_have_one_height(copied: Path, known: int | None) -> None:
    meta = json.loads((copied / "run.json").read_text())
    meta["world"] |= {"tile_rows": known} if known else {}
    (copied / "run.json").write_text(json.dumps(meta))
    plan = pq.read_table(copied / "plan.parquet").drop_columns("height")
    pq.write_table(plan, copied / "plan.parquet")
    read = open_run(copied).plan
    assert read.schema.field("height") == PLAN.field("height")
    assert read.schema.names == PLAN.names
    height = known or plan["rows"].to_numpy().max()
    assert set(read["height"].to_pylist()) == {height}


def test_times_are_delta_packed_and_columns_zstd(run_path: Path) -> None:
    meta = pq.ParquetFile(run_path / "events.parquet").metadata
    columns = {
        meta.row_group(0).column(i).path_in_schema: meta.row_group(0).column(i)
        for i in range(meta.num_columns)
    }
    assert "DELTA_BINARY_PACKED" in columns["t0_ns"].encodings
    assert "DELTA_BINARY_PACKED" in columns["dur_ns"].encodings
    assert {c.compression for c in columns.values()} == {"ZSTD"}


def test_other_readers_take_the_events_as_they_are(run_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    path = run_path / "events.parquet"
    kinds = dict(duckdb.sql(f"select kind, count(*) from '{path}' group by kind").fetchall())
    assert kinds["gemm1"] > 0
    assert sum(kinds.values()) == open_run(run_path).events.num_rows


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    path = tmp_path / "a.fmoe"
    with RunWriter(path) as out:
        out.meta["command"] = "first"
    with pytest.raises(FlashmoeError, match="exists") as found:
        RunWriter(path)
    assert found.value.exit_code == 2
    assert open_run(path).meta["command"] == "first"
    with RunWriter(path, force=True) as out:
        out.meta["command"] = "second"
    assert open_run(path).meta["command"] == "second"
    assert files(tmp_path) == {"a.fmoe", "latest"}


def test_a_run_that_came_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.fmoe"
    with pytest.raises(FlashmoeError, match="exists already") as found, RunWriter(path) as late:
        late.meta["command"] = "late"
        with RunWriter(path) as early:
            early.meta["command"] = "early"
    assert found.value.exit_code == 2
    assert open_run(path).meta["command"] == "early"
    assert files(tmp_path) == {"a.fmoe", "latest"}


def test_force_replaces_only_runs(tmp_path: Path) -> None:
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "text.tex").write_text("years of work")
    with pytest.raises(FlashmoeError, match="not a run"):
        RunWriter(precious, force=True)
    note = tmp_path / "note.fmoe"
    note.write_text("a file")
    with pytest.raises(FlashmoeError, match="not a run"):
        RunWriter(note, force=True)
    assert (precious / "text.tex").read_text() == "years of work"


def test_an_exception_leaves_a_readable_directory(tmp_path: Path, shape: synthetic.Shape) -> None:
    path = tmp_path / "died.fmoe"
    dump, _, meta = synthetic.make(shape)
    slots = np.zeros(4, schema.FLIGHT_SLOT)
    slots["epoch"] = 7
    with pytest.raises(RuntimeError, match="power"), RunWriter(path) as out:
        out.meta.update({k: v for k, v in meta.items() if k != "status"})
        out.add_rings(dump)
        out.add_flight(slots)
        raise RuntimeError("power failed")
    run = open_run(path)
    assert run.meta["status"] == {"code": 1, "message": "power failed"}
    assert run.events.num_rows > 0
    assert run.plan.num_rows == 0
    assert run.flight is not None
    assert run.flight["epoch"].tolist() == [7] * 4


def test_the_latest_link_names_the_last_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHMOE_RUNS", str(tmp_path))
    with pytest.raises(FlashmoeError, match="no run") as found:
        open_run()
    assert found.value.exit_code == 2
    for name in ("one.fmoe", "two.fmoe"):
        with RunWriter(tmp_path / name):
            pass
    assert open_run().path.name == "two.fmoe"
    assert os.readlink(tmp_path / "latest") == "two.fmoe"
    assert [run.name for run in list_runs()] == ["one.fmoe", "two.fmoe"]
    for name in ("one", "one.fmoe", tmp_path / "one.fmoe"):
        assert find_run(name).name == "one.fmoe"
    with pytest.raises(FlashmoeError) as found:
        open_run("oen")
    assert "one.fmoe" in found.value.hint
    shutil.rmtree(tmp_path / "two.fmoe")
    assert open_run().path.name == "one.fmoe"


def test_without_a_variable_runs_are_sought_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLASHMOE_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    with RunWriter("here.fmoe"):
        pass
    assert open_run().path.name == "here.fmoe"


def test_a_foreign_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlashmoeError, match=r"no run\.json"):
        open_run(tmp_path)
    (tmp_path / "run.json").write_text('{"name": "somebody else\'s"}')
    with pytest.raises(FlashmoeError, match="not a flashmoe run"):
        open_run(tmp_path)
    (tmp_path / "run.json").write_text("[1, 2]")
    with pytest.raises(FlashmoeError, match="not a flashmoe run"):
        open_run(tmp_path)


def test_a_newer_run_is_refused(copied: Path) -> None:
    meta = json.loads((copied / "run.json").read_text()) | {"schema": rundir.SCHEMA + 1}
    (copied / "run.json").write_text(json.dumps(meta))
    with pytest.raises(FlashmoeError, match=f"schema {rundir.SCHEMA + 1}") as found:
        open_run(copied)
    assert "upgrade" in found.value.hint


@pytest.mark.parametrize("name", ["run.json", "events.parquet", "plan.parquet", "rings.bin"])
@pytest.mark.parametrize("keep", [0.0, 0.6])
def test_a_truncated_run_is_refused(copied: Path, name: str, keep: float) -> None:
    path = copied / name
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(FlashmoeError, match="truncated") as found:
        run = open_run(copied)
        for table in ("events", "plan", "rings"):
            getattr(run, table)
    assert name in found.value.message
    assert found.value.hint


def test_events_come_from_the_rings_where_the_table_is_missing(
    copied: Path, run_path: Path
) -> None:
    (copied / "events.parquet").unlink()
    assert open_run(copied).events["flow"].equals(open_run(run_path).events["flow"])
    (copied / "plan.parquet").unlink()
    with pytest.raises(FlashmoeError, match=r"no plan\.parquet"):
        assert open_run(copied).plan


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_and_loses_nothing(
    tmp_path: Path, shape: synthetic.Shape, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "a.fmoe"
    synthetic.write(path, shape)
    before = (path / "run.json").read_bytes()

    def full(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(rundir, "write_rings", full)
    with pytest.raises(FlashmoeError, match="no space left") as found:
        synthetic.write(path, shape, force=True)
    assert found.value.hint
    assert (path / "run.json").read_bytes() == before
    assert files(tmp_path) == {"a.fmoe", "latest"}


def test_a_really_full_device_is_one_sentence(
    tmp_path: Path, shape: synthetic.Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    real = rundir.write_rings

    def to_full(_: object, rings: rundir.Rings) -> int:
        with open("/dev/full", "wb") as file:
            return real(file, rings)

    monkeypatch.setattr(rundir, "write_rings", to_full)
    with pytest.raises(FlashmoeError, match="no space left"):
        synthetic.write(tmp_path / "a.fmoe", shape)
    assert files(tmp_path) == set()


def test_a_folder_without_permission_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refused)  # root may write everywhere
    with pytest.raises(FlashmoeError, match="cannot be written"), RunWriter(tmp_path / "a.fmoe"):
        pass


@pytest.mark.parametrize("name", ["", "latest"])
def test_some_names_are_no_names(name: str) -> None:
    with pytest.raises(FlashmoeError, match="cannot be called"):
        RunWriter(name)

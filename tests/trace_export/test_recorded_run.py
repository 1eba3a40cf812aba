"""A run of the host engine, from recording to SQL: the export's sums are those of `traffic`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flashmoe._host")

from flashmoe.trace.export import FORMATS

from .trace_processor import Loaded


def flashmoe(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "flashmoe_cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run.fmoe"
    shape = ("tiny", "-T", "70", "--world", "host", "--ranks", "3", "-n", "2")
    flashmoe("trace", *shape, "-o", path)
    return path


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_sql_over_the_export_gives_what_traffic_prints(
    format: str, run: Path, tmp_path: Path
) -> None:
    flashmoe("export", run, "--format", format, "-o", tmp_path / "out")
    traffic = json.loads(flashmoe("traffic", run, "--json"))
    trace = Loaded(tmp_path / "out")
    assert trace.complaints() == []
    prefix = "debug" if format == "perfetto" else "args"
    rows = trace.sql(f"""
      with owner as (
        select id, upid from process_track
        union all select thread_track.id, upid from thread_track join thread using (utid))
      select pid - 1 as source, extract_arg(slice.arg_set_id, '{prefix}.peer') as peer,
             sum(extract_arg(slice.arg_set_id, '{prefix}.bytes')) as bytes
      from slice join owner on slice.track_id = owner.id join process using (upid)
      where slice.name in ('dispatch', 'put') group by source, peer""")
    matrix = np.zeros((3, 3), int)
    for source, peer, moved in rows:
        matrix[source, peer] = moved
    assert matrix.tolist() == traffic["matrix_bytes"]
    assert matrix.sum() - np.trace(matrix) == traffic["payload_bytes"]
    # Launches are told apart, and nothing but instants lies deeper than in one.
    iterations = trace.sql(
        f"select distinct extract_arg(arg_set_id, '{prefix}.iter') as iter from slice order by iter"
    )
    assert iterations == [(0,), (1,)]
    assert trace.sql("select max(depth) from slice where dur > 0") == [(1,)]
    assert trace.sql("select count(*) > 0 from flow") == [(1,)]

"""Traffic: bytes follow from the routing, to the byte."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import synthetic
from flashmoe.trace.rundir import Run, open_run
from flashmoe.trace.traffic import CAPACITY_FACTOR, alternatives, traffic_summary


def owners(shape: synthetic.Shape) -> np.ndarray:
    owner = np.zeros(shape.experts, int)
    for rank in range(shape.ranks):
        owner[shape.first_expert(rank) : shape.first_expert(rank + 1)] = rank
    return owner


def by_owner(shape: synthetic.Shape) -> np.ndarray:
    """Rows [source, owner] of one launch."""
    _, routed, _ = synthetic.make(shape)
    rows = routed.chunk_counts.sum(axis=1)
    owner = owners(shape)
    return np.stack([rows[:, owner == r].sum(axis=1) for r in range(shape.ranks)], axis=1)


@pytest.fixture(scope="module")
def run(run_path: Path) -> Run:
    return open_run(run_path)


def test_the_matrix_is_what_the_counts_say(run: Run, shape: synthetic.Shape) -> None:
    got = traffic_summary(run)
    one_way = by_owner(shape).astype(np.int64) * shape.hidden * 2 * shape.iterations
    assert got["dispatch_bytes"] == one_way.tolist()
    assert got["return_bytes"] == one_way.T.tolist()
    both = one_way + one_way.T
    assert got["matrix_bytes"] == both.tolist()
    assert got["payload_bytes"] == both.sum() - np.trace(both)
    assert got["local_bytes"] == np.trace(both)
    assert got["payload_bytes"] == got["alternatives"]["expected"]["bytes"]
    assert sum(got["rate"]["bytes"]) == got["payload_bytes"]
    assert got["rate"]["peak_gb_per_s"] == max(got["rate"]["gb_per_s"])
    json.dumps(got)


def test_counts_that_no_record_has_make_their_bytes_a_bound(
    run: Run, shape: synthetic.Shape, tmp_path: Path
) -> None:
    each = 8 * shape.experts * shape.ranks**2
    whole = traffic_summary(run)
    assert whole["counts_bytes"] == each * shape.iterations and not whole["counts_bounds"]
    assert traffic_summary(run, 1)["counts_bytes"] == each
    assert not traffic_summary(run, 1)["counts_bounds"]
    # More experts than five times the CTAs: warps that lead no lane send some.
    many = dataclasses.replace(shape, experts=5 * shape.sms + 1)
    synthetic.write(tmp_path / "many.fmoe", many)
    got = traffic_summary(open_run(tmp_path / "many.fmoe"))
    assert 0 < got["counts_bytes"] < 8 * many.experts * shape.ranks**2 * shape.iterations
    assert got["counts_bounds"]


def test_one_iteration_is_its_share(run: Run, shape: synthetic.Shape) -> None:
    each = [traffic_summary(run, i) for i in range(shape.iterations)]
    whole = traffic_summary(run)
    assert len({e["payload_bytes"] for e in each}) == 1
    assert sum(e["payload_bytes"] for e in each) == whole["payload_bytes"]
    assert sum(e["span_ns"] for e in each) < whole["span_ns"]
    for e in each:
        assert e["mean_gb_per_s"] == pytest.approx(e["payload_bytes"] / e["span_ns"])
        assert e["alternatives"]["expected"]["bytes"] == e["payload_bytes"]


def test_padding_and_capacity_send_what_their_definition_says() -> None:
    counts = {
        "iter": np.array([0, 0, 0, 1]),
        "source": np.array([0, 0, 1, 0]),
        "chunk": np.array([0, 1, 0, 0]),
        "expert": np.array([2, 2, 0, 3]),
        "rows": np.array([3, 2, 9, 4]),
    }
    plan = {
        "iter": np.array([0, 0, 0, 0, 1, 0]),
        "expert": np.array([0, 0, 2, 2, 3, 2]),
        "gemm": np.array([1, 1, 1, 1, 1, 2]),
        "col_tile": np.array([0, 0, 0, 1, 0, 0]),
        "height": np.array([4, 1, 8, 99, 16, 99]),
    }
    got = alternatives(
        counts, [[0, 2], [2, 4]], tokens=[8, 8], experts=4, top_k=1, row_bytes=10, plan=plan
    )
    # Crossing: (launch 0, rank 0 -> expert 2): 5 rows; (0, 1 -> 0): 9; (1, 0 -> 3): 4.
    assert got["expected"]["bytes"] == 18 * 20
    # In tiles of 8, 4 and 16 rows.
    assert got["padded"]["bytes"] == (8 + 12 + 16) * 20
    assert got["padded"]["tile_rows"] == [4, 16]
    buffer = int(np.ceil(CAPACITY_FACTOR * 8 * 1 / 4))
    assert got["capacity"]["rows_per_expert"] == buffer == 3
    assert got["capacity"]["bytes"] == 2 * (2 * 2) * buffer * 20
    assert got["capacity"]["rows_dropped"] == 2 + 6 + 1
    assert got["capacity_lossless"]["rows_per_expert"] == 9
    assert got["capacity_lossless"]["bytes"] == 2 * 4 * 9 * 20


def test_uneven_experts_and_one_rank(tmp_path: Path, shape: synthetic.Shape) -> None:
    odd = dataclasses.replace(shape, ranks=3, experts=7, iterations=1)
    synthetic.write(tmp_path / "odd.fmoe", odd)
    got = traffic_summary(open_run(tmp_path / "odd.fmoe"))
    assert np.array(got["dispatch_bytes"]).sum() == odd.ranks * odd.tokens * odd.top_k * 128
    assert got["payload_bytes"] == got["alternatives"]["expected"]["bytes"] > 0
    alone = dataclasses.replace(shape, ranks=1, iterations=1)
    synthetic.write(tmp_path / "alone.fmoe", alone)
    got = traffic_summary(open_run(tmp_path / "alone.fmoe"))
    assert got["payload_bytes"] == 0
    assert got["local_bytes"] == 2 * alone.tokens * alone.top_k * 128


def test_dropped_records_make_it_a_bound(tmp_path: Path, shape: synthetic.Shape) -> None:
    cut = dataclasses.replace(shape, capacity=20)
    synthetic.write(tmp_path / "cut.fmoe", cut)
    got = traffic_summary(open_run(tmp_path / "cut.fmoe"))
    assert got["bounds"]
    assert got["payload_bytes"] < got["alternatives"]["expected"]["bytes"]

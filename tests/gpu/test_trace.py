"""What a traced launch leaves behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashmoe.config import MoEConfig
from flashmoe.presets import PRESETS
from flashmoe.trace import schema
from flashmoe.trace.decode import decode
from flashmoe.trace.rings import from_dump
from flashmoe.world.base import EngineOptions

from .layers import SMALL, deal, engine_for, forward, inputs


# mixtral's last tiles take a quarter of a ms, at another clock than the launch in the mean.
@pytest.mark.parametrize(
    ("config", "tokens", "ranks"),
    [(SMALL, 300, 2), (PRESETS["mixtral"].config, 8192, 1)],
    ids=["small", "mixtral"],
)
def test_every_actor_accounts_for_its_time(config: MoEConfig, tokens: int, ranks: int) -> None:
    weights, x = inputs(config, tokens)
    options = EngineOptions(ranks=ranks, traced=True, deadline_s=5.0)
    engine = engine_for(config, weights, deal(x, ranks), options)
    forward(engine)
    engine.reset_rings()
    for _ in range(3):
        forward(engine)
    dump = engine.rings()
    assert (dump.headers["magic"] == schema.RING_MAGIC).all()
    assert (dump.headers["count"] <= dump.headers["capacity"]).all()
    flags = decode(from_dump(dump)).column("flags").to_numpy()
    assert not (flags & schema.RecordFlag.OPEN).any(), "a wait's end is not where its begin is"
    launch = schema.EventKind.LAUNCH
    for header, ring in zip(dump.headers, dump.records, strict=True):
        records = ring[: header["count"]]
        assert (records["iter"][records["kind"] == launch] == [0, 1, 2]).all()
        for iteration in range(3):
            mine = records[records["iter"] == iteration]
            whole = mine[mine["kind"] == launch][0]
            spans = mine[(mine["kind"] != launch) & (mine["flags"] & schema.RecordFlag.OPEN == 0)]
            spans = np.sort(spans, order="t0_ns")
            ends = spans["t0_ns"] + spans["dur_ns"]
            assert (ends[:-1] <= spans["t0_ns"][1:]).all(), "spans of an actor overlap"
            assert (spans["t0_ns"] >= whole["t0_ns"]).all()
            assert (ends <= whole["t0_ns"] + whole["dur_ns"]).all()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_payload_is_what_the_ids_imply(ranks: int) -> None:
    config = PRESETS["qwen3-30b"].config
    weights, x = inputs(config, 600)
    parts = deal(x, ranks)
    engine = engine_for(
        config, weights, parts, EngineOptions(ranks=ranks, traced=True, deadline_s=5.0)
    )
    result = forward(engine)
    records = engine.rings()
    counted = np.zeros((ranks, ranks), np.int64)
    of_counts = 0
    for header, ring in zip(records.headers, records.records, strict=True):
        events = ring[: header["count"]]
        of_counts += int(events["aux"][events["kind"] == schema.EventKind.COUNTS].sum())
        for kind in (schema.EventKind.DISPATCH, schema.EventKind.PUT):
            moved = events[events["kind"] == kind]
            np.add.at(counted[header["rank"]], moved["peer"], moved["aux"].astype(np.int64))
    expected = np.zeros((ranks, ranks), np.int64)
    owner = torch.arange(config.experts) * ranks // config.experts  # E divides by W here
    at = 0
    for source, part in enumerate(parts):
        for expert in result.ids[at : at + len(part)].flatten().tolist():
            expected[source, owner[expert]] += config.row_bytes  # there
            expected[owner[expert], source] += config.row_bytes  # and back
        at += len(part)
    np.testing.assert_array_equal(counted, expected)
    assert of_counts == 8 * config.experts * ranks**2


def test_clock_is_measured() -> None:
    weights, x = inputs(SMALL, 10)
    engine = engine_for(SMALL, weights, [x], EngineOptions(traced=True))
    clock = engine.clock()
    assert 1 <= clock.step_ns <= 2000
    assert 0 < clock.record_cost_ns < 2000
    assert clock.sm_mhz is not None and 200 < clock.sm_mhz < 4000

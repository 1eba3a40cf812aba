"""Few tokens of a rank alone, which go by units: the same bits, the same trace, the same words."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import flashmoe
from flashmoe.config import MoEConfig, Routing
from flashmoe.presets import PRESETS
from flashmoe.trace import schema
from flashmoe.world.base import EngineOptions, Fault, Status
from flashmoe.world.kernel import tile_family, unit_family

from .layers import by_activation, deal, engine_for, forward, hold_to_reference, inputs

SMALL = MoEConfig(hidden=512, intermediate=256, experts=8, top_k=2)
LAYERS = {
    **by_activation(SMALL),
    # Neither the last unit of GEMM1 nor that of GEMM2 is whole.
    "320x320": replace(SMALL, hidden=320, intermediate=320, activation="relu"),
    "320x320 gated": replace(SMALL, hidden=320, intermediate=320),
    "one expert": replace(SMALL, experts=1, top_k=1),
    "eight of three hundred": replace(SMALL, experts=300, top_k=8),
    "eight of nine": replace(SMALL, experts=9, top_k=8),
    "sigmoid": MoEConfig(512, 256, 64, 4, routing=Routing("sigmoid", True, 2.5, 8, 4)),
    "qwen3-30b": PRESETS["qwen3-30b"].config,
    "mixtral": PRESETS["mixtral"].config,
}


def most(config: MoEConfig) -> int:
    """The most tokens that go by units."""
    return min(8, 64 // config.top_k)


@pytest.mark.parametrize("layer", LAYERS)
def test_bits_are_those_of_tiles(layer: str) -> None:
    """Among more tokens, over two ranks, and where one copies its rows, a token goes by tiles."""
    config = LAYERS[layer]
    weights, x = inputs(config, 40)
    whole = forward(engine_for(config, weights, [x]))
    for tokens in sorted({1, 2, most(config) - 1, most(config)}):
        engine = engine_for(config, weights, [x[:tokens]])
        assert engine.family == unit_family()
        few = forward(engine)
        output, routing = hold_to_reference(few, x[:tokens], weights, config)
        assert output.ok and routing is not None and routing.ok, (output, routing)
        assert torch.equal(few.ids, whole.ids[:tokens])
        assert torch.equal(few.y.view(torch.int16), whole.y[:tokens].view(torch.int16))
        engine.close()
        for ranks in (2, 1):
            options = EngineOptions(ranks=ranks, deadline_s=5.0, in_place=False)
            tiles = engine_for(config, weights, deal(x[:tokens], ranks), options)
            assert tiles.family == tile_family(config.dtype)
            assert torch.equal(forward(tiles).y.view(torch.int16), few.y.view(torch.int16))
            tiles.close()


def test_many_launches_of_few_tokens_agree() -> None:
    config = PRESETS["qwen3-30b"].config
    weights, x = inputs(config, 8)
    engine = engine_for(config, weights, [x])
    seen = {forward(engine).y.view(torch.int16).numpy().tobytes() for _ in range(2000)}
    engine.close()
    assert len(seen) == 1


def test_calls_of_few_and_of_many_tokens_take_turns() -> None:
    """They count in the same words, of which each launch clears the next one's."""
    weights, x = inputs(SMALL, 300)
    layer = flashmoe.MoE(SMALL, weights, max_tokens=300)
    alone = {n: layer(x[:n]).clone() for n in (1, 8, 9, 300)}
    layer.check()
    for n in (8, 300, 1, 8, 9, 8, 8, 300, 300, 1, 9, 1, 1, 8):
        assert torch.equal(layer(x[:n]).view(torch.int16), alone[n].view(torch.int16)), n
    layer.check()
    assert torch.equal(alone[8].view(torch.int16), alone[300][:8].view(torch.int16))


@pytest.mark.parametrize("preset", ["small", "qwen3-30b", "mixtral", "paper"])
def test_the_trace_holds_every_unit_once(preset: str) -> None:
    config = SMALL if preset == "small" else PRESETS[preset].config
    tokens = most(config)
    weights, x = inputs(config, tokens)
    engine = engine_for(config, weights, [x], EngineOptions(traced=True, deadline_s=5.0))
    result = forward(engine)
    dump, plan = engine.rings(), engine.routing().tiles
    assert set(plan["family"]) == {unit_family()}
    assert int(plan["rows"][(plan["gemm"] == 1) & (plan["col_tile"] == 0)].sum()) == (
        result.ids.numel()
    )
    kinds = schema.EventKind
    ran = np.zeros(len(plan), np.int64)
    put = summed = of_counts = announced = 0
    for header, ring in zip(dump.headers, dump.records, strict=True):
        events = ring[: header["count"]]
        for kind in (kinds.GATE, kinds.PLAN, kinds.LAUNCH):
            assert int((events["kind"] == kind).sum()) == 1, kind
        for gemm, kind in ((1, kinds.GEMM1), (2, kinds.GEMM2)):
            mine = events[events["kind"] == kind]
            np.add.at(ran, mine["tile"], 1)
            assert (plan["gemm"][mine["tile"]] == gemm).all()
            assert (plan["expert"][mine["tile"]] == mine["expert"]).all()
        put += int(events["aux"][events["kind"] == kinds.PUT].sum())
        summed += int(events["aux"][events["kind"] == kinds.COMBINE].sum())
        of_counts += int(events["aux"][events["kind"] == kinds.COUNTS].sum())
        announced += int(events["aux"][events["kind"] == kinds.DISPATCH].sum())
        spans = events[(events["flags"] & schema.RecordFlag.OPEN == 0)]
        spans = np.sort(spans[spans["kind"] != kinds.LAUNCH], order="t0_ns")
        assert (spans["t0_ns"][:-1] + spans["dur_ns"][:-1] <= spans["t0_ns"][1:]).all()
    assert (ran == 1).all()
    assert put == announced == result.ids.numel() * config.row_bytes
    assert (summed, of_counts) == (tokens, 8 * config.experts)
    engine.close()


def test_a_fault_that_units_do_not_know_goes_by_tiles() -> None:
    weights, x = inputs(SMALL, 8)
    expert = int(forward(engine_for(SMALL, weights, [x])).ids[0, 0])
    options = EngineOptions(
        deadline_s=0.2, first_deadline_s=0.2, faults=(Fault("lost-signal", 0, expert=expert),)
    )
    engine = engine_for(SMALL, weights, [x], options)
    assert engine.family == tile_family(SMALL.dtype)
    assert engine.launch().status is Status.HANG
    engine.close()

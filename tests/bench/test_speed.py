"""A whole bench on a CPU: what a result holds, and what becomes of peers that fail."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from flashmoe.bench import gate
from flashmoe.bench.peers import PEERS, Case, PeerOptions, chosen
from flashmoe.bench.shapes import Shape
from flashmoe.bench.speed import SpeedOptions, bench_shape
from flashmoe.bench.stopwatch import in_turn
from flashmoe.config import MoEConfig, Routing
from flashmoe.errors import FlashmoeError
from flashmoe.numerics import check_output
from flashmoe.presets import PRESETS
from flashmoe.reference import route
from flashmoe.tokens import random_tokens
from flashmoe.weights import random_weights

from .fakes import TorchEngine, TorchLayer, machine, peers, quiet

TINY = Shape("tiny", PRESETS["tiny"].config, 24)


def bench(*names: str, shape: Shape = TINY, **more: Any) -> dict[str, Any]:
    return bench_shape(shape, machine(), SpeedOptions(3, peers(*names), **more), quiet)


def test_a_result_holds_what_its_readers_look_for() -> None:
    result = bench("good")
    assert (result["preset"], result["T"]) == ("tiny", 24)
    for name in ("ours_ms", "layer_ms", "dense_ms", "floor_ms", "gate_ms"):
        assert result[name] > 0
    assert result["error"] is None
    assert 0 < result["of_bound"] <= 1
    assert result["copy_gb_per_s"] == pytest.approx(10)
    assert list(result["seconds"]) == [
        "weights", "first launch", "check", "gate", "graphs", "layer", "good", "timing",
        "check again",
    ]  # fmt: skip
    assert sum(result["seconds"].values()) > 0
    assert result["peers"]["good"] > 0
    details = result["peer_details"]["good"]
    assert (details["state"], details["version"], details["settings"]) == (
        "ok", "fake 1.0", {"block": 3},
    )  # fmt: skip
    assert details["q1_ms"] <= result["peers"]["good"] <= details["q3_ms"]
    assert details["rounds"] == 3
    assert not details["graph"]
    assert result["spread"]["ours"]["q1_ms"] <= result["ours_ms"]
    assert result["clocks"]["sm_clock_mhz"] == 1700
    json.dumps(result, allow_nan=False)


def test_a_gate_that_does_not_compile_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashmoe.bench import speed

    def broken(function: Any) -> Any:
        def call(*args: Any) -> Any:
            raise RuntimeError("no C compiler")

        return call

    monkeypatch.setattr(speed, "compiled", broken)
    result = bench("good")
    assert result["gate_not_compiled"] == "RuntimeError: no C compiler"
    assert result["gate_ms"] > 0
    assert result["peers"]["good"] > 0
    monkeypatch.undo()
    assert bench("good")["gate_not_compiled"] is None


def test_ratios_follow_from_the_medians() -> None:
    result = bench("good", "other")
    assert result["dense_over_ours"] == pytest.approx(result["dense_ms"] / result["ours_ms"])
    assert result["floor_over_ours"] == pytest.approx(result["floor_ms"] / result["ours_ms"])
    over = (result["ours_ms"] - result["floor_ms"]) * 1e3
    assert result["over_floor_us"] == pytest.approx(over)
    best = min(result["peers"], key=result["peers"].__getitem__)
    assert result["best_peer"] == best
    ratio = result["peers"][best] / result["ours_ms"]
    assert result["best_peer_over_ours"] == pytest.approx(ratio)


def test_the_floor_counts_the_experts_that_were_hit() -> None:
    one = Shape("tiny", PRESETS["tiny"].config, 1)
    result = bench(shape=one)
    assert result["experts_hit"] == 2
    # 2 experts x 3 matrices x 64 x 96 x 2 bytes at 10 GB/s
    assert result["floor_ms"] == pytest.approx(2 * 3 * 64 * 96 * 2 / 1e10 * 1e3)


@pytest.mark.parametrize(
    ("name", "state", "reason"),
    [
        ("absent", "unavailable", "not installed"),
        ("breaks-at-build", "failed", "RuntimeError: no such kernel"),
        ("breaks-when-run", "failed", "ValueError: shapes do not fit"),
        ("loses-a-row", "wrong", "times our bound"),
        ("not-finite", "wrong", "1 values that are not finite"),
    ],
)
def test_a_peer_that_fails_is_a_line_and_not_the_end(name: str, state: str, reason: str) -> None:
    result = bench(name, "good")
    assert result["peers"][name] is None
    details = result["peer_details"][name]
    assert details["state"] == state
    assert reason in details["reason"]
    assert result["best_peer"] == "good"
    assert result["error"] is None


@pytest.mark.parametrize(
    ("spoil", "after", "says"),
    [
        ("wrong", 0, "wrong result"),
        ("hang", 0, "our launch ended with HANG"),
        ("wrong", 1, "results differ before and after timing"),
        ("hang", 1, "after timing our launch ended with HANG"),
    ],
)
def test_ours_is_held_to_the_reference_before_and_after(
    monkeypatch: pytest.MonkeyPatch, spoil: str, after: int, says: str
) -> None:
    monkeypatch.setattr(TorchEngine, "spoil", spoil)
    monkeypatch.setattr(TorchEngine, "spoil_after", after)
    assert bench_shape(TINY, machine(), SpeedOptions(2), quiet)["error"] == says


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ("wrong", "the layer's result is not the engine's"),
        ("fails when timed", "the layer: a call failed"),
    ],
)
def test_the_layer_is_held_to_the_engine(
    monkeypatch: pytest.MonkeyPatch, spoil: str, says: str
) -> None:
    monkeypatch.setattr(TorchLayer, "spoil", spoil)
    assert bench()["error"] == says


def test_a_layer_without_room_is_said_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchLayer, "spoil", "no room")
    result = bench()
    assert result["error"] is None
    assert result["layer_ms"] is None
    assert result["why_no_layer"] == "the heap needs more than there is"
    assert result["ours_ms"] > 0


def test_every_round_has_every_work_once_and_orders_differ() -> None:
    orders = [tuple(in_turn(5, turn)) for turn in range(40)]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert {order[0] for order in orders} == set(range(5))
    assert len(set(orders)) > 20
    assert in_turn(0, 3) == []


def test_peers_by_name() -> None:
    assert [p.name for p in chosen("all")] == list(PEERS)
    assert chosen("none") == []
    assert [p.name for p in chosen("liger, grouped-mm,liger")] == ["liger", "grouped-mm"]
    with pytest.raises(FlashmoeError, match="no peer 'vllm'") as caught:
        chosen("liger,vllm")
    assert "vllm-triton" in caught.value.hint


@pytest.mark.parametrize("name", ["liger", "sglang", "deepgemm"])
def test_packages_that_are_not_there_are_said_not_to_be(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for module in ("liger_kernel", "sglang", "deep_gemm"):
        monkeypatch.setitem(sys.modules, module, None)
    result = bench_shape(TINY, machine(), SpeedOptions(1, (PEERS[name],)), quiet)
    assert result["peers"] == {name: None}
    assert result["peer_details"][name]["state"] == "unavailable"


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_grouped_mm_computes_the_layer(activation: str) -> None:
    config = MoEConfig(64, 96, 8, 3, activation=activation)  # type: ignore[arg-type]
    weights, (x,) = random_weights(config, 0), random_tokens([50], config, 0)
    case = Case(config, weights, x, gate.gate_of(config, weights))
    try:
        y, ids, chosen_weights = PEERS["grouped-mm"].build(case, PeerOptions()).forward()
    except (RuntimeError, NotImplementedError) as exc:
        pytest.skip(f"this torch has no grouped_mm on a CPU: {exc}")
    assert check_output(y, x, weights, config, ids, chosen_weights).max_ratio < 2


@pytest.mark.parametrize(
    "routing",
    [
        Routing(),
        Routing(renormalize=False, scale=2.0),
        Routing("sigmoid", scale=2.5),
        Routing("sigmoid", groups=4, top_groups=2),
    ],
)
def test_the_peers_gate_is_the_layers(routing: Routing) -> None:
    config = MoEConfig(64, 32, 16, 3, dtype="fp16", routing=routing)
    weights, (x,) = random_weights(config, 0), random_tokens([400], config, 0)
    ids, chosen_weights = gate.gate_of(config, weights)(x)
    assert ids.dtype == torch.int32
    expected = route(x, weights, config)
    same = (ids.sort(dim=1).values == expected.ids.sort(dim=1).values).all(dim=1)
    assert same.float().mean() > 0.9  # logits are rounded: near ties fall either way
    mine = chosen_weights.sum(dim=1)[same]
    assert torch.allclose(mine, expected.weights.sum(dim=1)[same], rtol=0.02)

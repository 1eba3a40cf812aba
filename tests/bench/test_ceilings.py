"""The floor, the dense pair's FLOPs, and the suites they are figured for."""

from __future__ import annotations

import pytest
import torch

from flashmoe.bench.ceilings import DensePair, expert_bytes, floor_ms, flop
from flashmoe.bench.shapes import SUITES, suite
from flashmoe.config import MoEConfig
from flashmoe.errors import FlashmoeError
from flashmoe.presets import PRESETS
from flashmoe.weights import random_weights


@pytest.mark.parametrize("name", ["tiny", "paper"])
def test_bytes_of_an_expert_are_those_of_its_tensors(name: str) -> None:
    config = MoEConfig(64, 96, 8, 2, activation=PRESETS[name].config.activation)
    weights = random_weights(config, 0)
    held = weights.up[0].nbytes + weights.down[0].nbytes
    assert expert_bytes(config) == held


def test_floor_is_bytes_of_the_experts_hit_over_the_rate() -> None:
    config = PRESETS["qwen3-30b"].config
    # 3 matrices x 2048 x 768 x 2 bytes = 9.4 MB an expert
    assert floor_ms(config, 128, 4.3e12) == pytest.approx(128 * 9437184 / 4.3e12 * 1e3)
    assert floor_ms(config, 64, 4.3e12) == pytest.approx(floor_ms(config, 128, 4.3e12) / 2)
    assert floor_ms(config, 0, 4.3e12) == 0


def test_flop_counts_both_gemms_and_both_of_the_gated_projections() -> None:
    assert flop(MoEConfig(16, 8, 4, 2), rows=3) == 2 * 3 * 16 * (2 * 8 + 8)
    assert flop(MoEConfig(16, 8, 4, 2, activation="relu"), rows=3) == 2 * 3 * 16 * (8 + 8)


def test_the_dense_pair_multiplies_what_it_says() -> None:
    pair = DensePair(MoEConfig(16, 8, 4, 2), 6, torch.device("cpu"))
    pair()
    assert pair._of_up.shape == (6, 16)
    assert torch.allclose(pair._of_down, pair._h @ pair._down.t())


def test_the_suite_holds_every_shape_of_the_performance_page() -> None:
    shapes = [(s.preset, s.tokens) for s in suite("h200")]
    assert len(shapes) == len(set(shapes)) == 13
    assert ("mixtral", 8192) in shapes
    assert ("deepseek-v3-ep8", 128) in shapes
    assert ("paper", 16384) in shapes
    for shape in (*SUITES["h200"], *SUITES["latency"]):
        shape.config.validate()


def test_an_unknown_suite_is_refused() -> None:
    with pytest.raises(FlashmoeError, match="no suite 'h100'") as caught:
        suite("h100")
    assert caught.value.exit_code == 2
    assert "h200" in caught.value.hint

"""The reference against slower and simpler statements of the same thing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.config import MoEConfig, MoEWeights, Routing
from flashmoe.errors import FlashmoeError
from flashmoe.presets import PRESETS
from flashmoe.reference import ACTIVATIONS, choose, full_float32, mlp, moe, ranked, route
from flashmoe.tokens import random_tokens
from flashmoe.weights import random_weights

TINY = PRESETS["tiny"].config

# Few values, so that ties are common; NaN and the infinities among them.
SCORES = st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.0, math.inf, -math.inf, math.nan])


def _key(score: float, expert: int) -> tuple[bool, float, int]:
    return (math.isnan(score), 0.0 if math.isnan(score) else -score, expert)


@settings(max_examples=200, deadline=None)
@given(st.lists(SCORES, min_size=1, max_size=12), st.data())
def test_ranking_ties_to_the_lower_id_and_nan_last(
    scores: list[float], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(scores)))
    expected = sorted(range(len(scores)), key=lambda e: _key(scores[e], e))[:k]
    assert ranked(torch.tensor([scores]), k)[0].tolist() == expected


def _choose_slowly(scores: list[float], config: MoEConfig) -> list[int]:
    """Group-limited top-k, one token, in the words of the DeepSeek-V3 report."""
    groups, size = config.routing.groups, config.experts // config.routing.groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]

    def group_score(g: int) -> float:
        best = sorted(members[g], key=lambda e: _key(scores[e], e))[:2]
        return sum(scores[e] for e in best)

    by_group = [group_score(g) for g in range(groups)]
    taking_part = sorted(range(groups), key=lambda g: _key(by_group[g], g))
    candidates = [e for g in taking_part[: config.routing.top_groups] for e in members[g]]
    return sorted(candidates, key=lambda e: _key(scores[e], e))[: config.top_k]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_group_limited_choice(data: st.DataObject) -> None:
    groups, size = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 4))
    top_groups = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, top_groups * size))
    routing = Routing("sigmoid", groups=groups, top_groups=top_groups)
    config = MoEConfig(8, 8, groups * size, top_k, routing=routing)
    config.validate()
    finite = st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.0, math.nan])
    scores = data.draw(st.lists(finite, min_size=config.experts, max_size=config.experts))
    assert choose(torch.tensor([scores]), config)[0].tolist() == _choose_slowly(scores, config)


def _weights_for(
    logits: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, MoEWeights]:
    """x and a gate whose logits are exactly ``logits`` [T, E] (values that bf16 holds)."""
    experts = logits.shape[1]
    gate = torch.eye(experts, dtype=torch.bfloat16)
    empty = torch.empty(0)
    return logits.bfloat16(), MoEWeights(gate=gate, bias=bias, up=empty, down=empty)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_softmax_weights(renormalize: bool, scale: float) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -3.0, 0.5, 0.25, -1.0, 1.5]])
    routing = Routing(renormalize=renormalize, scale=scale)
    x, weights = _weights_for(logits)
    routed = route(x, weights, MoEConfig(8, 8, 8, 3, routing=routing))
    assert routed.ids.tolist() == [[1, 7, 2]] and routed.ids.dtype == torch.int32
    shares = np.exp(logits[0].double().numpy())
    shares /= shares.sum()
    expected = shares[[1, 7, 2]]
    expected = scale * (expected / expected.sum() if renormalize else expected)
    np.testing.assert_allclose(routed.weights[0].numpy(), expected, rtol=1e-6)


def test_sigmoid_weights_leave_the_bias_out() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -3.0]])
    bias = torch.tensor([1.0, 0.0, -1.0, 0.0])
    x, weights = _weights_for(logits, bias)
    config = MoEConfig(8, 8, 4, 2, routing=Routing("sigmoid", scale=2.5))
    routed = route(x, weights, config)
    assert routed.ids.tolist() == [[0, 1]]
    rates = 1 / (1 + np.exp(-logits[0].double().numpy()[:2]))
    np.testing.assert_allclose(routed.weights[0].numpy(), 2.5 * rates / rates.sum(), rtol=1e-6)
    plain = replace(config, routing=Routing("sigmoid", renormalize=False))
    np.testing.assert_allclose(route(x, weights, plain).weights[0].numpy(), rates, rtol=1e-6)


def test_logits_are_not_rounded_to_the_dtype() -> None:
    # 256 and 256 + 1 are one number in bf16; only a float32 sum tells the experts apart.
    gate = torch.zeros(2, 16, dtype=torch.bfloat16)
    gate[:, 0] = 256.0
    gate[1, 1] = 1.0
    x = torch.ones(1, 16, dtype=torch.bfloat16)
    weights = MoEWeights(gate=gate, bias=None, up=gate, down=gate)
    routed = route(x, weights, MoEConfig(16, 8, 2, 1))
    assert routed.ids.tolist() == [[1]]
    assert routed.scores.tolist() == [[256.0, 257.0]]


def test_external_routing_has_no_gate() -> None:
    config = replace(TINY, routing=Routing("external"))
    weights = random_weights(config)
    with pytest.raises(FlashmoeError, match="no gate"):
        route(torch.zeros(1, config.hidden), weights, config)


def _activate(name: str, gate: float, up: float) -> float:
    silu = gate / (1 + math.exp(-gate))
    tanh = 0.5 * gate * (1 + math.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    exact = 0.5 * gate * (1 + math.erf(gate / math.sqrt(2)))
    return {
        "swiglu": silu * up,
        "geglu": tanh * up,
        "relu": max(gate, 0.0),
        "gelu": exact,
        "silu": silu,
    }[name]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layer_element_by_element(activation: str) -> None:
    config = MoEConfig(8, 16, 3, 2, activation=activation)  # type: ignore[arg-type]
    weights = random_weights(config, seed=5)
    (x,) = random_tokens([3], config, seed=2)
    routed = route(x, weights, config)
    y = moe(x, weights, config, routed.ids, routed.weights)
    up, down = weights.up.double().numpy(), weights.down.double().numpy()
    expected = np.zeros((3, 8))
    for token in range(3):
        for slot in range(2):
            expert = int(routed.ids[token, slot])
            projected = up[expert] @ x[token].double().numpy()
            hidden = [
                _activate(activation, projected[i], projected[(16 + i) % len(projected)])
                for i in range(16)
            ]
            share = float(routed.weights[token, slot])
            expected[token] += share * (down[expert] @ np.array(hidden))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_no_tokens() -> None:
    weights = random_weights(TINY)
    x = torch.zeros(0, TINY.hidden, dtype=torch.bfloat16)
    routed = route(x, weights, TINY)
    assert routed.ids.shape == (0, 2)
    assert moe(x, weights, TINY, routed.ids, routed.weights).shape == (0, TINY.hidden)


def test_dense_block_is_an_expert_that_all_tokens_pass() -> None:
    config = MoEConfig(64, 96, 1, 1)
    weights = random_weights(config)
    (x,) = random_tokens([5], config)
    ids, ones = torch.zeros(5, 1, dtype=torch.int32), torch.ones(5, 1)
    dense = mlp(x, weights.up[0, :96], weights.up[0, 96:], weights.down[0])
    torch.testing.assert_close(dense, moe(x, weights, config, ids, ones))


def test_no_tf32_inside_and_the_processs_choice_after() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)

"""What a kernel's activation functions err by, seen through a layer that does nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashmoe.config import MoEConfig, MoEWeights
from flashmoe.reference import ACTIVATIONS
from flashmoe.rounding import ACTIVATION_UNIT, SPACING_BELOW_NORMAL, UNIT
from flashmoe.weights import random_weights, torch_dtype

from .layers import SMALL, deal, engine_for, forward


def passing(config: MoEConfig) -> MoEWeights:
    """Weights of a layer of one expert a token whose y is the activation of x's first column.

    A down projection that is the identity, an up projection of ones there: one product a sum.  The
    second column of x is what the gated up projection gives.
    """
    kind, width = torch_dtype(config), config.intermediate
    made = random_weights(config, 0, "cuda")
    up, down = torch.zeros_like(made.up), torch.zeros_like(made.down)
    up[:, :width, 0] = 1
    up[:, width:, 1] = 1  # of plain experts there is none
    down[:] = torch.eye(width).to(kind)
    return replace(made, up=up, down=down)


@pytest.mark.parametrize("tokens", [4, 512])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_a_nan_in_the_weights_is_one_in_y(activation: str, tokens: int) -> None:
    config = replace(SMALL, intermediate=SMALL.hidden, top_k=1, activation=activation)
    weights = passing(config)
    assert weights.up.dtype == torch.bfloat16
    weights.up[:, 5, 0] = torch.nan  # of gated experts a row of the gate
    x = torch.ones(tokens, config.hidden, dtype=torch.bfloat16, device="cuda")
    engine = engine_for(config, weights, deal(x, 1))
    y = forward(engine).y
    engine.close()
    # Down multiplies column 5 of `h` by 0 for all other columns of y.
    assert y.isnan().all()


@pytest.mark.parametrize("tokens", [4, 512])
@pytest.mark.parametrize("activation", ["swiglu", "silu", "relu"])
def test_infinity_stays_infinity(activation: str, tokens: int) -> None:
    config = replace(SMALL, intermediate=SMALL.hidden, top_k=1, activation=activation)
    weights = passing(config)
    weights.gate.zero_()
    weights.down.zero_()
    weights.down[:, :, 7] = 1
    x = torch.ones(tokens, config.hidden, dtype=torch.bfloat16, device="cuda")
    x[:, 2] = 2.0**127
    weights.up[:, 7, 2] = 4  # beyond float32
    engine = engine_for(config, weights, deal(x, 1))
    y = forward(engine).y
    engine.close()
    assert y.isposinf().all()


@pytest.mark.parametrize("tokens", [4, 512])
@pytest.mark.parametrize(("dtype", "reach"), [("bf16", 8.0), ("fp16", 8.0), ("bf16", 2.0**66)])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activation_errs_by_less_than_the_bound_assumes(
    activation: str, dtype: str, reach: float, tokens: int
) -> None:
    # y is a(v), rounded once.  Where a(v) is near 0 and v is not, rounding hides no error of the
    # function.  With the long reach the square of v is more than float32 holds.
    config = replace(SMALL, intermediate=SMALL.hidden, top_k=1, activation=activation, dtype=dtype)
    kind, width = torch_dtype(config), config.intermediate
    weights = passing(config)
    weights.up[:, :width, 0] = torch.linspace(-1.5, 1.5, width).to(kind)
    x = torch.zeros(tokens, config.hidden, dtype=kind, device="cuda")
    x[:, 0] = torch.linspace(-reach, reach, tokens).to(kind)
    x[:, 1] = 1
    engine = engine_for(config, weights, deal(x, 1))
    result = forward(engine)
    engine.close()
    assert (result.weights == 1).all()

    v = x[:, :1].double() * weights.up[0, :width, 0].double()
    exact = ACTIVATIONS[activation](v)
    assert v.amin() < -1.4 * reach
    error = (result.y.cuda().double() - exact).abs()
    of_function = ACTIVATION_UNIT * v.abs()
    allowed = of_function + UNIT[dtype] * (exact.abs() + of_function) + SPACING_BELOW_NORMAL[dtype]
    assert (error <= allowed).all(), (error / allowed).max().item()

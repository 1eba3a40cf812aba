"""The host engine's results against the float32 reference, and their bits against each other."""

from __future__ import annotations

import pytest
import torch

from flashmoe.config import MoEConfig, Routing
from flashmoe.numerics import check_output, check_routing
from flashmoe.world.base import RankOutput

from .layers import SMALL, Layer, dealt, forward, layer

DEEPSEEK = Routing("sigmoid", scale=2.5, groups=4, top_groups=2)

CONFIGS = {
    "mixtral": SMALL,
    "qwen": MoEConfig(96, 48, 24, 6),
    "olmoe": MoEConfig(72, 40, 16, 4, routing=Routing(renormalize=False)),
    "deepseek": MoEConfig(112, 64, 16, 5, routing=DEEPSEEK),
    "paper": MoEConfig(64, 64, 8, 2, "relu"),
    "geglu-fp16": MoEConfig(40, 104, 5, 3, "geglu", "fp16"),
    "gelu": MoEConfig(8, 8, 3, 1, "gelu"),
    "silu-fp16": MoEConfig(24, 16, 7, 2, "silu", "fp16"),
    "all-experts": MoEConfig(48, 32, 6, 6),
    "external": MoEConfig(32, 56, 9, 4, routing=Routing("external")),
    "deep": MoEConfig(520, 264, 4, 2),
}


def hold(what: Layer, out: RankOutput) -> None:
    """Asserts that an output is right, and its routing too."""
    verdict = check_output(out.y, what.x, what.weights, what.config, out.ids, out.weights)
    assert verdict.ok, verdict
    assert verdict.unbounded == 0
    if what.config.routing.kind == "external":
        assert what.ids is not None and what.shares is not None
        assert torch.equal(out.ids, what.ids)
        assert torch.equal(out.weights, what.shares)
    else:
        routing = check_routing(what.x, what.weights, what.config, out.ids, out.weights)
        assert routing.ok, routing


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_reference(name: str) -> None:
    what = layer(CONFIGS[name], 50)
    hold(what, forward(what, [21, 0, 29], sms_per_rank=2))


@pytest.mark.parametrize("ranks", range(1, 9))
def test_any_number_of_ranks_with_uneven_tokens_and_experts(ranks: int) -> None:
    # 7 experts: for most W some ranks own more than others, and for W = 8 one owns none.
    what = layer(MoEConfig(40, 48, 7, 3), 61)
    hold(what, forward(what, dealt(61, ranks), sms_per_rank=1 + ranks % 3))


@pytest.mark.parametrize("name", ["mixtral", "deepseek", "geglu-fp16", "external"])
def test_same_bits_for_any_world_any_sms_and_every_run(name: str) -> None:
    what = layer(CONFIGS[name], 64)
    one = forward(what, [64], sms_per_rank=1)
    for tokens, sms in (
        ([64], 3),
        ([32, 32], 2),
        ([0, 5, 59, 0], 1),
        (dealt(64, 5), 3),
        ([8] * 8, 1),
    ):
        other = forward(what, tokens, launches=2, sms_per_rank=sms, traced=sms == 2)
        assert torch.equal(one.y.view(torch.int16), other.y.view(torch.int16)), (tokens, sms)
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.weights, other.weights)


def test_launches_with_new_tokens_do_not_see_the_old_ones() -> None:
    from .layers import engine_for

    what, other = layer(SMALL, 40, seed=1), layer(SMALL, 40, seed=2)
    other.weights = what.weights
    with engine_for(what, [13, 27]) as engine:
        for _ in range(3):
            for now in (what, other):
                engine.load(now.split([13, 27]))
                engine.launch()
                y = torch.cat([o.y for o in engine.outputs()])
                assert torch.equal(y, forward(now, [40]).y)


def test_no_tokens_at_all() -> None:
    what = layer(SMALL, 0)
    for tokens in ([0], [0, 0, 0]):
        out = forward(what, tokens, launches=2)
        assert out.y.shape == (0, SMALL.hidden)
        assert out.ids.shape == (0, SMALL.top_k)


def test_ties_go_to_the_lower_id_and_nan_ranks_last() -> None:
    config = MoEConfig(8, 8, 6, 3)
    what = layer(config, 3)
    what.weights.gate.zero_()
    what.weights.gate[1, 0] = 1.0
    what.weights.gate[4, 0] = 1.0
    what.weights.gate[0, 1] = float("inf")
    what.x.zero_()
    what.x[0, 0] = 1.0  # experts 1 and 4 lead, the others tie; expert 0's logit is 0 * inf = NaN
    what.x[1, 0] = -1.0  # experts 2, 3, 5 tie ahead of 1 and 4
    out = forward(what, [3])
    assert out.ids[0].tolist() == [1, 4, 2]
    assert out.ids[1].tolist() == [2, 3, 5]
    assert out.ids[2].tolist() == [1, 2, 3]


def test_unwanted_dtypes_and_strides_are_converted() -> None:
    from .layers import engine_for

    what = layer(SMALL, 24)
    expected = forward(what, [24]).y
    with engine_for(what, [24]) as engine:
        wide = torch.zeros(24, 2 * SMALL.hidden)
        wide[:, ::2] = what.x.float()
        engine.load([wide[:, ::2]])
        engine.launch()
        assert torch.equal(engine.outputs()[0].y, expected)

"""The kernel against the float32 reference, over what a layer can be."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from flashmoe.config import MoEConfig, Routing
from flashmoe.presets import PRESETS
from flashmoe.world.base import EngineOptions, Status
from flashmoe.world.kernel import tile_family

from .layers import (
    SMALL,
    Forward,
    by_activation,
    deal,
    engine_for,
    forward,
    hold_to_reference,
    inputs,
)

LAYERS = {
    **by_activation(SMALL),
    "swiglu-fp16": replace(SMALL, dtype="fp16"),
    "every expert, nothing divides": MoEConfig(hidden=136, intermediate=72, experts=7, top_k=7),
    "one expert": MoEConfig(hidden=64, intermediate=64, experts=1, top_k=1),
    "rows shorter than k pieces": MoEConfig(hidden=40, intermediate=72, experts=16, top_k=8),
    "rows of a piece and a bit": MoEConfig(hidden=1032, intermediate=72, experts=16, top_k=8),
    "forty of sixty-five": MoEConfig(hidden=64, intermediate=64, experts=65, top_k=40),
    "not renormalised": replace(SMALL, routing=Routing(renormalize=False)),
    "deepseek": MoEConfig(256, 192, 64, 6, routing=Routing("sigmoid", True, 2.5, 8, 4)),
}


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("layer", LAYERS)
def test_small_layers(layer: str, ranks: int) -> None:
    config = LAYERS[layer]
    weights, x = inputs(config, 301)
    engine = engine_for(config, weights, deal(x, ranks))
    output, routing = hold_to_reference(forward(engine), x, weights, config)
    assert output.ok, output
    assert routing is not None and routing.ok, routing


@pytest.mark.parametrize("preset", ["mixtral", "qwen3-30b", "olmoe", "paper"])
@pytest.mark.parametrize("tokens", [1, 200])
def test_presets(preset: str, tokens: int) -> None:
    config = PRESETS[preset].config
    weights, x = inputs(config, tokens)
    output, routing = hold_to_reference(
        forward(engine_for(config, weights, deal(x, 1))), x, weights, config
    )
    assert output.ok, output
    assert routing is not None and routing.ok, routing


@pytest.mark.parametrize(
    "config",
    [
        MoEConfig(256, 192, 37, 5, routing=Routing("sigmoid", True, 2.5)),
        MoEConfig(256, 192, 37, 5, routing=Routing("sigmoid", False)),
        MoEConfig(256, 192, 128, 8, routing=Routing(renormalize=False)),
        MoEConfig(256, 192, 64, 8),
        MoEConfig(256, 192, 16, 1),
        MoEConfig(256, 192, 256, 8, routing=Routing("sigmoid", True, 2.5, 8, 4)),
    ],
    ids=["sigmoid", "scores", "not renormalised", "softmax", "one", "groups"],
)
def test_warps_with_several_tokens(config: MoEConfig) -> None:
    """Five CTAs route 61 tokens each, five or six a warp, of which four are weighed at once."""
    weights, x = inputs(config, 301)
    options = EngineOptions(ranks=1, sms_per_rank=5, deadline_s=5.0)
    few = forward(engine_for(config, weights, [x], options))
    output, routing = hold_to_reference(few, x, weights, config)
    assert output.ok, output
    assert routing is not None and routing.ok, routing
    # One token a warp, or none.
    many = forward(engine_for(config, weights, [x]))
    assert torch.equal(few.ids, many.ids)
    assert torch.equal(few.weights, many.weights)


@pytest.mark.parametrize(("tokens", "sms"), [(3, None), (50, None), (1500, None), (301, 5)])
@pytest.mark.parametrize(
    ("experts", "top_k", "kind"),
    [
        (128, 8, "softmax"),
        (8, 8, "softmax"),  # those of NaN, too
        (37, 5, "sigmoid"),
        (128, 9, "softmax"),
        (200, 8, "softmax"),
    ],
)
def test_the_lowest_of_equal_experts_is_chosen(
    experts: int, top_k: int, kind: str, tokens: int, sms: int | None
) -> None:
    """Experts of few kinds: those of a kind have the same logits, of one kind NaN, of one zeros."""
    config = MoEConfig(128, 64, experts, top_k, routing=Routing(kind))
    weights, x = inputs(config, tokens)
    rows = torch.randn(7, 128, generator=torch.Generator().manual_seed(1)).div(10).bfloat16()
    rows[0], rows[1] = 0.0, math.nan
    which = torch.randint(7, (experts,), generator=torch.Generator().manual_seed(2))
    bias = torch.zeros(experts, device="cuda") if kind == "sigmoid" else None
    routed = replace(weights, gate=rows[which].cuda(), bias=bias)
    scores = (x.cpu().double() @ rows.double().T).nan_to_num(nan=-math.inf)
    apart = scores.sort(dim=1).values.diff(dim=1)[:, 1:].min(dim=1).values > 1e-3
    assert apart.float().mean() > 0.9
    order = scores[:, which].sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    options = EngineOptions(ranks=1, sms_per_rank=sms, deadline_s=5.0)
    ids = forward(engine_for(config, routed, [x], options)).ids
    assert torch.equal(ids[apart], order[apart].int())


@pytest.mark.parametrize("tokens", [[0], [5, 0, 300], [0, 0], [1, 1, 1, 1, 1, 1, 1, 600]])
def test_uneven_tokens(tokens: list[int]) -> None:
    weights, x = inputs(SMALL, sum(tokens))
    result = forward(engine_for(SMALL, weights, list(x.split(tokens))))
    assert result.y.shape == x.shape
    output, _ = hold_to_reference(result, x, weights, SMALL)
    assert output.ok, output


def test_one_expert_takes_all() -> None:
    config = replace(SMALL, top_k=1, routing=Routing("external"))
    weights, x = inputs(config, 1000)
    parts = deal(x, 2)
    engine = engine_for(config, weights, parts)
    ids = [torch.full((len(p), 1), 5, dtype=torch.int32) for p in parts]
    scale = [torch.rand(len(p), 1) for p in parts]
    engine.load(parts, ids, scale)
    result = forward(engine)
    assert torch.equal(result.ids, torch.cat(ids))
    output, _ = hold_to_reference(result, x, weights, config)
    assert output.ok, output


@pytest.mark.parametrize("bad", [[0, 8], [-1, 0], [3, 3]])
def test_bad_ids_move_no_row(bad: list[int]) -> None:
    config = replace(SMALL, routing=Routing("external"))
    weights, x = inputs(config, 40)
    parts = deal(x, 2)
    engine = engine_for(config, weights, parts)
    ids = [torch.tensor([[0, 1]], dtype=torch.int32).repeat(len(p), 1) for p in parts]
    ids[1][7] = torch.tensor(bad, dtype=torch.int32)
    engine.load(parts, ids, [torch.ones(len(p), 2) for p in parts])
    assert engine.launch().status is Status.BAD_IDS
    assert engine.launch().status is Status.BAD_IDS, "abort is sticky until reset()"
    engine.reset()
    ids[1][7] = torch.tensor([2, 3], dtype=torch.int32)
    engine.load(parts, ids, [torch.ones(len(p), 2) for p in parts])
    output, _ = hold_to_reference(forward(engine), x, weights, config)
    assert output.ok, output


def test_overflow_says_how_many_rows() -> None:
    config = replace(SMALL, top_k=1, routing=Routing("external"))
    weights, x = inputs(config, 100)
    parts = deal(x, 2)
    ids = [torch.zeros(len(p), 1, dtype=torch.int32) for p in parts]
    ones = [torch.ones(len(p), 1) for p in parts]
    engine = engine_for(config, weights, parts, pool_rows=64)
    engine.load(parts, ids, ones)
    launch = engine.launch()
    assert (launch.status, launch.rows_needed) == (Status.OVERFLOW, 100)


def test_pools_grow_when_they_overflow() -> None:
    config = replace(SMALL, top_k=1, routing=Routing("external"))
    weights, x = inputs(config, 100)
    parts = deal(x, 2)
    engine = engine_for(config, weights, parts, pool_rows=64)
    engine._fixed_pool = False
    engine.load(
        parts,
        [torch.zeros(len(p), 1, dtype=torch.int32) for p in parts],
        [torch.ones(len(p), 1) for p in parts],
    )
    output, _ = hold_to_reference(forward(engine), x, weights, config)
    assert output.ok, output


def bits(result: Forward) -> bytes:
    """y's, to be compared or counted."""
    return result.y.view(torch.int16).numpy().tobytes()


# A rank alone has pairs of CTAs for the second number of tokens, not for the first.
@pytest.mark.parametrize("tokens", [777, 2500])
@pytest.mark.parametrize("traced", [False, True])
def test_bits_do_not_depend_on_ranks_runs_or_sms(traced: bool, tokens: int) -> None:
    config = PRESETS["qwen3-30b"].config
    weights, x = inputs(config, tokens)
    seen = set()
    # 4 and 5 CTAs gate more than 128 tokens each; 5 and 7 are never paired.
    for ranks, sms in [(1, None), (1, 7), (1, 4), (1, 5), (2, None), (4, 9), (8, None)]:
        options = EngineOptions(ranks=ranks, sms_per_rank=sms, traced=traced, deadline_s=5.0)
        engine = engine_for(config, weights, deal(x, ranks), options)
        for _ in range(3):
            seen.add(bits(forward(engine)))
        engine.close()
    assert len(seen) == 1


@pytest.mark.parametrize("tokens", [4, 1152, 5121])
def test_rows_read_in_place_and_rows_copied_give_the_same_bits(tokens: int) -> None:
    """One rank reads rows in place; two copy them, and have a stage more once that is over.

    One that is told to copies them, too.
    """
    weights, x = inputs(SMALL, tokens)
    seen = set()
    for ranks, in_place in ((1, True), (2, True), (1, False)):
        options = EngineOptions(ranks=ranks, deadline_s=5.0, in_place=in_place)
        engine = engine_for(SMALL, weights, deal(x, ranks), options)
        assert engine.family == tile_family(SMALL.dtype), "its rows are too short for units"
        result = forward(engine)
        seen.add(bits(result))
        output, routing = hold_to_reference(result, x, weights, SMALL)
        assert output.ok and routing is not None and routing.ok, (output, routing)
        engine.close()
    assert len(seen) == 1


def test_a_gate_in_slices_gives_the_same_bits() -> None:
    """132 CTAs route up to 64 tokens of 128 experts in slices; with a 65th they route all whole."""
    config = PRESETS["qwen3-30b"].config
    weights, x = inputs(config, 65)
    whole = forward(engine_for(config, weights, [x]))
    for tokens in (1, 9, 64):
        some = forward(engine_for(config, weights, [x[:tokens]]))
        assert torch.equal(some.ids, whole.ids[:tokens])
        assert torch.equal(some.weights, whole.weights[:tokens])
        assert bits(some) == whole.y[:tokens].view(torch.int16).numpy().tobytes()


@pytest.mark.parametrize("tokens", [7, 8, 61, 64])
@pytest.mark.parametrize(
    "config",
    [
        # The last part of the columns, and the last 8 experts, are not whole.
        MoEConfig(hidden=2112, intermediate=64, experts=60, top_k=4),
        # More parts than are fetched ahead.
        MoEConfig(hidden=7168, intermediate=64, experts=32, top_k=8),
        # No block for the second group.
        MoEConfig(hidden=64, intermediate=64, experts=9, top_k=2),
        MoEConfig(256, 192, 64, 6, routing=Routing("sigmoid", True, 2.5, 8, 4)),
    ],
    ids=["2112x60", "7168x32", "64x9", "sigmoid"],
)
def test_gates_in_slices(config: MoEConfig, tokens: int) -> None:
    weights, x = inputs(config, tokens)
    output, routing = hold_to_reference(
        forward(engine_for(config, weights, [x])), x, weights, config
    )
    assert output.ok, output
    assert routing is not None and routing.ok, routing


def test_rows_on_their_way_are_left_alone() -> None:
    # Long rows to many ranks: a CTA still sends while the other one of its pair multiplies, and
    # fills the stages of both.
    config = replace(PRESETS["mixtral"].config, intermediate=512)
    weights, x = inputs(config, 16384)
    seen = set()
    for ranks in (1, 8):
        engine = engine_for(config, weights, deal(x, ranks))
        seen |= {bits(forward(engine)) for _ in range(3)}
        engine.close()
    assert len(seen) == 1


@pytest.mark.parametrize("ranks", [1, 4])
def test_many_launches_agree(ranks: int) -> None:
    # What goes wrong once in a thousand launches: a load that comes late, seen as the turn before.
    config = PRESETS["qwen3-30b"].config
    weights, x = inputs(config, 8192)
    engine = engine_for(config, weights, deal(x, ranks))
    seen = {bits(forward(engine)) for _ in range(300)}
    engine.close()
    assert len(seen) == 1

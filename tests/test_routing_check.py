"""The routing check: other orders of sums pass, wrong experts and wrong weights do not."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from flashmoe.config import MoEConfig, MoEWeights, Routing
from flashmoe.presets import PRESETS
from flashmoe.reference import Routed, route
from flashmoe.rounding import confidence
from flashmoe.routing_check import check_routing
from flashmoe.tokens import random_tokens
from flashmoe.weights import random_weights

TINY = PRESETS["tiny"].config
GROUPED = MoEConfig(64, 8, 64, 4, routing=Routing("sigmoid", scale=2.5, groups=8, top_groups=4))
ROUTED = {
    "mixtral": TINY,
    "qwen3": MoEConfig(64, 8, 128, 8),
    "olmoe": MoEConfig(64, 8, 64, 8, routing=Routing(renormalize=False)),
    "deepseek": GROUPED,
    "all": MoEConfig(64, 8, 4, 4),
    "wide": replace(GROUPED, hidden=7168, experts=256, top_k=8),
}


def _routed(config: MoEConfig, tokens: int = 128) -> tuple[torch.Tensor, MoEWeights, Routed]:
    weights = random_weights(config, seed=3)
    (x,) = random_tokens([tokens], config, seed=4)
    return x, weights, route(x, weights, config)


@pytest.mark.parametrize("name", ROUTED)
def test_routing_in_another_order_of_sums_is_right(name: str) -> None:
    config = ROUTED[name]
    x, weights, _ = _routed(config)
    turned = replace(weights, gate=weights.gate.flip(1))
    routed = route(x.flip(1), turned, config)
    verdict = check_routing(x, weights, config, routed.ids, routed.weights)
    assert verdict.ok and verdict.max_weight_ratio < 0.8
    assert (verdict.tokens, verdict.wrong, verdict.bad_ids) == (128, 0, 0)


@pytest.mark.parametrize("name", ["qwen3", "olmoe", "deepseek", "wide"])
def test_logits_rounded_to_bf16_are_wrong(name: str) -> None:
    config = ROUTED[name]
    x, weights, _ = _routed(config, tokens=512)
    coarse = replace(config, hidden=config.experts)
    rounded = (x.float() @ weights.gate.float().T).bfloat16()
    unit = replace(weights, gate=torch.eye(config.experts).bfloat16())
    other = route(rounded, unit, coarse)
    verdict = check_routing(x, weights, config, other.ids, other.weights)
    assert not verdict.ok
    assert verdict.wrong > 0 and verdict.differ >= verdict.wrong


@pytest.mark.parametrize("name", ["mixtral", "qwen3", "olmoe", "deepseek"])
def test_the_next_best_expert_is_wrong(name: str) -> None:
    config = ROUTED[name]
    x, weights, routed = _routed(config)
    ahead = route(x, weights, replace(config, top_k=config.top_k + 1))
    last_two = ahead.scores.gather(1, ahead.ids[:, -2:].long())
    token = int((last_two[:, 0] - last_two[:, 1]).argmax())  # not one of the near-ties
    routed.ids[token, -1] = ahead.ids[token, -1]
    verdict = check_routing(x, weights, config, routed.ids, routed.weights)
    assert (verdict.ok, verdict.wrong, verdict.worst_token) == (False, 1, token)


def test_an_expert_of_a_group_left_out_is_wrong() -> None:
    # Group 0 holds the best expert of all but a bad second; groups 1 to 4 are better together.
    scores = torch.full((1, 64), -4.0)
    scores[0, 0] = 3.0
    for group in range(1, 5):
        scores[0, 8 * group : 8 * group + 2] = 2.0 + group / 8
    weights = MoEWeights(torch.eye(64).bfloat16(), None, torch.empty(0), torch.empty(0))
    x = scores.bfloat16()
    routed = route(x, weights, GROUPED)
    assert 0 not in routed.ids
    assert check_routing(x, weights, GROUPED, routed.ids, routed.weights).ok
    ungrouped = replace(GROUPED, routing=replace(GROUPED.routing, groups=1, top_groups=1))
    greedy = route(x, weights, ungrouped)
    assert 0 in greedy.ids
    verdict = check_routing(x, weights, GROUPED, greedy.ids, greedy.weights)
    assert (verdict.ok, verdict.wrong) == (False, 1)


def test_more_groups_than_may_take_part_are_wrong_even_in_a_tie() -> None:
    # All experts are alike, so any two of the groups will do, but no more than two.
    routing = Routing("sigmoid", groups=4, top_groups=2)
    config = MoEConfig(8, 8, 8, 3, routing=routing)
    weights = MoEWeights(torch.zeros(8, 8).bfloat16(), None, torch.empty(0), torch.empty(0))
    x, shares = torch.ones(1, 8).bfloat16(), torch.full((1, 3), 1 / 3)
    two_groups, three_groups = (torch.tensor([ids]) for ids in ([2, 3, 7], [0, 2, 7]))
    verdict = check_routing(x, weights, config, two_groups, shares)
    assert (verdict.ok, verdict.near_ties, verdict.differ) == (True, 1, 1)
    verdict = check_routing(x, weights, config, three_groups, shares)
    assert (verdict.ok, verdict.wrong) == (False, 1)


def test_exact_ties_may_go_either_way_and_are_counted() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    weights = MoEWeights(torch.eye(4).bfloat16(), None, torch.empty(0), torch.empty(0))
    config = MoEConfig(8, 8, 4, 1)
    x = logits.bfloat16()
    ids = torch.tensor([[2], [0]], dtype=torch.int32)
    verdict = check_routing(x, weights, config, ids, torch.ones(2, 1))
    assert verdict.ok
    assert (verdict.near_ties, verdict.differ, verdict.wrong) == (1, 1, 0)


def test_ids_out_of_range_or_twice_and_wrong_weights() -> None:
    x, weights, routed = _routed(TINY)
    for token, bad in ((0, [8, 1]), (1, [-1, 1]), (2, [3, 3])):
        ids = routed.ids.clone()
        ids[token] = torch.tensor(bad)
        verdict = check_routing(x, weights, TINY, ids, routed.weights)
        assert (verdict.ok, verdict.bad_ids, verdict.worst_token) == (False, 1, token)
    shares = routed.weights.clone()
    shares[9] *= 1.0001
    verdict = check_routing(x, weights, TINY, routed.ids, shares)
    assert (verdict.ok, verdict.wrong, verdict.worst_token) == (False, 0, 9)
    shares[9, 0] = torch.nan
    verdict = check_routing(x, weights, TINY, routed.ids, shares)
    assert (verdict.ok, verdict.wrong_weights, verdict.worst_token) == (False, 1, 9)
    json.dumps(asdict(verdict), allow_nan=False)


def test_no_tokens_is_no_error() -> None:
    empty = torch.zeros(0, TINY.hidden, dtype=torch.bfloat16)
    ids = torch.zeros(0, 2, dtype=torch.int32)
    assert check_routing(empty, random_weights(TINY), TINY, ids, torch.zeros(0, 2)).ok


def test_confidence_is_hoeffdings() -> None:
    lam = confidence(1000)
    assert 2 * 1000 * torch.tensor(-(lam**2) / 2).double().exp() == pytest.approx(1e-9, rel=1e-4)
    assert confidence(10**9) > lam

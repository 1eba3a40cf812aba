"""Are a kernel's expert ids and routing weights what the float32 router gives, up to rounding?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashmoe.config import MoEConfig, MoEWeights
from flashmoe.reference import (
    choose,
    full_float32,
    group_scores,
    logits,
    selection_scores,
    weigh,
)
from flashmoe.rounding import KERNEL_UNIT, confidence, sum_width


@dataclass(frozen=True)
class RoutingCheck:
    """The verdict on ids and routing weights.

    ``bad_ids``: tokens with an id out of range or twice.  ``wrong``: tokens with an expert whose
    score is below that of one left out by more than both bounds.  ``near_ties``: tokens where the
    bounds leave the choice open; ``differ``: tokens chosen otherwise than by the reference.
    ``wrong_weights``: tokens with a weight beyond its bound, and ``max_weight_ratio`` the largest
    |weight - reference| / bound, on the kernel's ids.
    """

    ok: bool
    tokens: int
    bad_ids: int
    wrong: int
    wrong_weights: int
    near_ties: int
    differ: int
    max_weight_abs: float
    max_weight_ratio: float
    worst_token: int | None


# Steps of float32 that an exponential may be off: fast device ones, 2 + 1.16 |argument| ulp.
_EXP_STEPS, _EXP_STEPS_PER_ARGUMENT = 16.0, 2.0
_EXP_UNDERFLOWS = 104.0


def _exp_error(argument: torch.Tensor) -> torch.Tensor:
    steps = _EXP_STEPS + _EXP_STEPS_PER_ARGUMENT * argument.abs().clamp_max(_EXP_UNDERFLOWS)
    return steps * KERNEL_UNIT


def _logit_bound(
    x: torch.Tensor, gate: torch.Tensor, logits_: torch.Tensor, lam: float
) -> torch.Tensor:
    """Bound on |kernel's logit - reference's| [T, E].

    A float32 sum is all there is, so its partial sums are bounded more closely than by the sum of
    the magnitudes: in an order that has nothing to do with the values they stray from the straight
    line to the whole by no more than lambda times the terms' 2-norm.
    """
    with full_float32():
        rows, columns = x.float(), gate.float()
        magnitude = rows.abs() @ columns.abs().T
        norm = (rows.square() @ columns.square().T).sqrt()
    partial = torch.minimum(magnitude, logits_.abs() + lam * norm)
    return lam * sum_width(partial, x.shape[1])


def _chosen_mask(ids: torch.Tensor, experts: int) -> torch.Tensor:
    mask = torch.zeros(ids.shape[0], experts, dtype=torch.bool, device=ids.device)
    return mask.scatter_(1, ids.long(), True)


def _beaten_by(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """How many others are surely above each: [T, n] counts of low_other > high_own."""
    ordered = low.sort(dim=1).values.contiguous()
    return ordered.shape[1] - torch.searchsorted(ordered, high.contiguous(), right=True)


def _choice(
    scores: torch.Tensor, bound: torch.Tensor, chosen: torch.Tensor, config: MoEConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per token: is the choice wrong beyond the bounds, and do the bounds leave it open?"""
    groups, top_groups = config.routing.groups, config.routing.top_groups
    low, high = scores - bound, scores + bound
    size = config.experts // groups
    if top_groups < groups:
        best = group_scores(scores, groups)
        slack = bound.unflatten(1, (groups, size)).sort(dim=2, descending=True).values
        slack = slack[:, :, :2].sum(2)
        may = _beaten_by(best - slack, best + slack) < top_groups
        # Surely in: fewer than top_groups others could reach it (each counts itself once).
        reached = groups - torch.searchsorted(
            (best + slack).sort(dim=1).values.contiguous(), (best - slack).contiguous()
        )
        must = reached - 1 < top_groups
        may_e, must_e = (m.repeat_interleave(size, dim=1) for m in (may, must))
        in_groups = chosen.unflatten(1, (groups, size)).any(2).sum(1)
        wrong = (chosen & ~may_e).any(1) | (in_groups > top_groups)
        open_ = (may & ~must).any(1)
    else:
        may_e = must_e = torch.ones_like(chosen)
        wrong = open_ = torch.zeros(chosen.shape[0], dtype=torch.bool, device=chosen.device)
    lowest_chosen = high.masked_fill(~chosen, torch.inf).amin(1)
    best_left_out = low.masked_fill(chosen | ~must_e, -torch.inf).amax(1)
    wrong = wrong | (lowest_chosen < best_left_out)
    if config.top_k < config.experts:
        usual = choose(scores, config)
        last = low.gather(1, usual).amin(1)
        others = high.masked_fill(_chosen_mask(usual, config.experts) | ~may_e, -torch.inf)
        open_ = open_ | (others.amax(1) >= last)
    return wrong, open_


def check_routing(
    x: torch.Tensor,
    weights: MoEWeights,
    config: MoEConfig,
    ids: torch.Tensor,
    routing_weights: torch.Tensor,
) -> RoutingCheck:
    """Holds a kernel's ids [T, k] and weights [T, k] against the float32 router.

    A choice is wrong only where no rounding explains it; weights are compared on the kernel's ids.
    The order of a token's ids is not judged.  Tokens whose logits are not finite are judged by
    nothing but ``bad_ids``.  Raises FlashmoeError where the routing is external.
    """
    tokens = ids.shape[0]
    if tokens == 0:
        return RoutingCheck(True, 0, 0, 0, 0, 0, 0, 0.0, 0.0, None)
    logits_ = logits(x, weights)
    bound = _logit_bound(x, weights.gate, logits_, confidence(tokens * config.experts))
    scores = selection_scores(logits_, weights, config)
    sigmoid = config.routing.kind == "sigmoid"
    relative = bound + _exp_error(logits_) if sigmoid else bound
    score_bound = bound
    if sigmoid:
        rate = logits_.sigmoid()
        score_bound = (1 - rate) * rate * bound.expm1() + rate * _exp_error(logits_)
        score_bound = score_bound + KERNEL_UNIT * scores.abs()

    given = ids.long()
    inside = ((given >= 0) & (given < config.experts)).all(1)
    repeated = (given.sort(dim=1).values.diff(dim=1) == 0).any(1)
    bad = ~inside | repeated
    given = given.clamp(0, config.experts - 1)
    judged = logits_.isfinite().all(1) & ~bad
    chosen = _chosen_mask(given, config.experts)
    wrong, open_ = _choice(scores, score_bound, chosen, config)
    wrong, open_ = wrong & judged, open_ & judged
    usual = _chosen_mask(choose(scores, config), config.experts)
    differ = (chosen != usual).any(1) & judged

    reference = weigh(logits_, given, config)
    relative_weight = _weight_error(logits_, relative, given, config)
    weight_bound = reference * relative_weight.expm1() + torch.finfo(torch.float32).tiny
    difference = (routing_weights.float() - reference).abs()
    # Kept finite, so that JSON holds it: a weight that is NaN errs by the largest number there is.
    largest = torch.finfo(torch.float32).max
    difference = difference.nan_to_num(nan=largest, posinf=largest)
    difference = difference.masked_fill(~judged[:, None], 0.0)
    ratio = (difference / weight_bound.masked_fill(~judged[:, None], 1.0)).amax(1)
    ratio = ratio.clamp_max(largest)
    blame = ratio.masked_fill(bad | wrong, torch.inf)
    bad_count, wrong_count, wrong_weights = (int(t.sum()) for t in (bad, wrong, ratio > 1))
    return RoutingCheck(
        ok=bad_count == wrong_count == wrong_weights == 0,
        tokens=tokens,
        bad_ids=bad_count,
        wrong=wrong_count,
        wrong_weights=wrong_weights,
        near_ties=int(open_.sum()),
        differ=int(differ.sum()),
        max_weight_abs=float(difference.max()),
        max_weight_ratio=float(ratio.max()),
        worst_token=int(blame.argmax()),
    )


def _weight_error(
    logits_: torch.Tensor, relative: torch.Tensor, ids: torch.Tensor, config: MoEConfig
) -> torch.Tensor:
    """Bound on |ln(kernel's weight / reference's)| [T, k], from the logits' or sigmoids' bounds."""
    own = relative.gather(1, ids)
    steps = 4 + config.top_k
    if config.routing.kind == "sigmoid":
        if not config.routing.renormalize:
            return own + 4 * KERNEL_UNIT
        return own + own.amax(1, keepdim=True) + steps * KERNEL_UNIT
    if config.routing.renormalize:
        logits_, relative = logits_.gather(1, ids), own
    else:
        steps = 4 + config.experts
    below_best = logits_ - logits_.amax(1, keepdim=True)
    error = _exp_error(below_best).amax(1, keepdim=True)
    return own + relative.amax(1, keepdim=True) + 2 * error + steps * KERNEL_UNIT

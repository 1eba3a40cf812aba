"""How far from the float32 reference a correct kernel may be; derived in docs/numbers.md.

A kernel rounds: the activations h to the dtype, each row of GEMM2 to the dtype, y to the dtype, and
every step of its float32 sums.  Errors that add up over many terms are bounded by Azuma-Hoeffding
(mean-independent roundings, Higham and Mary 2019: lambda * sqrt(sum of squares) instead of the sum
of absolute values), the few roundings at the end by their worst case.  Nothing is fitted: the bound
follows from x, the weights, the dtype and the sizes.  Magnitudes are |x| |W| products; error widths
("widths" below) are the half-widths c of the intervals in Hoeffding's sum of c squared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from flashmoe.config import MoEConfig, MoEWeights
from flashmoe.reference import (
    ACTIVATIONS,
    choose,
    full_float32,
    group_scores,
    logits,
    moe,
    selection_scores,
    weigh,
)
from flashmoe.weights import torch_dtype

MISS_PROBABILITY = 1e-9
"""Chance that a correct kernel breaks some bound of one check, under the rounding model."""

UNIT = {"bf16": 2.0**-8, "fp16": 2.0**-11}
"""Unit roundoff of rounding to the dtype, to nearest."""

SPACING_BELOW_NORMAL = {"bf16": 2.0**-133, "fp16": 2.0**-24}
"""Distance of neighbours below the smallest normal number."""

FLOAT32_UNIT = 2.0**-24
_KERNEL_UNIT = 2.0**-23  # tensor cores cut off where float32 arithmetic rounds to nearest
_BOTH_SUMS = math.hypot(_KERNEL_UNIT, FLOAT32_UNIT)  # the kernel's and the reference's own error

ACTIVATION_UNIT = 2.0**-16
"""Error of an activation function, relative to its argument, that a kernel may add."""

# Largest slopes: of silu at 2.40, of both gelus at 1.41.
_SLOPE = {"swiglu": 1.0999, "silu": 1.0999, "geglu": 1.1291, "gelu": 1.1291, "relu": 1.0}

_TOKENS_AT_ONCE = 16384


def confidence(elements: int) -> float:
    """Lambda for which all of ``elements`` sums stay within lambda * width but for 1e-9.

    Hoeffding: each fails with at most 2 exp(-lambda^2 / 2); the union of all with elements times
    that.
    """
    return math.sqrt(2 * math.log(2 * max(elements, 1) / MISS_PROBABILITY))


def sum_width(magnitude: torch.Tensor, terms: int) -> torch.Tensor:
    """Width of the error of a float32 sum of ``terms`` products, kernel's and reference's.

    No partial sum exceeds ``magnitude``, the sum of the absolute products; ``terms`` additions and
    one product a term are rounded.
    """
    return magnitude * (_BOTH_SUMS * math.sqrt(terms + 1))


@dataclass(frozen=True)
class _Rows:
    """One expert's rows [n, H]: the value, the width of its random error, the magnitude summed."""

    value: torch.Tensor
    width: torch.Tensor
    overflows: torch.Tensor  # bool [n]: an activation is too large for the dtype


def _expert_rows(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, config: MoEConfig, lam: float
) -> _Rows:
    """GEMM1, activation and GEMM2 of float32 x [n, H] with their error widths.

    Destroys ``up`` and ``down``: copies of a wide expert's matrices are most of the memory taken.
    """
    unit, spacing = UNIT[config.dtype], SPACING_BELOW_NORMAL[config.dtype]
    activation, slope = ACTIVATIONS[config.activation], _SLOPE[config.activation]
    projected = x @ up.T
    projected_width = sum_width(x.abs() @ up.abs_().T, config.hidden)
    if config.gated:
        gate, factor = projected.split(config.intermediate, dim=1)
        gate_width, factor_width = projected_width.split(config.intermediate, dim=1)
        activated = activation(gate)
        hidden = activated * factor
        factor_most = factor.abs() + lam * factor_width
        width = torch.hypot(slope * gate_width * factor_most, activated.abs() * factor_width)
        function_error = ACTIVATION_UNIT * (gate.abs() + lam * gate_width) * factor_most
    else:
        hidden = activation(projected)
        width = slope * projected_width
        function_error = ACTIVATION_UNIT * (projected.abs() + lam * projected_width)
    width = torch.hypot(width, function_error)
    most = hidden.abs() + lam * width
    overflows = (most > torch.finfo(torch_dtype(config)).max).any(dim=1)
    width = torch.hypot(width, unit * most + spacing / 2)

    rows = hidden @ down.T
    from_sum = sum_width(most @ down.abs_().T, config.intermediate)
    # Squares of small widths would leave float32's range: scaled by each row's largest.
    largest = width.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    from_hidden = ((width / largest).square() @ down.square_().T).sqrt() * largest
    return _Rows(rows, torch.hypot(from_hidden, from_sum), overflows)


def output_bound(
    x: torch.Tensor,
    weights: MoEWeights,
    config: MoEConfig,
    ids: torch.Tensor,
    routing_weights: torch.Tensor,
) -> torch.Tensor:
    """Bound on |kernel - reference| of each element of y: float32 [T, H].

    Arguments as in ``reference.moe``.  Infinite where the dtype may overflow on the way.  About two
    and a half times the reference's work; one expert and 16384 tokens at a time.
    """
    tokens, k = ids.shape
    lam = confidence(tokens * (config.hidden + k * (config.hidden + 3 * config.intermediate)))
    bound = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    with full_float32():
        for at in range(0, tokens, _TOKENS_AT_ONCE):
            part = slice(at, at + _TOKENS_AT_ONCE)
            bound[part] = _bound(x[part], weights, config, ids[part], routing_weights[part], lam)
    return bound


def _bound(
    x: torch.Tensor,
    weights: MoEWeights,
    config: MoEConfig,
    ids: torch.Tensor,
    routing_weights: torch.Tensor,
    lam: float,
) -> torch.Tensor:
    unit, spacing = UNIT[config.dtype], SPACING_BELOW_NORMAL[config.dtype]
    largest = torch.finfo(torch_dtype(config)).max
    y, variance, worst, magnitude = (
        torch.zeros(x.shape, dtype=torch.float32, device=x.device) for _ in range(4)
    )
    for expert in ids.unique().tolist():
        token, slot = torch.where(ids == expert)
        share = routing_weights[token, slot, None].float()
        up, down = (m[expert].to(torch.float32, copy=True) for m in (weights.up, weights.down))
        rows = _expert_rows(x[token].float(), up, down, config, lam)
        most = rows.value.abs() + lam * rows.width
        rounding = unit * most + spacing / 2
        rounding[(most > largest) | rows.overflows[:, None]] = torch.inf
        y.index_add_(0, token, rows.value * share)
        variance.index_add_(0, token, (rows.width * share).square())
        worst.index_add_(0, token, rounding * share.abs())
        magnitude.index_add_(0, token, most * share.abs())
    before_last = lam * variance.sqrt() + worst
    # The combine of kernel and reference: k products and k sums each.
    before_last += (config.top_k + 1) * (_KERNEL_UNIT + FLOAT32_UNIT) * magnitude
    most = y.abs() + before_last
    bound = before_last + unit * most + spacing / 2
    return bound.masked_fill_(most > largest, torch.inf)


@dataclass(frozen=True)
class OutputCheck:
    """The verdict on y.

    ``max_ratio`` is the largest |kernel - reference| / bound, at ``worst`` (token, column);
    ``over`` counts elements beyond their bound, ``unbounded`` those whose bound is infinite or
    whose reference is not finite: they are not judged.  ``relative_rms`` is the root mean square of
    the difference over that of the reference.
    """

    ok: bool
    elements: int
    over: int
    unbounded: int
    max_abs: float
    max_ratio: float
    relative_rms: float
    worst: tuple[int, int] | None
    worst_value: float
    worst_reference: float
    worst_bound: float


def compare(y: torch.Tensor, reference: torch.Tensor, bound: torch.Tensor) -> OutputCheck:
    """Holds y [T, H] against the reference and its bound, float32 [T, H], on one device."""
    elements = reference.numel()
    if elements == 0:
        return OutputCheck(True, 0, 0, 0, 0.0, 0.0, 0.0, None, 0.0, 0.0, 0.0)
    judged = bound.isfinite() & reference.isfinite()
    difference = (y.float() - reference).abs()
    difference = difference.masked_fill(difference.isnan(), torch.inf).masked_fill(~judged, 0.0)
    # A bound of 0 is one of an exact result: any difference at all is infinitely beyond it.
    ratio = torch.where(difference == 0, 0.0, difference / bound.masked_fill(~judged, 1.0))
    over = int((ratio > 1).sum())
    at = int(ratio.argmax())
    token, column = divmod(at, reference.shape[1])
    norm = float(reference.masked_fill(~judged, 0.0).double().norm())
    return OutputCheck(
        ok=over == 0,
        elements=elements,
        over=over,
        unbounded=elements - int(judged.sum()),
        max_abs=float(difference.max()),
        max_ratio=float(ratio.max()),
        relative_rms=float(difference.double().norm()) / norm if norm else 0.0,
        worst=(token, column),
        worst_value=float(y[token, column]),
        worst_reference=float(reference[token, column]),
        worst_bound=float(bound[token, column]),
    )


def check_output(
    y: torch.Tensor,
    x: torch.Tensor,
    weights: MoEWeights,
    config: MoEConfig,
    ids: torch.Tensor,
    routing_weights: torch.Tensor,
) -> OutputCheck:
    """Holds a kernel's y [T, H] against the reference, on the kernel's own ids and weights.

    All tensors on one device; where that is a GPU the check runs there.
    """
    reference = moe(x, weights, config, ids, routing_weights)
    return compare(y, reference, output_bound(x, weights, config, ids, routing_weights))


@dataclass(frozen=True)
class RoutingCheck:
    """The verdict on ids and routing weights.

    ``bad_ids``: tokens with an id out of range or twice.  ``wrong``: tokens with an expert whose
    score is below that of one left out by more than both bounds.  ``near_ties``: tokens where the
    bounds leave the choice open; ``differ``: tokens chosen otherwise than by the reference.
    ``max_weight_ratio``: largest |weight - reference| / bound, on the kernel's ids.
    """

    ok: bool
    tokens: int
    bad_ids: int
    wrong: int
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
    return steps * _KERNEL_UNIT


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
        return RoutingCheck(True, 0, 0, 0, 0, 0, 0.0, 0.0, None)
    logits_ = logits(x, weights)
    with full_float32():
        magnitude = x.float().abs() @ weights.gate.float().abs().T
    bound = confidence(tokens * config.experts) * sum_width(magnitude, config.hidden)
    scores = selection_scores(logits_, weights, config)
    sigmoid = config.routing.kind == "sigmoid"
    relative = bound + _exp_error(logits_) if sigmoid else bound
    score_bound = bound
    if sigmoid:
        rate = logits_.sigmoid()
        score_bound = (1 - rate) * rate * bound.expm1() + rate * _exp_error(logits_)
        score_bound = score_bound + _KERNEL_UNIT * scores.abs()

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
    difference = difference.masked_fill(difference.isnan(), torch.inf)
    difference = difference.masked_fill(~judged[:, None], 0.0)
    ratio = (difference / weight_bound.masked_fill(~judged[:, None], 1.0)).amax(1)
    blame = ratio.masked_fill(bad | wrong, torch.inf)
    bad_count, wrong_count = int(bad.sum()), int(wrong.sum())
    return RoutingCheck(
        ok=bad_count == 0 and wrong_count == 0 and float(ratio.max()) <= 1,
        tokens=tokens,
        bad_ids=bad_count,
        wrong=wrong_count,
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
            return own + 4 * _KERNEL_UNIT
        return own + own.amax(1, keepdim=True) + steps * _KERNEL_UNIT
    if config.routing.renormalize:
        logits_, relative = logits_.gather(1, ids), own
    else:
        steps = 4 + config.experts
    below_best = logits_ - logits_.amax(1, keepdim=True)
    error = _exp_error(below_best).amax(1, keepdim=True)
    return own + relative.amax(1, keepdim=True) + 2 * error + steps * _KERNEL_UNIT

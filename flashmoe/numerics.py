"""How far from the float32 reference a correct kernel's output may be; derived in docs/numbers.md.

A kernel rounds: the activations h to the dtype, each row of GEMM2 to the dtype, y to the dtype, and
every step of its float32 sums.  Errors that add up over many terms are bounded as
``flashmoe.rounding`` says, the few roundings at the end by their worst case.  Nothing is fitted:
the bound follows from x, the weights, the dtype and the sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from flashmoe.config import MoEConfig, MoEWeights
from flashmoe.reference import ACTIVATIONS, full_float32, moe
from flashmoe.rounding import (
    ACTIVATION_UNIT,
    FLOAT32_UNIT,
    KERNEL_UNIT,
    SPACING_BELOW_NORMAL,
    UNIT,
    confidence,
    sum_width,
)
from flashmoe.routing_check import RoutingCheck, check_routing
from flashmoe.weights import torch_dtype

__all__ = [
    "OutputCheck",
    "RoutingCheck",
    "check_output",
    "check_routing",
    "compare",
    "output_bound",
]

# Largest slopes: of silu at 2.40, of both gelus at 1.41.
SLOPE = {"swiglu": 1.0999, "silu": 1.0999, "geglu": 1.1291, "gelu": 1.1291, "relu": 1.0}

_TOKENS_AT_ONCE = 16384


@dataclass(frozen=True)
class _Rows:
    """One expert's rows [n, H]: the value, and the width of its random error."""

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
    activation, slope = ACTIVATIONS[config.activation], SLOPE[config.activation]
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
    before_last += (config.top_k + 1) * (KERNEL_UNIT + FLOAT32_UNIT) * magnitude
    most = y.abs() + before_last
    bound = before_last + unit * most + spacing / 2
    return bound.masked_fill_(most > largest, torch.inf)


@dataclass(frozen=True)
class OutputCheck:
    """The verdict on y; every figure is finite, so that JSON holds it.

    ``max_ratio`` is the largest |kernel - reference| / bound; ``over`` counts elements beyond their
    bound, ``not_finite`` those of them that are NaN or infinite, which the maxima leave out;
    ``unbounded`` counts elements whose bound is infinite or whose reference is not finite: they are
    not judged.  ``relative_rms`` is the root mean square of the difference over that of the
    reference.  ``worst`` is the (token, column) of the first element that is not finite, else of
    ``max_ratio``; None where nothing was judged.  ``worst_value`` is None where it is not finite.
    """

    ok: bool
    elements: int
    over: int
    not_finite: int
    unbounded: int
    max_abs: float
    max_ratio: float
    relative_rms: float
    worst: tuple[int, int] | None
    worst_value: float | None
    worst_reference: float
    worst_bound: float


def compare(y: torch.Tensor, reference: torch.Tensor, bound: torch.Tensor) -> OutputCheck:
    """Holds y [T, H] against the reference and its bound, float32 [T, H], on one device."""
    elements = reference.numel()
    judged = bound.isfinite() & reference.isfinite()
    unbounded = elements - int(judged.sum())
    if elements == unbounded:
        return OutputCheck(True, elements, 0, 0, unbounded, 0.0, 0.0, 0.0, None, 0.0, 0.0, 0.0)
    broken = judged & ~y.isfinite()
    left_out = ~judged | broken
    difference = (y.float() - reference).abs().masked_fill_(left_out, 0.0)
    # A bound of 0 is that of an exact result: any difference is beyond it.
    largest = torch.finfo(torch.float32).max
    ratio = (difference / bound).masked_fill_(difference == 0, 0.0).clamp_max_(largest)
    not_finite = int(broken.sum())
    over = int((ratio > 1).sum()) + not_finite
    blame = ratio.masked_fill(broken, torch.inf).masked_fill_(~judged, -1.0)
    token, column = divmod(int(blame.argmax()), reference.shape[1])
    value = float(y[token, column])
    norm = float(reference.masked_fill(left_out, 0.0).double().norm())
    return OutputCheck(
        ok=over == 0,
        elements=elements,
        over=over,
        not_finite=not_finite,
        unbounded=unbounded,
        max_abs=float(difference.max()),
        max_ratio=float(ratio.max()),
        relative_rms=float(difference.double().norm()) / norm if norm else 0.0,
        worst=(token, column),
        worst_value=value if math.isfinite(value) else None,
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

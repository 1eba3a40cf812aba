"""The bounds: a kernel that rounds as it may stays inside, one that moves a row does not."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, replace

import pytest
import torch

from flashmoe.config import MoEConfig, MoEWeights
from flashmoe.numerics import (
    SLOPE,
    OutputCheck,
    check_output,
    compare,
    output_bound,
)
from flashmoe.presets import PRESETS
from flashmoe.reference import ACTIVATIONS, expert_hidden, moe, route
from flashmoe.rounding import SPACING_BELOW_NORMAL, UNIT
from flashmoe.tokens import random_tokens
from flashmoe.weights import random_weights, torch_dtype

TINY = PRESETS["tiny"].config
# One rank's share of DeepSeek-V3 has the dimensions of the whole.
DIMENSIONS = [name for name in PRESETS if name != "deepseek-v3-ep8"]


@dataclass
class Case:
    """One layer with some tokens, routed, and its verdict; ``rows`` [T, k, H] are the experts'."""

    config: MoEConfig
    weights: MoEWeights
    x: torch.Tensor
    ids: torch.Tensor
    shares: torch.Tensor
    rows: torch.Tensor

    @functools.cached_property
    def truth(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference and its bound, once for all that is held against them."""
        given = (self.x, self.weights, self.config, self.ids, self.shares)
        return moe(*given), output_bound(*given)

    def combine(self, rows: torch.Tensor) -> torch.Tensor:
        """y [T, H] in the dtype: rows summed in float32 in the order of k."""
        y = torch.zeros(self.x.shape)
        for slot in range(self.config.top_k):
            y += rows[:, slot].float() * self.shares[:, slot, None]
        return y.to(torch_dtype(self.config))

    def check(self, rows: torch.Tensor) -> OutputCheck:
        """The verdict on y made of ``rows``."""
        return compare(self.combine(rows), *self.truth)


def _honest_rows(
    x: torch.Tensor, weights: MoEWeights, config: MoEConfig, ids: torch.Tensor
) -> torch.Tensor:
    """What a kernel's GEMMs leave: h and each row rounded to the dtype, nothing else."""
    dtype = torch_dtype(config)
    rows = torch.empty(*ids.shape, config.hidden, dtype=dtype)
    for expert in ids.unique().tolist():
        token, slot = torch.where(ids == expert)
        h = expert_hidden(x[token], weights, expert, config).to(dtype)
        rows[token, slot] = (h.float() @ weights.down[expert].float().T).to(dtype)
    return rows


def _few_experts(config: MoEConfig) -> MoEWeights:
    """Weights of a wide layer at the price of one expert.

    Expert e computes the first one's activations, rotated: paired with other columns of the down
    matrix, they give rows that have nothing to do with the first's.  Uniform numbers out of random
    bytes, since normal ones would take seconds.
    """
    generator = torch.Generator().manual_seed(3)
    h, i, e = config.hidden, config.intermediate, config.experts

    def uniform(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)
        return drawn.to(torch_dtype(config)).mul_(1 / (74 * columns**0.5))

    halves = uniform(config.up_rows, h).split(i)
    up = torch.stack([torch.cat([half.roll(n * (i // e), 0) for half in halves]) for n in range(e)])
    down = uniform(h, i).expand(e, -1, -1)
    return MoEWeights(gate=uniform(e, h), bias=None, up=up, down=down)


def _case(config: MoEConfig, tokens: int, few: bool) -> Case:
    weights = _few_experts(config) if few else random_weights(config, seed=3)
    (x,) = random_tokens([tokens], config, seed=4)
    routed = route(x, weights, config)
    rows = _honest_rows(x, weights, config, routed.ids)
    return Case(config, weights, x, routed.ids, routed.weights, rows)


@functools.cache
def _preset_case(name: str) -> Case:
    """The preset's H, I, k, activation and routing; k + 1 experts, so that a laptop holds them."""
    config = PRESETS[name].config
    if name == "tiny":
        return _case(config, 64, few=False)
    routing = replace(config.routing, groups=1, top_groups=1)
    return _case(replace(config, experts=config.top_k + 1, routing=routing), 3, few=True)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n == "mixtral" else []) for n in DIMENSIONS],
)
def test_honest_rounding_is_inside_with_margin(name: str) -> None:
    case = _preset_case(name)
    verdict = case.check(case.rows)
    assert verdict.ok and verdict.unbounded == 0
    assert 0.05 < verdict.max_ratio < 0.8, "neither loose by orders of magnitude nor on the edge"


@pytest.mark.parametrize("name", DIMENSIONS)
def test_swapping_the_rows_of_two_experts_breaks_it(name: str) -> None:
    case = _preset_case(name)
    rows = case.rows.clone()
    # The heaviest and the lightest: were the weights equal, the swap would be no error.
    last = case.config.top_k - 1
    rows[0, [0, last]] = case.rows[0, [last, 0]]
    verdict = case.check(rows)
    assert not verdict.ok
    assert verdict.worst is not None and verdict.worst[0] == 0


@pytest.mark.parametrize("name", DIMENSIONS)
def test_swapping_the_rows_of_two_tokens_breaks_it(name: str) -> None:
    case = _preset_case(name)
    rows = case.rows.clone()
    last = case.config.top_k - 1
    rows[[0, 1], last] = case.rows[[1, 0], last]
    assert not case.check(rows).ok


@pytest.mark.parametrize("name", DIMENSIONS)
def test_losing_any_one_of_the_rows_breaks_it(name: str) -> None:
    case = _preset_case(name)
    for slot in {0, case.config.top_k - 1}:  # the heaviest and the lightest
        rows = case.rows.clone()
        rows[1, slot] = 0
        verdict = case.check(rows)
        assert not verdict.ok
        assert verdict.worst is not None and verdict.worst[0] == 1


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_dtype(activation: str, dtype: str) -> None:
    config = replace(TINY, activation=activation, dtype=dtype)  # type: ignore[arg-type]
    case = _case(config, 64, few=False)
    verdict = case.check(case.rows)
    assert verdict.ok and 0.05 < verdict.max_ratio < 0.8
    # A rounding nobody allowed: x itself, to three bits less than the dtype has.
    coarse = (case.x.float() / 2**-4).round() * 2**-4
    rows = _honest_rows(coarse.to(case.x.dtype), case.weights, config, case.ids)
    assert not case.check(rows).ok


def test_the_bound_scales_with_the_layer() -> None:
    # Rounding is relative: 2^40 times the down matrix, or tokens' weights, is 2^40 times the bound.
    case = _preset_case("tiny")
    bound = output_bound(case.x, case.weights, case.config, case.ids, case.shares)
    for factor in (2.0**40, 2.0**-40):
        weights = replace(case.weights, down=case.weights.down * factor)
        scaled = output_bound(case.x, weights, case.config, case.ids, case.shares)
        torch.testing.assert_close(scaled, bound * factor, rtol=1e-3, atol=0.0)


def test_sums_in_any_order_stay_inside() -> None:
    # float32 sums in chains of 16, as tensor cores make them, against the reference's order.
    config = MoEConfig(1024, 512, 2, 1, activation="relu")
    case = _case(config, 8, few=False)
    rows = torch.empty_like(case.rows)
    for token in range(8):
        expert = int(case.ids[token, 0])
        chained = torch.zeros(512)
        for at in range(0, 1024, 16):
            chained += case.weights.up[expert, :, at : at + 16].float() @ (
                case.x[token, at : at + 16].float()
            )
        h = chained.clamp_min(0).bfloat16().float()
        rows[token, 0] = (case.weights.down[expert].float() @ h).bfloat16()
    assert case.check(rows).ok


def test_no_tokens_is_no_error() -> None:
    empty = torch.zeros(0, TINY.hidden, dtype=torch.bfloat16)
    ids = torch.zeros(0, 2, dtype=torch.int32)
    weights = random_weights(TINY)
    assert check_output(empty, empty, weights, TINY, ids, torch.zeros(0, 2)).ok


def test_what_is_not_finite_is_wrong_unless_the_dtype_overflows() -> None:
    config = replace(TINY, dtype="fp16")
    case = _case(config, 64, few=False)
    y = case.combine(case.rows)
    y[3, 5] = torch.nan
    verdict = check_output(y, case.x, case.weights, config, case.ids, case.shares)
    assert not verdict.ok and verdict.over == verdict.not_finite == 1
    assert (verdict.worst, verdict.worst_value) == ((3, 5), None)
    assert verdict.max_ratio < 1, "the others are right"
    json.dumps(asdict(verdict), allow_nan=False)
    loud = replace(case.weights, up=case.weights.up * 1000)
    rows = _honest_rows(case.x, loud, config, case.ids)
    assert not rows.isfinite().all(), "fp16 overflows here"
    y = replace(case, weights=loud).combine(rows)
    verdict = check_output(y, case.x, loud, config, case.ids, case.shares)
    assert verdict.unbounded > 0 and verdict.ok


def test_compare_names_the_worst_element() -> None:
    reference = torch.zeros(2, 3)
    y = torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, -3.0]])
    verdict = compare(y, reference, torch.ones(2, 3))
    assert (verdict.ok, verdict.over, verdict.worst) == (False, 1, (1, 2))
    assert (verdict.max_abs, verdict.max_ratio, verdict.worst_value) == (3.0, 3.0, -3.0)
    exact = compare(y, reference, torch.zeros(2, 3))
    assert exact.over == 2
    json.dumps(asdict(exact), allow_nan=False)
    nothing = compare(y, reference, torch.full((2, 3), torch.inf))
    assert (nothing.ok, nothing.unbounded, nothing.worst) == (True, 6, None)
    assert compare(reference, reference, torch.zeros(2, 3)).ok


def test_checking_is_comparing_with_the_reference_and_its_bound() -> None:
    case = _preset_case("tiny")
    y = case.combine(case.rows)
    verdict = check_output(y, case.x, case.weights, case.config, case.ids, case.shares)
    assert verdict == compare(y, *case.truth)
    assert verdict.ok and 0 < verdict.relative_rms < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_units_are_those_of_the_dtypes(dtype: torch.dtype) -> None:
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    facts = torch.finfo(dtype)
    assert UNIT[name] == facts.eps / 2
    assert SPACING_BELOW_NORMAL[name] == facts.smallest_normal * facts.eps


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_are_the_activations_largest(activation: str) -> None:
    x = torch.linspace(-20, 20, 400_001, dtype=torch.float64, requires_grad=True)
    ACTIVATIONS[activation](x).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    steepest = float(x.grad.abs().max())
    assert steepest <= SLOPE[activation] < steepest + 2e-4

"""The truth: one MoE layer in plain float32 torch.

Routing follows the blocks of transformers 5 (Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3) but for one
thing: logits stay in float32, where those of the first three are rounded to the model's dtype.
Nothing here is rounded to the layer's dtype; ``flashmoe.numerics`` says how far from this a kernel
that does round may be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from flashmoe.config import MoEConfig, MoEWeights
from flashmoe.errors import FlashmoeError

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "swiglu": F.silu,
    "geglu": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}
"""What is applied to the gate projection (``swiglu``, ``geglu``) or to the only one."""


@dataclass(frozen=True)
class Routed:
    """``ids`` int32 [T, k], best first; ``weights`` float32 [T, k]; ``scores`` float32 [T, E].

    ``scores`` is what the experts were ranked by: the logits for softmax routing, sigmoid + bias
    for sigmoid routing (before groups are left out).
    """

    ids: torch.Tensor
    weights: torch.Tensor
    scores: torch.Tensor


@contextmanager
def full_float32() -> Iterator[None]:
    """Float32 products keep all 24 bits inside: no TF32, whatever the process chose."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def ranked(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the ``count`` best along the last dimension, best first: int64 [..., count].

    Ties go to the lower index.  NaN ranks last, below -inf.
    """
    nan = scores.isnan()
    order = scores.masked_fill(nan, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    nan_last = nan.gather(-1, order).to(torch.uint8).argsort(dim=-1, stable=True)
    return order.gather(-1, nan_last)[..., :count]


def logits(x: torch.Tensor, weights: MoEWeights) -> torch.Tensor:
    """Router logits, float32 [T, E], of x [T, H]: products of the dtype's values in float32."""
    with full_float32():
        return x.float() @ weights.gate.float().T


def group_scores(scores: torch.Tensor, groups: int) -> torch.Tensor:
    """Scores of the expert groups [T, groups] from those of the experts [T, E].

    A group's score is the sum of its two best (DeepSeek-V3, ``DeepseekV3TopkRouter``).
    """
    grouped = scores.unflatten(-1, (groups, -1))
    best = ranked(grouped, min(2, grouped.shape[-1]))
    return grouped.gather(-1, best).sum(-1)


def choose(scores: torch.Tensor, config: MoEConfig) -> torch.Tensor:
    """Experts of each token by their scores [T, E]: int64 [T, k], best first."""
    groups, top_groups = config.routing.groups, config.routing.top_groups
    if top_groups == groups:
        return ranked(scores, config.top_k)
    taking_part = ranked(group_scores(scores, groups), top_groups)
    of_group = torch.zeros(scores.shape[0], groups, dtype=torch.bool, device=scores.device)
    of_group.scatter_(1, taking_part, True)
    open_to_choice = of_group.repeat_interleave(config.experts // groups, dim=1)
    # Left out, not scored low: a NaN of a group that takes part still ranks above these.
    everyone = ranked(scores, config.experts)
    allowed = open_to_choice.gather(1, everyone).to(torch.uint8)
    allowed_first = allowed.argsort(dim=1, descending=True, stable=True)
    return everyone.gather(1, allowed_first)[:, : config.top_k]


def weigh(logits_: torch.Tensor, ids: torch.Tensor, config: MoEConfig) -> torch.Tensor:
    """Routing weights float32 [T, k] of the experts ``ids`` [T, k], from all logits [T, E]."""
    routing = config.routing
    ids = ids.long()
    if routing.kind == "sigmoid":
        chosen = logits_.gather(1, ids).sigmoid()
        if routing.renormalize:
            chosen = chosen / (chosen.sum(dim=1, keepdim=True) + 1e-20)
    elif routing.renormalize:
        # softmax over all, divided by the sum of the chosen, is softmax over the chosen.
        chosen = logits_.gather(1, ids).softmax(dim=1)
    else:
        chosen = logits_.softmax(dim=1).gather(1, ids)
    return chosen * routing.scale


def selection_scores(logits_: torch.Tensor, weights: MoEWeights, config: MoEConfig) -> torch.Tensor:
    """What experts are ranked by, float32 [T, E]: logits, or sigmoid + bias."""
    if config.routing.kind != "sigmoid":
        return logits_
    scores = logits_.sigmoid()
    return scores if weights.bias is None else scores + weights.bias.float()


def route(x: torch.Tensor, weights: MoEWeights, config: MoEConfig) -> Routed:
    """Experts and weights of each token of x [T, H].

    Raises FlashmoeError where the routing is external: ids and weights then come with the tokens.
    """
    if config.routing.kind == "external":
        raise FlashmoeError(
            "external routing has no gate to compute",
            "give expert ids and weights with the tokens",
            exit_code=2,
        )
    logits_ = logits(x, weights)
    scores = selection_scores(logits_, weights, config)
    ids = choose(scores, config)
    return Routed(ids.to(torch.int32), weigh(logits_, ids, config), scores)


def expert_hidden(
    x: torch.Tensor, weights: MoEWeights, expert: int, config: MoEConfig
) -> torch.Tensor:
    """One expert's activations, float32 [T, I], of x [T, H]."""
    activation = ACTIVATIONS[config.activation]
    projected = x.float() @ weights.up[expert].float().T
    if not config.gated:
        return activation(projected)
    gate, up = projected.split(config.intermediate, dim=1)
    return activation(gate) * up


def moe(
    x: torch.Tensor,
    weights: MoEWeights,
    config: MoEConfig,
    ids: torch.Tensor,
    routing_weights: torch.Tensor,
) -> torch.Tensor:
    """The layer's output, float32 [T, H].

    ``x`` [T, H] in the layer's dtype; ``ids`` [T, k] distinct experts a token; ``routing_weights``
    [T, k] float32.  All on one device; a loop over experts, so that one expert's weights at a time
    are held in float32.
    """
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    with full_float32():
        for expert in ids.unique().tolist():
            token, slot = torch.where(ids == expert)
            hidden = expert_hidden(x[token], weights, expert, config)
            rows = hidden @ weights.down[expert].float().T
            y.index_add_(0, token, rows * routing_weights[token, slot, None].float())
    return y


def mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """A dense SwiGLU block, float32 [T, H]: DeepSeek-V3's shared expert.

    ``gate`` and ``up`` [J, H], ``down`` [H, J].
    """
    with full_float32():
        rows = x.float()
        return (F.silu(rows @ gate.float().T) * (rows @ up.float().T)) @ down.float().T

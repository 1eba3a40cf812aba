"""The gate that every peer gets: torch's own linear, scores and top-k, meant to be compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from flashmoe.config import MoEConfig, MoEWeights

Gate = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""x [T, H] to ids int32 [T, k] and weights float32 [T, k]."""


def gate_of(config: MoEConfig, weights: MoEWeights) -> Gate:
    """The layer's gate in torch.

    Logits are rounded to the dtype, as a linear layer's are; scores are float32 from there on.
    """
    routing = config.routing

    def softmax(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = F.linear(x, weights.gate).float().softmax(dim=-1)
        chosen, ids = scores.topk(config.top_k, dim=-1)
        if routing.renormalize:
            chosen = chosen / chosen.sum(dim=-1, keepdim=True)
        return ids.to(torch.int32), chosen * routing.scale

    def sigmoid(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = F.linear(x, weights.gate).float().sigmoid()
        ranked = scores if weights.bias is None else scores + weights.bias
        if routing.top_groups < routing.groups:
            grouped = ranked.unflatten(-1, (routing.groups, -1))
            best = grouped.topk(2, dim=-1).values.sum(dim=-1)
            taking_part = best.topk(routing.top_groups, dim=-1).indices
            open_ = torch.zeros_like(best, dtype=torch.bool).scatter(1, taking_part, True)
            ranked = grouped.masked_fill(~open_[..., None], -torch.inf).flatten(1)
        ids = ranked.topk(config.top_k, dim=-1).indices
        chosen = scores.gather(1, ids)
        if routing.renormalize:
            chosen = chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20)
        return ids.to(torch.int32), chosen * routing.scale

    return sigmoid if routing.kind == "sigmoid" else softmax


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled for the shapes that it is first called with; on a CPU as it is."""
    if not torch.cuda.is_available():
        return function
    return torch.compile(function, dynamic=False)

"""torch's own grouped GEMM: rows sorted by expert, two grouped products, sums in token order."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from flashmoe.bench.gate import compiled, gate_of
from flashmoe.bench.peers.base import Case, PeerOptions, PeerWork, Unavailable
from flashmoe.config import MoEConfig, MoEWeights
from flashmoe.reference import ACTIVATIONS


def _grouped_mm() -> Any:
    found = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if found is None:
        raise Unavailable(f"torch {torch.__version__} has no grouped_mm")
    return found


def activate(up: torch.Tensor, config: MoEConfig) -> torch.Tensor:
    """The experts' activation of [rows, 2I or I], in the dtype: [rows, I]."""
    activation = ACTIVATIONS[config.activation]
    if not config.gated:
        return activation(up)
    gate, factor = up.split(config.intermediate, dim=-1)
    return activation(gate) * factor


def experts(
    x: torch.Tensor,
    weights: MoEWeights,
    config: MoEConfig,
    ids: torch.Tensor,
    routing_weights: torch.Tensor,
) -> torch.Tensor:
    """All experts of the routed tokens, y [T, H], without a word to the host."""
    grouped_mm = _grouped_mm()
    tokens, k = ids.shape
    sorted_ids, order = ids.flatten().sort(stable=True)
    every = torch.arange(config.experts, dtype=sorted_ids.dtype, device=ids.device)
    ends = torch.searchsorted(sorted_ids, every, right=True).to(torch.int32)
    up = grouped_mm(x[order // k], weights.up.transpose(1, 2), offs=ends)
    rows = grouped_mm(activate(up, config), weights.down.transpose(1, 2), offs=ends)
    rows = rows * routing_weights.flatten()[order].to(rows.dtype)[:, None]
    place = torch.empty_like(order)
    place[order] = torch.arange(tokens * k, device=order.device)
    return rows[place].view(tokens, k, -1).sum(dim=1)


def eager(case: Case, options: PeerOptions) -> PeerWork:
    """``grouped_mm`` called from Python, op by op; only the gate is compiled."""
    _refuse(case)

    def forward() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids, weights = case.gate(case.x)
        return experts(case.x, case.weights, case.config, ids, weights), ids, weights

    return PeerWork(forward, f"torch {torch.__version__}")


def whole_compiled(case: Case, options: PeerOptions) -> PeerWork:
    """The same, gate and experts together through ``torch.compile``."""
    _refuse(case)
    gate = gate_of(case.config, case.weights)

    def layer(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids, weights = gate(x)
        return experts(x, case.weights, case.config, ids, weights), ids, weights

    fused = compiled(layer)

    def forward() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y, ids, weights = fused(case.x)
        return y, ids, weights

    return PeerWork(forward, f"torch {torch.__version__}")


def _refuse(case: Case) -> None:
    _grouped_mm()
    if case.config.dtype != "bf16":
        raise Unavailable(f"grouped_mm takes bf16, not {case.config.dtype}")

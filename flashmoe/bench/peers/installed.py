"""Peers that run where their package is installed: Liger, SGLang and DeepGEMM."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

import torch

from flashmoe.bench.gate import compiled
from flashmoe.bench.peers.base import Case, PeerOptions, PeerWork, Unavailable
from flashmoe.bench.peers.torch_grouped import activate


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        missing = isinstance(exc, ModuleNotFoundError) and module.startswith(exc.name or "?")
        raise Unavailable(
            "not installed" if missing else f"{package} does not import: {exc}"
        ) from (None if missing else exc)


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package


def _only_swiglu(case: Case) -> None:
    if case.config.activation != "swiglu":
        raise Unavailable(f"it takes swiglu experts, not {case.config.activation}")


def liger(case: Case, options: PeerOptions) -> PeerWork:
    """Liger's fused MoE, which reads a count back to the host: no graph can hold it."""
    module = _imported("liger_kernel.ops.fused_moe", "liger-kernel")
    _only_swiglu(case)

    def forward() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids, weights = case.gate(case.x)
        y = module.LigerFusedMoEFunction.apply(
            case.x, case.weights.up, case.weights.down, ids, weights
        )
        return y, ids, weights

    return PeerWork(
        forward,
        _version("liger-kernel"),
        why_eager="its routing reads the number of tiles on the host",
    )


def sglang(case: Case, options: PeerOptions) -> PeerWork:
    """SGLang's own ``fused_experts``, all of it its code but the gate."""
    top = _imported("sglang", "sglang")
    module = _imported("sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe", top.__name__)
    runner = _imported("sglang.srt.layers.moe.moe_runner", top.__name__)
    topk = _imported("sglang.srt.layers.moe.topk", top.__name__)
    _only_swiglu(case)
    config = runner.MoeRunnerConfig(
        num_experts=case.config.experts,
        num_local_experts=case.config.experts,
        activation="silu",
        is_gated=True,
        inplace=False,
    )

    def forward() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids, weights = case.gate(case.x)
        chosen = topk.StandardTopKOutput(weights, ids, None)
        y = module.fused_experts(case.x, case.weights.up, case.weights.down, chosen, config)
        return y, ids, weights

    return PeerWork(forward, _version("sglang"))


def deepgemm(case: Case, options: PeerOptions) -> PeerWork:
    """DeepGEMM's grouped GEMM between torch's gather, activation and sum.

    Its layout wants each expert's rows to begin at a multiple of its block: rows are placed so,
    with room for the worst case, and the gaps are computed by nobody.
    """
    module = _imported("deep_gemm", "deep_gemm")
    multiply = getattr(module, "m_grouped_bf16_gemm_nt_contiguous", None)
    block_of = getattr(module, "get_m_alignment_for_contiguous_layout", None) or getattr(
        module, "get_mk_alignment_for_contiguous_layout", None
    )
    if multiply is None or block_of is None:
        raise Unavailable("this deep_gemm has no grouped GEMM in bf16")
    if case.config.dtype != "bf16":
        raise Unavailable(f"its grouped GEMM takes bf16, not {case.config.dtype}")
    config, x, block = case.config, case.x, int(block_of())
    rows = x.shape[0] * config.top_k
    capacity = rows + min(rows, config.experts) * (block - 1)
    capacity = -(-capacity // block) * block
    of_up = x.new_empty(capacity, config.up_rows)
    of_down = x.new_empty(capacity, config.hidden)
    gathered = x.new_zeros(capacity, config.hidden)

    def places(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each (token, k) goes, int64 [T k], and each row's expert, -1 in a gap."""
        flat = ids.flatten()
        sorted_ids, order = flat.sort(stable=True)
        every = torch.arange(config.experts, dtype=flat.dtype, device=flat.device)
        ends = torch.searchsorted(sorted_ids, every, right=True)
        counts = ends.diff(prepend=ends.new_zeros(1))
        padded = (counts + block - 1) // block * block
        shift = padded.cumsum(0) - padded - (ends - counts)
        at = torch.arange(rows, device=flat.device) + shift[sorted_ids.long()]
        place = torch.empty_like(order)
        place[order] = at
        expert_of = torch.full((capacity,), -1, dtype=torch.int32, device=flat.device)
        return place, expert_of.index_copy(0, at, sorted_ids)

    place_rows = compiled(places)
    act = compiled(lambda up: activate(up, config))
    total = compiled(
        lambda out, place, weights: (
            (out[place].view(x.shape[0], config.top_k, -1).float() * weights[..., None])
            .sum(1)
            .to(x.dtype)
        )
    )

    def forward() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids, weights = case.gate(x)
        place, expert_of = place_rows(ids)
        gathered.index_copy_(0, place, x.repeat_interleave(config.top_k, dim=0))
        multiply(gathered, case.weights.up, of_up, expert_of)
        multiply(act(of_up), case.weights.down, of_down, expert_of)
        return total(of_down, place, weights), ids, weights

    return PeerWork(forward, _version("deep_gemm"), note="torch gathers, activates and sums")

"""The peers by name, and what became of one in a run."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from flashmoe.bench.peers.base import Builder, Case, PeerOptions, PeerWork, Unavailable
from flashmoe.errors import FlashmoeError

__all__ = ["PEERS", "Case", "Peer", "PeerOptions", "PeerWork", "Unavailable", "chosen"]


@dataclass(frozen=True)
class Peer:
    """A peer's name, what it is in a few words, and ``module:function`` that builds it."""

    name: str
    words: str
    where: str

    def build(self, case: Case, options: PeerOptions) -> PeerWork:
        """Builds it for one case; see :data:`flashmoe.bench.peers.base.Builder`."""
        module, _, function = self.where.partition(":")
        builder: Builder = getattr(importlib.import_module(f"{__name__}.{module}"), function)
        return builder(case, options)


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("grouped-mm", "torch's grouped_mm, eager", "torch_grouped:eager"),
        Peer(
            "grouped-mm-compiled",
            "torch.compile of gate and grouped_mm together",
            "torch_grouped:whole_compiled",
        ),
        Peer(
            "vllm-triton",
            "the Triton kernel of vLLM and SGLang as it is shipped",
            "triton_moe:shipped",
        ),
        Peer(
            "vllm-triton-tuned",
            "the same, the best of the published configurations",
            "triton_moe:tuned",
        ),
        Peer("liger", "Liger's fused MoE", "installed:liger"),
        Peer("sglang", "SGLang's fused_experts", "installed:sglang"),
        Peer("deepgemm", "DeepGEMM's grouped GEMM", "installed:deepgemm"),
    )
}


def chosen(text: str) -> list[Peer]:
    """The peers that ``--peers`` asks for: names with commas, ``all`` or ``none``.

    Raises FlashmoeError (exit code 2) for a name that is none.
    """
    if text in ("all", "none"):
        return list(PEERS.values()) if text == "all" else []
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PEERS:
            raise FlashmoeError(
                f"no peer '{name}'", f"peers are: {', '.join(PEERS)}, all or none", exit_code=2
            )
    return [PEERS[name] for name in dict.fromkeys(names)]

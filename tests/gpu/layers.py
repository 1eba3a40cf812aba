"""Layers, inputs and runs that the GPU tests share."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

from flashmoe.config import MoEConfig, MoEWeights
from flashmoe.numerics import OutputCheck, RoutingCheck, check_output, check_routing
from flashmoe.tokens import random_tokens
from flashmoe.weights import random_weights
from flashmoe.world.base import EngineOptions, Launch, Status
from flashmoe.world.local import LocalEngine

SMALL = MoEConfig(hidden=256, intermediate=192, experts=8, top_k=2)


def by_activation(config: MoEConfig) -> dict[str, MoEConfig]:
    """The layer with each activation, and some of them in fp16."""
    kinds = ("swiglu", "relu", "gelu", "silu", "geglu-fp16", "relu-fp16")
    return {
        kind: replace(
            config, activation=kind.split("-")[0], dtype="fp16" if "-" in kind else config.dtype
        )
        for kind in kinds
    }


@dataclass
class Forward:
    """One forward of a global batch, the ranks' outputs joined again."""

    launch: Launch
    y: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


def inputs(config: MoEConfig, tokens: int, seed: int = 0) -> tuple[MoEWeights, torch.Tensor]:
    """Random weights and x [tokens, H], both on the GPU."""
    weights = random_weights(config, seed, "cuda")
    return weights, random_tokens([tokens], config, seed)[0].cuda()


def deal(x: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """The global batch, cut into consecutive parts of nearly equal length."""
    cuts = [x.shape[0] * rank // ranks for rank in range(ranks + 1)]
    return [x[a:b].contiguous() for a, b in itertools.pairwise(cuts)]


def engine_for(
    config: MoEConfig,
    weights: MoEWeights,
    parts: list[torch.Tensor],
    options: EngineOptions | None = None,
    **keywords: int,
) -> LocalEngine:
    """An engine with one rank a part, loaded with them (not where ids come from outside)."""
    options = options or EngineOptions(ranks=len(parts), deadline_s=5.0)
    engine = LocalEngine(config, weights, [len(p) for p in parts], options, **keywords)
    if config.routing.kind != "external":
        engine.load(parts)
    return engine


def forward(engine: LocalEngine) -> Forward:
    """One launch, which must end well."""
    launch = engine.launch()
    assert launch.status is Status.OK
    outputs = engine.outputs()
    return Forward(
        launch,
        torch.cat([o.y for o in outputs]),
        torch.cat([o.ids for o in outputs]),
        torch.cat([o.weights for o in outputs]),
    )


def hold_to_reference(
    result: Forward, x: torch.Tensor, weights: MoEWeights, config: MoEConfig
) -> tuple[OutputCheck, RoutingCheck | None]:
    """The verdicts on y and, where the kernel routed, on its routing; computed on the GPU."""
    ids, routing = result.ids.cuda(), result.weights.cuda()
    output = check_output(result.y.cuda(), x, weights, config, ids, routing)
    if config.routing.kind == "external":
        return output, None
    return output, check_routing(x, weights, config, ids, routing)

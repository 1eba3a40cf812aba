"""Layers, inputs and runs that the host engine's tests share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from flashmoe.config import MoEConfig, MoEWeights
from flashmoe.tokens import random_tokens
from flashmoe.weights import random_weights
from flashmoe.world.base import EngineOptions, RankOutput, Status
from flashmoe.world.host import HostEngine

SMALL = MoEConfig(hidden=64, intermediate=72, experts=8, top_k=2)


@dataclass
class Layer:
    """A layer with a global batch [T, H]; external ids and weights where routing is external."""

    config: MoEConfig
    weights: MoEWeights
    x: torch.Tensor
    ids: torch.Tensor | None
    shares: torch.Tensor | None

    def split(self, tokens: Sequence[int]) -> list[torch.Tensor]:
        return list(self.x.split(list(tokens)))


def layer(config: MoEConfig, tokens: int, seed: int = 0) -> Layer:
    """Random weights and tokens, the same for the same seed."""
    weights = random_weights(config, seed)
    (x,) = random_tokens([tokens], config, seed)
    ids = shares = None
    if config.routing.kind == "external":
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(tokens, config.experts, generator=generator).argsort(dim=1)
        ids = order[:, : config.top_k].to(torch.int32).contiguous()
        shares = torch.rand(tokens, config.top_k, generator=generator)
    return Layer(config, weights, x, ids, shares)


@contextmanager
def engine_for(
    what: Layer, tokens: Sequence[int], pool_rows: int | None = None, **options: Any
) -> Iterator[HostEngine]:
    """A loaded engine with ``tokens`` of the global batch on each rank."""
    options.setdefault("deadline_s", 30.0)
    engine = HostEngine(
        what.config,
        what.weights,
        tokens,
        EngineOptions(ranks=len(tokens), **options),
        pool_rows=pool_rows,
    )
    sizes = list(tokens)
    ids = None if what.ids is None else list(what.ids.split(sizes))
    shares = None if what.shares is None else list(what.shares.split(sizes))
    engine.load(what.split(tokens), ids, shares)
    try:
        yield engine
    finally:
        engine.close()


def joined(outputs: Sequence[RankOutput]) -> RankOutput:
    """All ranks' outputs as those of the global batch."""
    return RankOutput(
        torch.cat([o.y for o in outputs]),
        torch.cat([o.ids for o in outputs]),
        torch.cat([o.weights for o in outputs]),
    )


def forward(what: Layer, tokens: Sequence[int], launches: int = 1, **options: Any) -> RankOutput:
    """The global batch's output after ``launches`` launches, each of which must end well."""
    with engine_for(what, tokens, **options) as engine:
        for i in range(launches):
            launch = engine.launch()
            assert launch.status is Status.OK
            assert launch.iteration == i
        return joined(engine.outputs())


def dealt(total: int, ranks: int) -> list[int]:
    """``total`` tokens over ``ranks``, unevenly: the first has most, the last may have none."""
    sizes = [total // (2 << r) for r in range(ranks)]
    sizes[0] += total - sum(sizes)
    assert sum(itertools.chain(sizes)) == total
    return sizes

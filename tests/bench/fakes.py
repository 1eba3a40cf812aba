"""A machine without a GPU: an engine of plain torch, and a stopwatch of the host's clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flashmoe.bench.machine import Machine
from flashmoe.bench.stopwatch import Prepared, in_turn
from flashmoe.config import MoEConfig, MoEWeights
from flashmoe.reference import moe, route
from flashmoe.world.base import EngineOptions, Launch, RankOutput, Status

ENVIRONMENT = {
    "gpu": "none",
    "driver": None,
    "torch": torch.__version__,
    "triton": None,
    "copy_gb_per_s": 10.0,
    "commit": "unknown",
}


class HostStopwatch:
    """No graphs, no flush; ``order`` keeps the works of each round as they ran."""

    def __init__(self) -> None:
        self.order: list[list[int]] = []

    def prepare(self, work: Callable[[], Any], why_eager: str = "") -> Prepared:
        return Prepared(work, work, work(), False, why_eager or "no graphs on a CPU")

    def rounds(
        self, works: Sequence[Prepared], count: int, during: Callable[[], None] | None = None
    ) -> list[list[float]]:
        times: list[list[float]] = [[] for _ in works]
        for turn in range(count):
            self.order.append(in_turn(len(works), turn))
            for at in self.order[-1]:
                began = time.perf_counter()
                works[at].run()
                times[at].append((time.perf_counter() - began) * 1e3)
            if during is not None:
                during()
        return times


class TorchEngine:
    """Computes in float32 and rounds once; ``spoil`` makes results wrong, or launches hang.

    ``spoil_after`` launches are still good.
    """

    spoil: str | None = None
    spoil_after = 0

    def __init__(
        self, config: MoEConfig, weights: MoEWeights, tokens: list[int], options: EngineOptions
    ) -> None:
        self.config, self.weights, self.options = config, weights, options
        self.sms_per_rank = 132 // options.ranks // 2 * 2
        self.launches = 0
        self.closed = False

    def load(
        self,
        tokens: list[torch.Tensor],
        ids: list[torch.Tensor] | None = None,
        routing_weights: list[torch.Tensor] | None = None,
    ) -> None:
        self.x, self.ids, self.routing_weights = tokens, ids, routing_weights

    def enqueue(self) -> None:
        self.launches += 1
        self.results = []
        for rank, x in enumerate(self.x):
            if self.ids is not None and self.routing_weights is not None:
                ids, weights = self.ids[rank], self.routing_weights[rank]
            else:
                routed = route(x, self.weights, self.config)
                ids, weights = routed.ids, routed.weights
            y = moe(x, self.weights, self.config, ids, weights).to(x.dtype)
            if self.spoil == "wrong" and self.launches > self.spoil_after:
                y = y + 1
            self.results.append(RankOutput(y, ids, weights))

    def launch(self) -> Launch:
        self.enqueue()
        hangs = self.spoil == "hang" and self.launches > self.spoil_after
        return Launch(Status.HANG if hangs else Status.OK, 1.0, self.launches - 1)

    def outputs(self) -> list[RankOutput]:
        return self.results

    def close(self) -> None:
        self.closed = True


def seen(sm_clock_mhz: int = 1700, throttle: tuple[str, ...] = ()) -> dict[str, Any]:
    """What NVML might say."""
    return {
        "sm_clock_mhz": sm_clock_mhz,
        "memory_clock_mhz": 3201,
        "power_w": 650.0,
        "temperature_c": 55,
        "throttle": list(throttle),
    }


def machine() -> Machine:
    """The machine, copying 10 GB/s by its own account."""
    return Machine(
        device=torch.device("cpu"),
        stopwatch=HostStopwatch(),
        copy_bytes_per_s=1e10,
        build=TorchEngine,
        snapshot=seen,
        environment=dict(ENVIRONMENT),
    )


def quiet(phase: str, done: int, total: int) -> None:
    """Progress that nobody sees."""

"""A machine without a GPU: an engine of plain torch, and a stopwatch of the host's clock."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from flashmoe.bench.machine import Machine
from flashmoe.bench.peers import Case, Peer, PeerOptions, PeerWork, Unavailable
from flashmoe.bench.stopwatch import Prepared, in_turn
from flashmoe.config import MoEConfig, MoEWeights
from flashmoe.errors import FlashmoeError
from flashmoe.reference import moe, route
from flashmoe.world.base import EngineOptions, Launch, RankOutput, Status

ENVIRONMENT = {
    "gpu": "none",
    "driver": None,
    "torch": torch.__version__,
    "triton": None,
    "commit": "unknown",
}


class HostStopwatch:
    """No graphs, no flush; ``order`` keeps the works of each round as they ran.

    ``clock`` gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
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
                began = self.clock()
                works[at].run()
                times[at].append((self.clock() - began) * 1e3)
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
        self.tiling = None
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


class TorchLayer:
    """The layer of a model; ``spoil`` makes its result another, or says that a call failed."""

    spoil: str | None = None

    def __init__(self, config: MoEConfig, weights: MoEWeights, tokens: int) -> None:
        if self.spoil == "no room":
            raise FlashmoeError("the heap needs more than there is")
        self.config, self.weights = config, weights
        self.calls = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        routed = route(x, self.weights, self.config)
        y = moe(x, self.weights, self.config, routed.ids, routed.weights).to(x.dtype)
        return y + 1 if self.spoil == "wrong" else y

    def check(self) -> None:
        if self.spoil == "fails when timed" and self.calls > 1:
            raise FlashmoeError("a call failed")


def seen(sm_clock_mhz: int = 1700, throttle: tuple[str, ...] = ()) -> dict[str, Any]:
    """What NVML might say."""
    return {
        "sm_clock_mhz": sm_clock_mhz,
        "memory_clock_mhz": 3201,
        "power_w": 650.0,
        "temperature_c": 55,
        "throttle": list(throttle),
    }


class FakeMachine(Machine):
    """A machine whose context a peer can break."""

    broken = False

    def settle(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class FakePeer(Peer):
    """Behaves as its name says."""

    built: ClassVar[set[str]] = set()  # in this process

    def build(self, case: Case, options: PeerOptions) -> PeerWork:
        if self.name == "bears-no-other" and self.built:
            os.kill(os.getpid(), signal.SIGSEGV)
        self.built.add(self.name)
        if self.name == "absent":
            raise Unavailable("not installed")
        if self.name == "breaks-at-build":
            raise RuntimeError("no such kernel\nand more")

        def forward() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            if self.name == "breaks-the-context":
                FakeMachine.broken = True
            if self.name.startswith("breaks"):
                raise ValueError("shapes do not fit")
            ids, weights = case.gate(case.x)
            y = moe(case.x, case.weights, case.config, ids, weights).to(case.x.dtype)
            if self.name == "loses-a-row":
                y[3] = 0
            if self.name == "not-finite":
                y[0, 0] = torch.nan
            return y, ids, weights

        return PeerWork(forward, "fake 1.0", note="a fake", settings={"block": 3})


def peers(*names: str) -> tuple[Peer, ...]:
    return tuple(FakePeer(name, name, "") for name in names)


def machine() -> Machine:
    """The machine, copying 10 GB/s by its own account."""
    return FakeMachine(
        device=torch.device("cpu"),
        stopwatch=HostStopwatch(),
        copy_bytes_per_s=1e10,
        build=TorchEngine,
        layer=TorchLayer,
        snapshot=seen,
        environment=dict(ENVIRONMENT),
    )


# What a bench opens in a process of its own, found there by name.


def opened() -> Machine:
    """The machine, with one thread: processes of their own inherit no setting of torch's."""
    torch.set_num_threads(1)
    return machine()


def opened_gpu(device: int) -> Machine:
    """The machine in the place of ``gpu_machine``."""
    return opened()


def spoilt_gpu(device: int) -> Machine:
    """The same, but our results are wrong."""
    TorchEngine.spoil = "wrong"
    return opened()


class Dying(TorchEngine):
    """An engine whose process is killed in the first launch of 13 tokens."""

    def launch(self) -> Launch:
        if len(self.x[0]) == 13:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().launch()


def dying_gpu(device: int = 0) -> Machine:
    """The machine, where shapes with T = 13 kill their process."""
    return dataclasses.replace(opened(), build=Dying)


def quiet(phase: str, done: int, total: int) -> None:
    """Progress that nobody sees."""

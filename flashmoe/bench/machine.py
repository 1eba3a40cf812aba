"""The GPU that is timed: its stopwatch, its copy rate, what it says of itself."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from flashmoe import gpu
from flashmoe.bench.ceilings import copy_rate
from flashmoe.bench.stopwatch import CudaStopwatch, Stopwatch
from flashmoe.config import MoEConfig, MoEWeights
from flashmoe.errors import EXIT_NO_GPU, FlashmoeError
from flashmoe.world.base import EngineOptions, Runner


class TimedEngine(Runner, Protocol):
    """An engine that can be enqueued without waiting."""

    tiling: dict[str, Any] | None
    """How its tiles are cut; ``tuned`` in it is None unless a tuning table has a say."""

    def enqueue(self) -> None:
        """One forward on torch's current stream, without waiting for it."""


class TimedLayer(Protocol):
    """The layer as a model calls it: ``flashmoe.MoE``."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """One forward of x [T, H], without waiting for it."""

    def check(self) -> None:
        """Waits for the GPU; raises FlashmoeError if a call failed."""


LayerBuilder = Callable[[MoEConfig, MoEWeights, int], TimedLayer]
"""The layer with its weights, for so many tokens."""

EngineBuilder = Callable[[MoEConfig, MoEWeights, list[int], EngineOptions], TimedEngine]
Snapshot = Callable[[], dict[str, Any] | None]


@dataclass
class Machine:
    """Where and with what a bench runs.  ``snapshot`` is what NVML says now, or None."""

    device: torch.device
    stopwatch: Stopwatch
    copy_bytes_per_s: float
    build: EngineBuilder
    layer: LayerBuilder
    snapshot: Snapshot
    environment: dict[str, Any] = field(default_factory=dict)

    def settle(self) -> None:
        """Waits for the device; raises where an earlier kernel has broken its context."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def require_gpu(device: int) -> None:
    """Raises FlashmoeError (exit code 5) where no GPU here runs the kernel, with a remedy."""
    from flashmoe.session import choose_world

    try:
        choose_world("local", device)
    except FlashmoeError as exc:
        # Its hints end with the host engine, whose times are never set beside a GPU's.
        hint = exc.hint.partition("; or ")[0]
        if hint.startswith("run with --world host"):
            hint = "run it on a machine with a Hopper GPU and driver 580 or newer"
        raise FlashmoeError(f"there is no GPU to time: {exc.message}", hint, EXIT_NO_GPU) from exc


def gpu_machine(device: int) -> Machine:
    """GPU ``device``, made the current one, with its copy rate measured.

    Raises FlashmoeError (exit code 5) where it runs no kernel of ours.
    """
    require_gpu(device)
    from flashmoe.layer import MoE
    from flashmoe.world.local import LocalEngine

    place = torch.device("cuda", device)

    def layer(config: MoEConfig, weights: MoEWeights, tokens: int) -> TimedLayer:
        return MoE(config, weights, max_tokens=tokens, device=place)

    torch.cuda.set_device(place)
    rate = copy_rate(place)
    return Machine(
        device=place,
        stopwatch=CudaStopwatch(place),
        copy_bytes_per_s=rate,
        build=LocalEngine,
        layer=layer,
        snapshot=lambda: gpu.snapshot(device),
        environment=environment(place),
    )


def environment(device: torch.device) -> dict[str, Any]:
    """What a result must be read with: the GPU, and the versions of all that runs on it."""
    from flashmoe.build_info import build_info

    info = build_info()
    seen = gpu.snapshot(device.index) or {}
    properties = torch.cuda.get_device_properties(device)
    try:
        import triton

        triton_version = str(triton.__version__)
    except ImportError:
        triton_version = None
    return {
        "gpu": properties.name,
        "uuid": seen.get("uuid"),
        "sms": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": seen.get("driver"),
        "max_sm_clock_mhz": seen.get("max_sm_clock_mhz"),
        "power_limit_w": seen.get("power_limit_w"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "python": platform.python_version(),
        "flashmoe": info.version,
        "commit": info.revision,
        "kernels": {cubin.file: _digest(cubin.path) for cubin in info.cubins},
    }


def _digest(path: Path) -> str:
    """SHA-256 of a file: tells kernels of one commit apart, where its tree was changed."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Clocks:
    """What NVML said while the device was at work: called now and then, summed up at the end."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._seen: list[dict[str, Any]] = []

    def __call__(self) -> None:
        """Takes one sample."""
        seen = self._snapshot()
        if seen is not None:
            self._seen.append(seen)

    def summary(self) -> dict[str, Any] | None:
        """Least SM clock, greatest power and temperature, all throttle reasons; None of none."""
        if not self._seen:
            return None

        def of(key: str, choose: Callable[[list[Any]], Any]) -> Any:
            values = [seen[key] for seen in self._seen if seen[key] is not None]
            return choose(values) if values else None

        return {
            "samples": len(self._seen),
            "sm_clock_mhz": of("sm_clock_mhz", min),
            "memory_clock_mhz": of("memory_clock_mhz", min),
            "power_w": of("power_w", max),
            "temperature_c": of("temperature_c", max),
            "throttle": sorted({reason for seen in self._seen for reason in seen["throttle"]}),
        }

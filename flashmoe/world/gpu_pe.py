"""A PE on a GPU: the engine of one rank in a process of its own, whatever joins it to the others.

A transport brings a :class:`flashmoe.world.gpu_engine.HeapMemory` whose ``allocate`` gives the one
heap of this rank; ``device_tensor`` makes a tensor of the raw address that a library gives.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flashmoe.errors import EXIT_NO_GPU, FlashmoeError
from flashmoe.world.base import EngineOptions, WorldKind
from flashmoe.world.gpu_engine import GpuEngine, HeapMemory
from flashmoe.world.kernel import check
from flashmoe.world.tiles import extension

if TYPE_CHECKING:
    from flashmoe.config import MoEConfig, MoEWeights
    from flashmoe.world.peers import Peers

_PAGE = 4096


class GpuPeEngine(GpuEngine):
    """Rank ``peers.rank`` of ``options.ranks``, alone in this process on GPU ``options.device``.

    Implements :class:`flashmoe.world.processes.PeEngine`.  Construction, ``reset`` and the growth
    of pools in ``launch`` are collective.  Its flight-recorder slots are those of the board.
    Raises FlashmoeError as GpuEngine does, and where ranks share a GPU without MPS.
    """

    def __init__(
        self,
        config: MoEConfig,
        weights: MoEWeights,
        tokens: list[int],
        options: EngineOptions,
        peers: Peers,
        memory: HeapMemory,
        world: WorldKind,
    ) -> None:
        most = extension().MAX_RANKS
        if not 1 <= options.ranks <= most or len(tokens) != options.ranks:
            raise FlashmoeError(
                f"{options.ranks} ranks: the GPU kernel joins 1 to {most}",
                f"use 1 to {most} ranks",
                2,
            )
        self.world = world
        self._peers = peers
        self._registered = 0
        own = device_uuid(options.device)
        self.gpus = tuple(peers.job.gather("gpu", own))
        on_gpu = self.gpus.count(own)
        if on_gpu > 1:
            require_mps(options.device, on_gpu)
        local = range(peers.rank, peers.rank + 1)
        super().__init__(config, weights, tokens, options, memory, local, on_gpu)
        if options.traced:
            self.clock()  # now: it cannot be asked once the context is lost

    def _agree(self, value: int) -> int:
        return self._peers.least(value)

    def _sm_share(self) -> int:
        # Under MPS the driver may count only those SMs that this client is allowed.
        shown = torch.cuda.get_device_properties(self.device).multi_processor_count
        return min(shown, (physical_sms(self.device.index) or shown) // self.on_gpu)

    def _make_shape(self, pool_rows: int | None, memory: int) -> dict[str, Any]:
        # A test makes pools too small with it, so that all ranks have to grow them together.
        rows = os.environ.get("FLASHMOE_TEST_POOL_ROWS")
        return super()._make_shape(int(rows) if rows else pool_rows, memory)

    def _make_slots(self, actors: int) -> tuple[int, np.ndarray]:
        from cuda.bindings import driver

        slots = self._peers.slots_array(actors)
        address, size = slots.ctypes.data, -(-slots.nbytes // _PAGE) * _PAGE
        flags = driver.CU_MEMHOSTREGISTER_DEVICEMAP | driver.CU_MEMHOSTREGISTER_PORTABLE
        with torch.cuda.device(self.device):
            check(driver.cuMemHostRegister(address, size, flags), "pinning the flight recorder")
            self._registered = address
            reached = check(
                driver.cuMemHostGetDevicePointer(address, 0), "reaching the flight recorder"
            )
        return int(reached), slots

    def _settle(self) -> None:
        """A rank of which nothing starts is there, and does not come: so it goes on only once
        another one has given up, or could have twice over."""
        options = self.options
        if not any(f.kind == "never-starts" and f.rank in self.local for f in options.faults):
            return
        until = time.monotonic() + 2 * max(options.first_s, options.deadline_s)
        while self._word(0, "abort_word") == 0 and time.monotonic() < until:
            time.sleep(0.001)

    def close(self) -> None:
        """Frees everything, as far as the other ranks let it; safe to call twice."""
        super().close()
        if self._registered:
            from cuda.bindings import driver

            driver.cuMemHostUnregister(self._registered)
            self._registered = 0


@dataclass(frozen=True)
class _Raw:
    """Device memory as others see it; ``__cuda_array_interface__`` is the protocol's name."""

    address: int
    nbytes: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.nbytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
        }


def device_tensor(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """uint8 [nbytes] at ``address`` on ``device``, which it neither copies nor keeps."""
    return torch.as_tensor(_Raw(address, nbytes), device=device)


def require_device(device: int) -> None:
    """Makes GPU ``device`` torch's current one.

    Raises FlashmoeError (exit code 5) where torch has no such GPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not 0 <= device < count:
        raise FlashmoeError(
            f"this rank is to run on GPU {device}, and torch sees {count}",
            "start as many ranks a node as it has GPUs, and let each see all of them "
            "(CUDA_VISIBLE_DEVICES; srun --gpus-per-node, not --gpus-per-task)",
            EXIT_NO_GPU,
        )
    torch.cuda.set_device(device)


def device_uuid(device: int) -> bytes:
    """The 16 bytes that name GPU ``device`` among all GPUs."""
    from cuda.bindings import driver

    handle = check(driver.cuDeviceGet(device), "finding the GPU")
    uuid = check(driver.cuDeviceGetUuid(handle), "asking for the GPU's name")
    return ctypes.string_at(uuid.getPtr(), 16)


def native_atomics(own: Any, other: Any) -> bool:
    """Whether adds from the GPU ``own`` to the memory of another one are atomic; both CUdevices.

    Only then may ``own`` count rows at a peer, whose counters others add to as well
    (csrc/device/dispatch.h).  True where the driver does not say.
    """
    from cuda.bindings import driver

    attribute = driver.CUdevice_P2PAttribute.CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
    error, able = driver.cuDeviceGetP2PAttribute(attribute, own, other)
    return int(error) != 0 or bool(able)


def atomics_with(device: int, uuids: Sequence[bytes]) -> list[bool]:
    """Of each GPU by its UUID whether GPU ``device`` and it add to each other's memory atomically.

    True of the same GPU, and of one that is not shown to this process: those of another node are
    reached by pointer over NVLink alone, which has such adds.
    """
    from cuda.bindings import driver

    count = check(driver.cuDeviceGetCount(), "counting the GPUs")
    shown = {device_uuid(index): index for index in range(count)}

    def both_ways(index: int) -> bool:
        own = check(driver.cuDeviceGet(device), "finding the GPU")
        other = check(driver.cuDeviceGet(index), "finding the GPU")
        return native_atomics(own, other) and native_atomics(other, own)

    return [shown.get(uuid, device) == device or both_ways(shown[uuid]) for uuid in uuids]


def require_mps(device: int, ranks: int) -> None:
    """Raises FlashmoeError where ``ranks`` processes on GPU ``device`` would run one after another.

    Their kernels wait for each other, so they must run together: that takes MPS.
    """
    from cuda.bindings import driver

    handle = check(driver.cuDeviceGet(device), "finding the GPU")
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MPS_ENABLED
    error, enabled = driver.cuDeviceGetAttribute(attribute, handle)
    if int(error) == 0 and not enabled:
        pipe = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "")
        raise FlashmoeError(
            f"{ranks} ranks share GPU {device} without MPS, so their kernels would take turns"
            + (f"; no MPS daemon answered in {pipe}" if pipe else ""),
            "let flashmoe start them, which brings its own MPS: --gpus N --ranks-per-gpu "
            f"{ranks}; or start nvidia-cuda-mps-control -d first",
        )


_CORES_PER_SM = 128  # from compute capability 8.6 on, and on 9.0


def physical_sms(device: int) -> int | None:
    """The SMs that GPU ``device`` has, whatever share MPS gives this process; None: unknown."""
    from flashmoe.gpu import ask, handle_of, nvml_session

    with contextlib.suppress(RuntimeError), nvml_session() as nvml:
        handle = handle_of(nvml, device)
        cores = None if handle is None else ask(nvml, nvml.nvmlDeviceGetNumGpuCores, handle)
        return cores // _CORES_PER_SM if cores else None
    return None

"""The ``ipc`` world: ranks are processes of one node, and reach each other's heaps by CUDA IPC.

The launcher imports this too, so torch and the driver are imported where they are used.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import TYPE_CHECKING, Any

from flashmoe.errors import FlashmoeError
from flashmoe.nvlink import unreached, without_atomics
from flashmoe.world.rendezvous import JobFailed

if TYPE_CHECKING:
    import torch

    from flashmoe.config import MoEConfig, MoEWeights
    from flashmoe.world.base import EngineOptions
    from flashmoe.world.gpu_pe import GpuPeEngine
    from flashmoe.world.peers import Peers
    from flashmoe.world.rendezvous import Job

_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE


def pe_engine(
    config: MoEConfig,
    weights: MoEWeights,
    tokens: list[int],
    options: EngineOptions,
    peers: Peers,
) -> GpuPeEngine:
    """The engine of one rank among processes; see :mod:`flashmoe.world.processes`."""
    import torch

    from flashmoe.world.gpu_pe import GpuPeEngine

    if options.no_pointers:
        raise no_pointers_error()
    if peers.job.place.nodes > 1:
        raise several_nodes_error(peers.job.place.nodes)
    memory = IpcMemory(torch.device("cuda", options.device), peers.job)
    return GpuPeEngine(config, weights, tokens, options, peers, memory, "ipc")


def refusal(no_pointers: bool, nodes: int, gpus: int) -> FlashmoeError | None:
    """Why this transport does not serve; None where it does, as far as can be told beforehand."""
    if no_pointers:
        return no_pointers_error()
    if nodes > 1:
        return several_nodes_error(nodes)
    if gpus == 1:
        return None
    if (pair := unreached(gpus)) is not None:
        return unreached_error(*pair)
    pair = without_atomics(gpus)
    return None if pair is None else without_atomics_error(*pair)


def no_pointers_error() -> FlashmoeError:
    """``--no-pointers`` with this transport."""
    return FlashmoeError(
        "--no-pointers leaves put-with-signal alone, which the ipc transport does not have",
        "use --transport nvshmem, or --world host",
        exit_code=2,
    )


def several_nodes_error(nodes: int) -> FlashmoeError:
    """Several nodes with this transport."""
    return FlashmoeError(
        f"the ipc transport joins the GPUs of one node, and the ranks are on {nodes}",
        "use --transport nvshmem",
        exit_code=2,
    )


def unreached_error(one: int, other: int) -> FlashmoeError:
    """GPUs of this node that P2P does not join."""
    return FlashmoeError(
        f"GPU {one} does not reach GPU {other} by pointers, which the ipc transport needs",
        "flashmoe doctor shows who reaches whom (P2P); --transport nvshmem goes by the network",
    )


def without_atomics_error(one: int, other: int) -> FlashmoeError:
    """GPUs of this node that P2P joins, as PCIe does, without atomic adds."""
    return FlashmoeError(
        f"GPU {one} reaches GPU {other} by pointers, but without atomic adds, by which the ipc "
        "transport counts rows",
        "flashmoe doctor shows what joins them (P2P); --transport nvshmem sends such rows by puts",
    )


class IpcMemory:
    """One heap of each rank's own, which the others map by its IPC handle.

    See :class:`flashmoe.world.gpu_engine.HeapMemory`.  Plain ``cuMemAlloc``: a handle is of a whole
    allocation, and torch's allocator hands out parts of larger ones.  A heap is freed only when
    every process has said that it maps it no more; where one no longer says anything, it stays
    until this process ends.
    """

    def __init__(self, device: torch.device, job: Job) -> None:
        self.device, self.job = device, job
        self._own = 0
        self._mapped: dict[int, int] = {}  # by rank

    def allocate(self, nbytes: int) -> list[torch.Tensor]:
        """This rank's heap; see HeapMemory."""
        import torch
        from cuda.bindings import driver

        from flashmoe.world.gpu_pe import device_tensor

        with self._device():
            torch.cuda.empty_cache()  # what torch keeps for itself is no driver's to give
            error, address = driver.cuMemAlloc(nbytes)
        if int(error) != 0:
            raise FlashmoeError(
                f"the GPU gave no heap of {nbytes / 1e9:.1f} GB ({nbytes} bytes) to rank "
                f"{self.job.rank}: {error.name}",
                "use fewer tokens (-T), a smaller layer or fewer ranks a GPU",
            )
        self._own = int(address)
        return [device_tensor(self._own, nbytes, self.device)]

    def peers(self) -> list[int]:
        """Addresses of all heaps; see HeapMemory.

        Raises FlashmoeError where this GPU does not reach another rank's.
        """
        from cuda.bindings import driver

        from flashmoe.world.kernel import check

        with self._device():
            handle = check(driver.cuIpcGetMemHandle(self._own), "sharing the heap")
            said = ctypes.string_at(handle.getPtr(), _HANDLE_BYTES) + self._bus_id()
            for rank, word in enumerate(self.job.gather("heap", said)):
                if rank == self.job.rank:
                    continue
                self._require_reach(rank, word[_HANDLE_BYTES:])
                self._mapped[rank] = self._open(rank, word[:_HANDLE_BYTES])
        return [self._mapped.get(rank, self._own) for rank in range(self.job.world)]

    def barrier(self) -> None:
        """Returns when every process has come here."""
        self.job.barrier("heaps")

    def free(self) -> None:
        """Frees this rank's heap, once no other process maps it."""
        from cuda.bindings import driver

        with self._device():
            self.job.barrier("left")  # nobody is inside a launch that writes through a mapping
            while self._mapped:
                driver.cuIpcCloseMemHandle(self._mapped.popitem()[1])
            self.job.barrier("unmapped")
            if self._own:
                driver.cuMemFree(self._own)
                self._own = 0

    def close(self) -> None:
        """``free`` where all ranks come; else the heap stays, since somebody may still map it."""
        if self._own:
            with contextlib.suppress(FlashmoeError):
                self.free()
            self._own = 0

    def _device(self) -> Any:
        import torch

        return torch.cuda.device(self.device)

    def _bus_id(self) -> bytes:
        from cuda.bindings import driver

        from flashmoe.world.kernel import check

        handle = check(driver.cuDeviceGet(self.device.index), "finding the GPU")
        name = check(driver.cuDeviceGetPCIBusId(32, handle), "asking for the GPU's place")
        return bytes(name).split(b"\0")[0]

    def _require_reach(self, rank: int, bus_id: bytes) -> None:
        """Raises FlashmoeError where the driver says that no pointer goes from here to there, or no
        atomic add.  On the own GPU, which other ranks may share, both do."""
        from cuda.bindings import driver

        from flashmoe.world.gpu_pe import native_atomics

        if bus_id == self._bus_id():
            return
        error, other = driver.cuDeviceGetByPCIBusId(bus_id)
        if int(error) != 0:
            return  # not shown to this process: opening the handle tells
        error, own = driver.cuDeviceGet(self.device.index)
        error, able = driver.cuDeviceCanAccessPeer(own, other)
        if int(error) == 0 and not able:
            raise self._unreached(rank, bus_id, "the driver allows no peer access")
        if not native_atomics(own, other):
            raise FlashmoeError(
                f"rank {self.job.rank}, on the GPU at {self._bus_id().decode()}, reaches the heap "
                f"of rank {rank} on the GPU at {bus_id.decode()} without atomic adds, by which the "
                "ipc transport counts rows",
                "NVLink has them, PCIe mostly not (flashmoe doctor, P2P); --transport nvshmem "
                "sends such rows by puts",
            )

    def _open(self, rank: int, handle: bytes) -> int:
        from cuda.bindings import driver

        opened = driver.CUipcMemHandle()
        ctypes.memmove(opened.getPtr(), handle, _HANDLE_BYTES)
        flag = int(driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
        error, address = driver.cuIpcOpenMemHandle(opened, flag)
        if int(error) != 0:
            reason = self.job.failure()  # a heap goes with its rank
            if reason is not None:
                raise JobFailed(reason, "see that rank's own lines above")
            raise self._unreached(rank, b"", error.name)
        return int(address)

    def _unreached(self, rank: int, bus_id: bytes, why: str) -> FlashmoeError:
        where = f" on the GPU at {bus_id.decode()}" if bus_id else ""
        return FlashmoeError(
            f"rank {self.job.rank}, on the GPU at {self._bus_id().decode()}, does not reach the "
            f"heap of rank {rank}{where}: {why}",
            "flashmoe doctor shows which GPUs reach each other (P2P); every rank must see all of "
            "them (CUDA_VISIBLE_DEVICES); ranks on one GPU: --gpus 1 --ranks-per-gpu N",
        )

"""The ``nvshmem`` world: ranks are processes, and NVSHMEM's symmetric heap joins them.

Heaps are reached by pointer within the reach of NVLink and PCIe, and by put-with-signal beyond it
(docs/design.md, "Beyond pointers").  A PE of NVSHMEM's is a rank.  NVSHMEM says nothing of a rank
that has died, and its collective calls wait for ever: so each comes right behind a barrier in the
job's store, which has a deadline and ends with the name of who is missing, and none is made once
the job has failed.

The launcher imports this too, so torch, the driver and NVSHMEM are imported where they are used.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import re
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.build_info import BuildInfo, build_info
from flashmoe.errors import EXIT_NO_GPU, FlashmoeError
from flashmoe.nvlink import unreached

if TYPE_CHECKING:
    import torch

    from flashmoe.config import MoEConfig, MoEWeights
    from flashmoe.world.base import EngineOptions
    from flashmoe.world.gpu_pe import GpuPeEngine
    from flashmoe.world.peers import Peers
    from flashmoe.world.rendezvous import Job

LIBRARY = "nvidia-nvshmem-cu13"
BINDINGS = "nvshmem4py-cu13"
EXTRA = "pip install 'flashmoe-prof[nvshmem]'"

_UID_BYTES = 128  # nvshmemx_uniqueid_t
_SOCKETS = Path("/tmp")
_QUIET_S = 5.0


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

    class NvshmemEngine(GpuPeEngine):
        flavour = "nvshmem"

    refused = refusal()
    if refused is not None:
        raise refused
    if config.dtype != "bf16":
        raise FlashmoeError(
            f"the nvshmem transport's kernel is compiled for bf16 alone, and this layer is "
            f"{config.dtype}",
            "use --dtype bf16, or, for the GPUs of one node, --transport ipc",
            exit_code=2,
        )
    memory = NvshmemMemory(torch.device("cuda", options.device), peers.job, options.no_pointers)
    return NvshmemEngine(config, weights, tokens, options, peers, memory, "nvshmem")


def numbers(version: str) -> tuple[int, ...]:
    """``3.4.5`` or ``3.4.5.post1`` -> (3, 4, 5)."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def installed(package: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def too_old(library: str, built: str) -> bool:
    """Whether a host library of this version does not load cubins compiled with ``built``.

    A library as old as the cubins' headers or newer loads them, an older one does not.
    """
    return numbers(library) < numbers(built)


def refusal(info: BuildInfo | None = None) -> FlashmoeError | None:
    """Why this installation has no nvshmem transport; None where it has.

    ``info``: None for this installation's.  Asks for no GPU and loads nothing.
    """
    info = info or build_info()
    if "nvshmem" not in info.flavours:
        why = info.why_no_cubins or info.why_no_nvshmem or "it was left out"
        return FlashmoeError(
            f"this build of flashmoe has no kernel for the nvshmem transport: {why}",
            "reinstall flashmoe with pip, which brings NVSHMEM's headers to the build; GPUs of one "
            "node: --transport ipc",
            EXIT_NO_GPU,
        )
    library = installed(LIBRARY)
    lacking = [name for name in (LIBRARY, BINDINGS) if installed(name) is None]
    if lacking or library is None:
        return FlashmoeError(
            f"the nvshmem transport needs {' and '.join(lacking)}, not installed here",
            f"{EXTRA}; GPUs of one node need none: --transport ipc",
            EXIT_NO_GPU,
        )
    if info.nvshmem is not None and too_old(library, info.nvshmem):
        return version_error(library, info.nvshmem)
    return None


def version_error(library: str, built: str) -> FlashmoeError:
    """A host library that does not load our cubins."""
    return FlashmoeError(
        f"NVSHMEM {library} is installed, and flashmoe's kernels are compiled with {built}, which "
        "an older library does not load",
        f"pip install '{LIBRARY}>={built}'",
        EXIT_NO_GPU,
    )


def environment(nodes: int, pointers: bool, heap_bytes: int) -> dict[str, str]:
    """NVSHMEM's variables for ranks on so many nodes, each with a heap of ``heap_bytes``.

    ``pointers``: they reach all ranks of a node.  What a machine may need otherwise (the network's
    transport, its interface) is left to whoever has set it; what the kernel relies on is not.
    """
    mib = -(-heap_bytes // 2**20)
    fixed = {
        # Multicast stays off, and NCCL out of what takes no part in a launch.
        "NVSHMEM_DISABLE_NVLS": "1",
        "NVSHMEM_DISABLE_NCCL": "1",
        # The ranks of a GPU run at once by the size of their grids, not by shares of MPS's, whose
        # sum NVSHMEM would hold against them.
        "NVSHMEM_IGNORE_CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "1",
        # The kernel holds no code for it (csrc/device/transport.h).
        "NVSHMEM_IB_ENABLE_IBGDA": "0",
        # Heaps grow on demand where the driver maps memory itself; elsewhere this is all there is.
        "NVSHMEM_SYMMETRIC_SIZE": f"{mib}M",
    }
    usual = {}
    if nodes == 1:  # no network takes part, and none need be there
        usual["NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME"] = "lo"
        if pointers:
            usual["NVSHMEM_REMOTE_TRANSPORT"] = "none"
    return fixed | {name: os.environ.get(name, value) for name, value in usual.items()}


def tidy(pids: Collection[int]) -> None:
    """Removes what processes that were killed have left of NVSHMEM's.

    They hand each other their heaps by sockets that have names, with both processes' numbers.
    """
    for path in _SOCKETS.glob("nvshmem-socket-*-*"):
        if not {int(n) for n in path.name.split("-")[2:] if n.isdigit()}.isdisjoint(pids):
            path.unlink(missing_ok=True)


class NvshmemMemory:
    """This rank's heap, allocated at once on all ranks, which NVSHMEM maps for its peers.

    See :class:`flashmoe.world.gpu_engine.HeapMemory`.  NVSHMEM starts with the first ``allocate``,
    when the size is known.  With ``no_pointers`` every other rank counts as out of reach.
    """

    def __init__(self, device: torch.device, job: Job, no_pointers: bool) -> None:
        self.device, self.job, self.no_pointers = device, job, no_pointers
        self._own = 0
        self._beyond = False  # some rank is beyond pointers
        self._started = False

    def allocate(self, nbytes: int) -> list[torch.Tensor]:
        """This rank's heap; see HeapMemory."""
        from nvshmem import bindings

        from flashmoe.world.gpu_pe import device_tensor

        with self._device():
            if not self._started:
                self._start(nbytes)
            self.job.barrier("allocating")
            self._own = int(bindings.malloc(nbytes))
        if self._own == 0:
            raise FlashmoeError(
                f"NVSHMEM gave no heap of {nbytes / 1e9:.1f} GB ({nbytes} bytes) to rank "
                f"{self.job.rank}",
                "use fewer tokens (-T), a smaller layer or fewer ranks a GPU; NVSHMEM_DEBUG=WARN "
                "tells more",
            )
        return [device_tensor(self._own, nbytes, self.device)]

    def peers(self) -> list[int]:
        """Addresses of all heaps, 0 where rows go by puts; see HeapMemory.

        They do where no pointer reaches, and where one does, but without atomic adds, by which the
        kernel counts the rows that it stores at a peer.
        """
        from nvshmem import bindings

        self.job.barrier("heaps")  # theirs can be written into
        own, rank = self._own, self.job.rank
        stores = [False] * self.job.world if self.no_pointers else self._counted()
        reached = [
            own if r == rank else int(bindings.ptr(own, r)) if stores[r] else 0
            for r in range(self.job.world)
        ]
        self._beyond = 0 in reached
        return reached

    def barrier(self) -> None:
        """Returns when every process has come here, and what each has put has arrived."""
        if self._beyond and self.job.failure() is None:
            self._quiet()
        self.job.barrier("symmetric")

    def free(self) -> None:
        """Frees this rank's heap, and with it all others'."""
        from nvshmem import bindings

        self.barrier()  # nobody is inside a launch
        own, self._own = self._own, 0
        if own:
            bindings.free(own)

    def close(self) -> None:
        """``free`` and NVSHMEM's end where all ranks come; else the process's end does both."""
        if self._own == 0:
            return
        with contextlib.suppress(FlashmoeError, RuntimeError):  # the latter of a broken context
            self.free()
            self.job.barrier("finalizing")
            import nvshmem.core

            nvshmem.core.finalize()
        self._own = 0

    def _counted(self) -> list[bool]:
        """By rank whether its GPU and this one add to each other's memory atomically; collective.

        Both ranks must hold the same of each other, since who is beyond pointers is awaited in
        another way: so what one of them denies is so for both.
        """
        from flashmoe.world.gpu_pe import atomics_with, device_uuid

        rank = self.job.rank
        with self._device():
            uuids = self.job.gather("gpus", device_uuid(self.device.index))
            said = self.job.gather("atomics", bytes(atomics_with(self.device.index, uuids)))
        return [bool(said[rank][r] and said[r][rank]) for r in range(self.job.world)]

    def _device(self) -> Any:
        import torch

        return torch.cuda.device(self.device)

    def _start(self, heap_bytes: int) -> None:
        """NVSHMEM on all ranks, and known to the kernel's module; collective."""
        pointers = unreached() is None
        os.environ.update(environment(self.job.place.nodes, pointers, heap_bytes))
        import nvshmem.core
        from cuda.core import Device

        from flashmoe.world.kernel import code

        library, built = nvshmem.core.get_version().libnvshmem_version, build_info().nvshmem
        if built is not None and too_old(library, built):  # another one than pip knows of
            raise version_error(library, built)
        first = self.job.rank == 0
        uid = nvshmem.core.get_unique_id(empty=not first)
        own = ctypes.string_at(uid.ptr, _UID_BYTES) if first else b""
        said = self.job.gather("nvshmem", own)[0]
        ctypes.memmove(uid.ptr, said, _UID_BYTES)
        # By its library: the bindings' module_init prints.
        library_handle = int(code(self.device.index, "nvshmem").handle)
        self.job.barrier("starting")
        try:
            nvshmem.core.init(
                device=Device(self.device.index),
                uid=uid,
                rank=self.job.rank,
                nranks=self.job.world,
                initializer_method="uid",
            )
            kernels = nvshmem.core.NvshmemKernelObject.from_handle(library_handle)
            nvshmem.core.library_init(kernels)
        except Exception as exc:  # of several classes, some of them without a base of their own
            raise FlashmoeError(
                f"NVSHMEM {library} does not start: {exc}",
                "its own lines are above, more of them with NVSHMEM_DEBUG=WARN; several nodes: is "
                "NVSHMEM_REMOTE_TRANSPORT what this network needs? GPUs of one node: --transport "
                "ipc",
            ) from exc
        self._started = True

    def _quiet(self) -> None:
        """Until this rank's puts have arrived; not for ever, since a rank may be dead."""
        import torch
        from nvshmem import bindings

        with self._device():
            stream = torch.cuda.current_stream()
            bindings.quiet_on_stream(stream.cuda_stream)
            done = torch.cuda.Event()
            done.record(stream)
        until = time.monotonic() + _QUIET_S
        while not done.query():
            if time.monotonic() > until:
                raise FlashmoeError(
                    f"what rank {self.job.rank} has put did not arrive in {_QUIET_S:g} s",
                    "a rank or its network is gone: see the other ranks' lines",
                )
            time.sleep(0.001)

"""Worlds whose ranks are processes, one a PE: which there are, and what each must give.

A world is a module with a function

    pe_engine(config, weights, tokens, options, peers) -> PeEngine

that builds the engine of rank ``peers.rank`` (``peers`` is a :class:`flashmoe.world.peers.Peers`):
it makes this rank's heap, exchanges what the others need to reach it (``peers.job.gather``), fills
its table of peers, and puts its flight-recorder slots where ``peers.slots(actors)`` says, so that
the launcher can read them when the process is gone.  On GPUs all but the heaps is
:class:`flashmoe.world.gpu_pe.GpuPeEngine`'s.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from flashmoe.errors import FlashmoeError
from flashmoe.world.base import Engine
from flashmoe.world.mps import private_mps

if TYPE_CHECKING:
    import numpy as np

    from flashmoe.keeper import Keeper
    from flashmoe.session import Request


MODULES = {
    "host": "flashmoe.world.host",
    "ipc": "flashmoe.world.ipc",
    "nvshmem": "flashmoe.world.nvshmem",
}


class PeEngine(Engine, Protocol):
    """An engine of one rank; what ``Engine`` gives a rank, this gives for its own alone.

    So ``load``, ``outputs``, ``rings``, ``flight`` and ``counts_seen`` are of one rank.
    ``launch`` is collective, and each rank may see another status of a launch that failed.
    """

    gpus: tuple[bytes, ...]
    """The GPU of each rank, by a name of its own among all GPUs; empty where there are none."""

    @property
    def shape(self) -> dict[str, Any]:
        """The fields of csrc/core/shape.h by name, as ``tile_plan`` takes them."""

    @property
    def family(self) -> str:
        """The tile family's name."""

    @property
    def lost(self) -> bool:
        """Whether what a launch left in the device's memory cannot be read any more.

        Then only ``options``, ``shape``, ``family``, ``clock`` and ``flight`` still answer.
        """

    def chunk_counts(self) -> np.ndarray:
        """uint32 [1, chunks, E]: rows of each of this rank's chunks in the last launch."""

    def now_ns(self) -> int:
        """The clock that stamps this rank's events, now."""

    def abort(self) -> None:
        """Raises abort on every rank that is within reach; from any thread."""


def choose_transport(
    asked: str, world: str, *, no_pointers: bool = False, nodes: int = 1, gpus: int = 1
) -> tuple[str, str]:
    """The transport for a world of processes, and why that one.

    ``asked``: auto, ipc or nvshmem.  ``gpus``: how many of this node's take part.  Raises
    FlashmoeError where it does not go with ``world``, with ``no_pointers``, with so many ``nodes``
    or with how these GPUs are joined, or this installation lacks it.
    """
    if world == "host":
        if asked != "auto":
            raise FlashmoeError(
                f"--transport {asked} joins GPUs, and the host engine has none",
                "leave --transport out",
                exit_code=2,
            )
        return "host", "the host engine's ranks share memory"
    refusals: list[FlashmoeError] = []
    for name in ("ipc", "nvshmem") if asked == "auto" else (asked,):
        refused = _refusal(name, no_pointers, nodes, gpus)
        if refused is None:
            if asked != "auto":
                return name, "asked for"
            return name, "; ".join(r.message for r in refusals) or "all ranks are on one node"
        refusals.append(refused)
    raise refusals[-1]


def _refusal(name: str, no_pointers: bool, nodes: int, gpus: int) -> FlashmoeError | None:
    """Why a transport cannot be had here."""
    from flashmoe.world import ipc, nvshmem

    return nvshmem.refusal() if name == "nvshmem" else ipc.refusal(no_pointers, nodes, gpus)


@contextlib.contextmanager
def surroundings(transport: str, request: Request, keeper: Keeper) -> Iterator[dict[str, str]]:
    """What must be there while the PEs run, and their extra environment variables.

    Several PEs of one GPU run under an MPS of their own.  What is started is also told the keeper,
    which ends it should this process be killed.
    """
    if transport == "host" or request.ranks_per_gpu == 1:
        yield {}
        return
    with private_mps(keeper) as environment:
        yield environment


def builder(transport: str) -> Any:
    """``pe_engine`` of a transport that ``choose_transport`` gave."""
    return importlib.import_module(MODULES[transport]).pe_engine

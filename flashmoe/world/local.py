"""The ``local`` world: W virtual ranks on one GPU, all of the protocol in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flashmoe.errors import FlashmoeError
from flashmoe.world.base import EngineOptions, WorldKind
from flashmoe.world.gpu_engine import GpuEngine
from flashmoe.world.tiles import extension

if TYPE_CHECKING:
    from flashmoe.config import MoEConfig, MoEWeights


class LocalEngine(GpuEngine):
    """W virtual ranks on GPU ``options.device``, each with its own arena and its own SMs.

    ``tokens``: T of each rank.  ``pool_rows`` overrides the pool's capacity (None: the worst case,
    in which nothing can overflow).  Implements :class:`flashmoe.world.base.Engine`.  Raises
    FlashmoeError for a shape that the kernel does not take, and before allocating where the
    device's memory does not hold it, with the bytes needed.
    """

    world: WorldKind = "local"

    def __init__(
        self,
        config: MoEConfig,
        weights: MoEWeights,
        tokens: list[int],
        options: EngineOptions,
        pool_rows: int | None = None,
    ) -> None:
        most = extension().MAX_RANKS
        if not 1 <= options.ranks <= most or len(tokens) != options.ranks:
            raise FlashmoeError(
                f"{options.ranks} virtual ranks: one GPU takes 1 to {most}",
                f"use --ranks 1 to {most}",
                2,
            )
        memory = LocalMemory(torch.device("cuda", options.device), options.ranks)
        super().__init__(
            config,
            weights,
            tokens,
            options,
            memory,
            local=range(options.ranks),
            pool_rows=pool_rows,
        )


class LocalMemory:
    """Heaps of ``ranks`` virtual ranks on one GPU; see ``flashmoe.world.gpu_engine.HeapMemory``."""

    def __init__(self, device: torch.device, ranks: int) -> None:
        self.device, self.ranks = device, ranks
        self._heaps: list[torch.Tensor] = []

    def allocate(self, nbytes: int) -> list[torch.Tensor]:
        """A heap a rank, by torch's allocator."""
        self._heaps = [
            torch.empty(nbytes, dtype=torch.uint8, device=self.device) for _ in range(self.ranks)
        ]
        return list(self._heaps)

    def peers(self) -> list[int]:
        """Addresses of all heaps."""
        return [heap.data_ptr() for heap in self._heaps]

    def barrier(self) -> None:
        """One process has nobody to wait for."""

    def free(self) -> None:
        """Gives the heaps back to the device, once nobody else refers to them."""
        self._heaps = []
        torch.cuda.empty_cache()

    close = free

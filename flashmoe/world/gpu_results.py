"""What a launch on a GPU left behind: results, counts and words in the heaps, and the rings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flashmoe.trace import schema
from flashmoe.trace.diagnosis import NOT_SEEN
from flashmoe.world.base import RankOutput, RingDump
from flashmoe.world.images import Images


@dataclass(frozen=True)
class HeapReader:
    """Reads the heaps of the ranks ``local``, uint8 tensors on whatever device.

    ``layout`` says where each section begins, ``shape`` how large things are, by the names of
    csrc/core/heap.h and csrc/core/shape.h.  Without ``heaps``, given back for larger ones that the
    memory did not hold, there are no counts.
    """

    heaps: Sequence[torch.Tensor]
    layout: Mapping[str, int]
    shape: Mapping[str, Any]
    local: range

    def section(self, index: int, name: str, size: int) -> torch.Tensor:
        """The first ``size`` bytes of a section of the ``index``-th heap, on the CPU."""
        at = self.layout[name]
        return self.heaps[index][at : at + size].cpu()

    def word(self, index: int, name: str) -> int:
        """A word of 64 bits of the ``index``-th heap."""
        return int(self.section(index, name, 8).view(torch.int64).item())

    def outputs(self, y: Sequence[torch.Tensor], tokens: Sequence[int]) -> list[RankOutput]:
        """Results of the last launch, one a rank here, on the CPU.

        ``y``: those of the ranks here; ``tokens``: T of each of all ranks.
        """
        k = self.shape["top_k"]
        result = []
        for index, rank in enumerate(self.local):
            size, form = 4 * tokens[rank] * k, (tokens[rank], k)
            ids = self.section(index, "ids", size).view(torch.int32).reshape(form)
            weights = self.section(index, "weights", size).view(torch.float32).reshape(form)
            result.append(RankOutput(y[index].cpu(), ids, weights))
        return result

    def chunk_counts(self) -> np.ndarray:
        """uint32 [ranks here, chunks, E]: rows of each chunk of the last launch.

        Those of a chunk whose gate has not run yet are 0, as all are without heaps.
        """
        chunks, experts = self.shape["chunks"], self.shape["experts"]
        counts = np.zeros((len(self.local), chunks, experts), np.uint32)
        for index in range(len(self.heaps)):
            words = self.section(index, "histogram", 4 * chunks * experts).numpy()
            counts[index] = words.view(np.uint32).reshape(chunks, experts)
        # A new heap holds poison, which makes no plan.
        most = -(-self.shape["max_tokens"] // chunks) * self.shape["top_k"]
        counts[counts.sum(axis=2, dtype=np.uint64) > most] = 0
        return counts

    def counts_seen(self, epoch: int) -> np.ndarray:
        """Counts as each rank here holds them in launch ``epoch``, from 1: uint32 [ranks here, W,
        E], by [holder, source, expert].

        ``NOT_SEEN`` where that source's count has not arrived, and everywhere without heaps.  A
        word is a count below its epoch; launches take the two halves of the section in turn, so
        that the half may still hold those of two launches before.
        """
        ranks, experts = self.shape["world"], self.shape["experts"]
        seen = np.full((len(self.local), ranks, experts), NOT_SEEN, np.uint32)
        for index in range(len(self.heaps)):
            words = self.section(index, "counts", 16 * ranks * experts).numpy().view(np.uint64)
            both = words.reshape(2, ranks, experts)[epoch & 1]
            arrived = both >> np.uint64(32) == epoch
            seen[index] = np.where(arrived, both & np.uint64(0xFFFFFFFF), NOT_SEEN)
        return seen


def read_rings(headers: torch.Tensor, records: torch.Tensor, capacity: int) -> RingDump:
    """The rings of ``capacity`` records an actor, as far as any of them is filled.

    ``headers`` and ``records`` are bytes: uint8 [n, header] and [n, capacity, record].
    """
    read = headers.cpu().numpy().reshape(-1).view(schema.RING_HEADER)
    stored = int(min(capacity, read["count"].max(initial=0)))
    written = records[:, :stored].contiguous().cpu().numpy()
    shape = (len(read), stored)
    return RingDump(read, written.reshape(-1).view(schema.RECORD).reshape(shape))


def read_images(
    tiles: torch.Tensor, tiles_made: torch.Tensor, steps: torch.Tensor, launches: range
) -> tuple[Images, np.ndarray]:
    """What n CTAs left of their tiles and launches, as far as their logs are filled, and the first
    steps of each lane's last launch, STEP_IMAGE [n, lanes], zero where it began none.

    Bytes: ``tiles`` uint8 [n, capacity, image], ``tiles_made`` uint8 [n, cursor], ``steps`` uint8
    [n, capacity + 1, lanes, image], of the iterations ``launches``.
    """
    cursors = tiles_made.cpu().numpy().reshape(-1).view(schema.LOG_CURSOR)
    made = cursors["count"].astype(np.int64)
    stored = min(tiles.shape[1], int(made.max(initial=0)))
    kept = tiles[:, :stored].contiguous().cpu().numpy()
    begun = min(steps.shape[1] - 1, launches.stop)
    # The last place is that of launches which are not kept: the last one lies there.
    every = torch.cat([steps[:, :begun], steps[:, -1:]], dim=1).cpu().numpy()
    of_steps = every.reshape(-1).view(schema.STEP_IMAGE).reshape(every.shape[:3])
    of_tiles = kept.reshape(-1).view(schema.TILE_IMAGE).reshape(kept.shape[:2])
    last = of_steps["begin_ns"].argmax(axis=1)[:, None]
    return (
        Images(of_tiles, made, of_steps[:, :begun], len(launches)),
        np.take_along_axis(of_steps, last, axis=1)[:, 0],
    )

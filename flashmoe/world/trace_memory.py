"""Where the lanes of a GPU's ranks leave their traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flashmoe.trace import schema
from flashmoe.trace.schema import RingMode
from flashmoe.world.base import RingDump
from flashmoe.world.gpu_results import read_images, read_rings
from flashmoe.world.image_spans import Work
from flashmoe.world.images import Images, headers_of, with_images
from flashmoe.world.sizing import TraceRoom


class TraceMemory:
    """On a device, of the CTAs of ``ranks``, ``chunks`` each: rings, images of tiles, and the first
    steps of launches, as many as there is ``room`` for.

    ``launches``, which methods take, is the iteration that the next launch would be.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        chunks: int,
        room: TraceRoom,
        mode: RingMode,
        device: torch.device,
    ) -> None:
        def memory(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.uint8, device=device)

        lanes, ctas = schema.N_LANES, len(ranks) * chunks
        self._ranks, self._room, self._mode = ranks, room, mode
        self._headers = memory(ctas * lanes, schema.RING_HEADER.itemsize)
        self._records = memory(ctas * lanes, room.records, schema.RECORD.itemsize)
        self._images = memory(ctas, room.tiles, schema.TILE_IMAGE.itemsize)
        self._images_made = memory(ctas, schema.LOG_CURSOR.itemsize)
        # One more, for launches that are not kept.
        self._steps = memory(ctas, room.launches + 1, lanes, schema.STEP_IMAGE.itemsize)
        self.empty()

    def arguments(self) -> dict[str, Any]:
        """What a launch is told of it, by the names of :func:`flashmoe.world.arguments.pack`."""
        return {
            "rings": self._headers.data_ptr(),
            "records": self._records.data_ptr(),
            "ring_capacity": self._room.records,
            "keep_last": self._mode is RingMode.KEEP_LAST,
            "images": self._images.data_ptr(),
            "images_written": self._images_made.data_ptr(),
            "steps": self._steps.data_ptr(),
            "image_capacity": self._room.tiles,
            "step_capacity": self._room.launches,
        }

    def empty(self) -> None:
        """There is nothing in it any more."""
        for counts in (self._headers, self._images_made, self._steps):
            counts.zero_()
        self._aside: tuple[Images, np.ndarray] | None = None
        self._first = 0  # iteration of the first launch that has not been put aside

    def put_steps_aside(self, launches: int, first: int) -> None:
        """Before iterations go on from ``first``, which there was: a launch's steps lie where its
        iteration says, and what is there already would be overwritten."""
        self._aside = self._read(launches)
        self._first = first
        self._steps.zero_()

    def dump(self, launches: int, work: Work) -> RingDump:
        """All rings; see :func:`flashmoe.world.images.with_images`."""
        images, last = self._read(launches)
        capacity = self._room.records
        rings = read_rings(self._headers, self._records, capacity)
        headers = headers_of(rings.headers, last, self._ranks, capacity, self._mode)
        return with_images(RingDump(headers, rings.records), images, work, capacity=capacity)

    def _read(self, launches: int) -> tuple[Images, np.ndarray]:
        """Images, also those put aside, and each lane's last first steps."""
        since = range(self._first, launches)
        images, last = read_images(self._images, self._images_made, self._steps, since)
        if self._aside is None:
            return images, last
        before, last_before = self._aside
        return images.behind(before), np.where(last["begin_ns"] != 0, last, last_before)

"""Where the lanes of a GPU's ranks leave their traces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from flashmoe.trace import schema
from flashmoe.world.base import RingDump
from flashmoe.world.gpu_results import read_images, read_rings
from flashmoe.world.images import Images, with_images


class TraceMemory:
    """On a device, of so many CTAs: a ring of ``records`` records a lane, images of ``tiles``
    tiles a CTA, and the first steps of ``launches`` launches a lane.

    Methods take the launches that there were since epochs began, less those before the rings were
    emptied.
    """

    def __init__(
        self, ctas: int, records: int, tiles: int, launches: int, device: torch.device
    ) -> None:
        def memory(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.uint8, device=device)

        lanes = schema.N_LANES
        self._capacity, self._tiles, self._launches = records, tiles, launches
        self._headers = memory(ctas * lanes, schema.RING_HEADER.itemsize)
        self._records = memory(ctas * lanes, records, schema.RECORD.itemsize)
        self._images = memory(ctas, tiles, schema.TILE_IMAGE.itemsize)
        self._images_made = torch.empty(ctas, dtype=torch.int64, device=device)
        # One more, for launches that are not kept.
        self._steps = memory(ctas, launches + 1, lanes, schema.STEP_IMAGE.itemsize)
        self.empty()

    def arguments(self) -> dict[str, Any]:
        """What a launch is told of it, by the names of :func:`flashmoe.world.arguments.pack`."""
        return {
            "rings": self._headers.data_ptr(),
            "records": self._records.data_ptr(),
            "ring_capacity": self._capacity,
            "images": self._images.data_ptr(),
            "images_written": self._images_made.data_ptr(),
            "steps": self._steps.data_ptr(),
            "image_capacity": self._tiles,
            "step_capacity": self._launches,
        }

    def empty(self) -> None:
        """There is nothing in it any more."""
        for counts in (self._headers, self._images_made, self._steps):
            counts.zero_()
        self._aside: Images | None = None

    def put_steps_aside(self, launches: int) -> None:
        """Before epochs begin anew: a launch's steps lie where its iteration says, and what is
        there already would be overwritten."""
        images = self._read_images(launches)
        self._aside = replace(images, steps=images.steps.copy())
        self._steps.zero_()

    def dump(
        self, launches: int, *, gathers: bool, ranks: int, top_k: int, hidden: int, columns: int
    ) -> RingDump:
        """All rings; see :func:`flashmoe.world.images.with_images`."""
        return with_images(
            read_rings(self._headers, self._records, self._capacity),
            self._read_images(launches),
            capacity=self._capacity,
            gathers=gathers,
            ranks=ranks,
            top_k=top_k,
            hidden=hidden,
            columns=columns,
        )

    def _read_images(self, launches: int) -> Images:
        images = read_images(self._images, self._images_made, self._steps, launches)
        return images.behind(self._aside)

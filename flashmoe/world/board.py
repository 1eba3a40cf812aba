"""Memory that a launcher shares with its PEs: flight-recorder slots, and a mailbox for clocks.

It is anonymous (``memfd_create``): no name in any file system, so that nothing can be left behind
whoever dies when, and no limit of /dev/shm, which containers keep small.  The launcher reads a PE's
slots here, also after the PE is gone.
"""

from __future__ import annotations

import mmap
import os

import numpy as np

from flashmoe.trace import schema

MAX_CTAS = 1024
"""Of a rank; memory that is never written is never there."""

HEADER = np.dtype(
    [
        ("actors", "<u8"),  # slots in use, once the engine is built
        ("turn", "<u8"),  # clock exchange: who is served, plus 1 (in rank 0's header)
        ("ping", "<u8"),  # of this rank: the number of its last question
        ("pong", "<u8"),  # of the last answer to it
        ("there_ns", "<u8"),  # and what the reference clock was then
    ]
)
_PAGE = 4096
_REGION = _PAGE + MAX_CTAS * schema.N_LANES * schema.FLIGHT_SLOT.itemsize


class Board:
    """A region a rank: a header, then slots in the order (CTA, lane)."""

    def __init__(self, fd: int, ranks: int, shared: bool = True) -> None:
        self.fd = fd
        self.shared = shared  # with other processes
        self.ranks = ranks
        self._map = mmap.mmap(fd, ranks * _REGION)

    @classmethod
    def make(cls, ranks: int, shared: bool = True) -> Board:
        """A new one, all zeros; its ``fd`` can be handed to children."""
        fd = os.memfd_create("flashmoe-board")
        os.ftruncate(fd, ranks * _REGION)
        return cls(fd, ranks, shared)

    def header(self, rank: int) -> np.ndarray:
        """``HEADER`` [1] of a rank, to be read and written in place."""
        return np.frombuffer(self._map, HEADER, 1, rank * _REGION)

    def slots(self, rank: int) -> np.ndarray:
        """``FLIGHT_SLOT`` [MAX_CTAS * lanes] of a rank, in place."""
        count = MAX_CTAS * schema.N_LANES
        return np.frombuffer(self._map, schema.FLIGHT_SLOT, count, rank * _REGION + _PAGE)

    def flight(self, actors: int) -> np.ndarray:
        """A copy of all ranks' first ``actors`` slots, in (rank, CTA, lane) order."""
        return np.concatenate([self.slots(rank)[:actors] for rank in range(self.ranks)])

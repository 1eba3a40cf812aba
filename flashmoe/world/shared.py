"""What joins host engines that run one rank each: heaps in memory that all of them map."""

from __future__ import annotations

import mmap
import os
import time

import numpy as np

from flashmoe.errors import FlashmoeError
from flashmoe.world.peers import Peers
from flashmoe.world.rendezvous import JobFailed


class SharedPeers(Peers):
    """``flashmoe.world.host.Peers`` over anonymous shared memory, on one node.

    Each rank makes its own heap (``memfd_create``), tells the others where its descriptor is, and
    maps theirs through /proc; a descriptor is closed as soon as all have mapped it.
    """

    def __init__(self, peers: Peers) -> None:
        super().__init__(peers.job, peers.board)
        if self.job.place.nodes > 1:
            raise FlashmoeError(
                "the host engine's processes share memory, and are on "
                f"{self.job.place.nodes} nodes",
                "start them on one node",
                exit_code=2,
            )
        self._maps: list[mmap.mmap] = []

    def share(self, heap_bytes: int) -> list[int]:
        """Addresses of all ranks' heaps, zeroed, as this process maps them; collective."""
        fd = os.memfd_create(f"flashmoe-heap-{self.rank}")
        try:
            os.ftruncate(fd, heap_bytes)
            places = self.job.gather("heap", f"/proc/{os.getpid()}/fd/{fd}".encode())
            maps = [self._open(place.decode(), r, heap_bytes) for r, place in enumerate(places)]
            self.job.barrier("mapped")
        finally:
            os.close(fd)
        self._maps = maps  # the heaps before stay mapped until here
        return [np.frombuffer(m, np.uint8).ctypes.data for m in maps]

    def _open(self, place: str, rank: int, heap_bytes: int) -> mmap.mmap:
        try:
            fd = os.open(place, os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            time.sleep(0.5)  # who started us may know more by then
            reason = self.job.failure() or f"rank {rank} is gone: {exc.strerror} for its heap"
            raise JobFailed(reason, "see that rank's own lines above") from exc
        try:
            return mmap.mmap(fd, heap_bytes)
        finally:
            os.close(fd)

"""Ranks as threads of the tests' process, with a store of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch.distributed import HashStore

from flashmoe.errors import FlashmoeError
from flashmoe.world.rendezvous import Job, Place


def each_rank(ranks: int, act: Callable[[Job], Any], timeout_s: float) -> list[Any]:
    """What ``act`` gives on each rank, all at once.

    A FlashmoeError fails the job, and is given like a result.
    """
    store, out = HashStore(), [None] * ranks

    def one(rank: int) -> None:
        place = Place(rank, ranks, rank, ranks, 1, "test", "", 0)
        job = Job(place, store, timeout_s=timeout_s)
        try:
            out[rank] = act(job)
        except FlashmoeError as exc:
            job.fail(f"rank {rank}: {exc.message}")
            out[rank] = exc

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out

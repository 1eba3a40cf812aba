"""Engines of one rank each, joined by shared heaps: here all in one process, a thread an engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flashmoe._host")

from flashmoe.config import MoEConfig
from flashmoe.tokens import random_tokens
from flashmoe.trace import schema
from flashmoe.weights import random_weights
from flashmoe.world import host
from flashmoe.world.base import EngineOptions, Fault, Status
from flashmoe.world.host import HostEngine

CONFIG = MoEConfig(hidden=64, intermediate=72, experts=8, top_k=2)


class Room:
    """What the ranks share: a barrier, and their heaps and slots."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.heaps: list[Any] = [None] * ranks
        self.said = [0] * ranks
        self.slots = [np.zeros(64, schema.FLIGHT_SLOT) for _ in range(ranks)]
        self.kept: list[np.ndarray] = []


class Peers:
    """``flashmoe.world.host.Peers`` in plain memory."""

    def __init__(self, room: Room, rank: int) -> None:
        self.room, self.rank = room, rank

    def share(self, heap_bytes: int) -> list[int]:
        own = np.zeros(heap_bytes + 4096, np.uint8)
        self.room.kept.append(own)
        self.room.heaps[self.rank] = -(-own.ctypes.data // 4096) * 4096
        self.room.barrier.wait()
        heaps = list(self.room.heaps)
        self.room.barrier.wait()
        return heaps

    def slots(self, actors: int) -> int:
        return int(self.room.slots[self.rank].ctypes.data)

    def least(self, value: int) -> int:
        self.room.said[self.rank] = value
        self.room.barrier.wait()
        least = min(self.room.said)
        self.room.barrier.wait()
        return least

    def ready(self) -> None:
        self.room.barrier.wait()


def on_each(
    tokens: list[int], x: list[torch.Tensor], act: Callable[[HostEngine], Any], **options: Any
) -> list[Any]:
    """What ``act`` gives for each rank's engine, all at once."""
    room, out = Room(len(tokens)), [None] * len(tokens)
    options.setdefault("deadline_s", 30.0)
    chosen = EngineOptions(ranks=len(tokens), **options)

    def one(rank: int) -> None:
        engine = HostEngine(
            CONFIG, random_weights(CONFIG, 0), tokens, chosen, peers=Peers(room, rank)
        )
        engine.load([x[rank]])
        out[rank] = act(engine)
        room.barrier.wait()
        engine.close()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(tokens))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return out


@pytest.mark.parametrize("no_pointers", [False, True])
def test_the_bits_are_those_of_one_engine(no_pointers: bool) -> None:
    tokens = [31, 0, 18]
    x = random_tokens(tokens, CONFIG, 0)
    whole = HostEngine(CONFIG, random_weights(CONFIG, 0), tokens, EngineOptions(ranks=3))
    whole.load(x)
    assert whole.launch().status is Status.OK
    expected = whole.outputs()

    def act(engine: HostEngine) -> Any:
        for _ in range(3):
            assert engine.launch().status is Status.OK
        (out,) = engine.outputs()
        return out, engine.chunk_counts()

    found = on_each(tokens, x, act, no_pointers=no_pointers)
    counts = whole.routing().chunk_counts
    for rank, (out, mine) in enumerate(found):
        assert torch.equal(out.y, expected[rank].y)
        assert torch.equal(out.ids, expected[rank].ids)
        assert (mine[0] == counts[rank]).all()


@pytest.mark.parametrize("no_pointers", [False, True])
def test_pools_too_small_grow_on_all_ranks_alike(
    monkeypatch: pytest.MonkeyPatch, no_pointers: bool
) -> None:
    """All tokens are alike: their rows go to two experts of eight; pools hold twice the mean."""
    tokens = [16] * 8
    x = [torch.ones(t, CONFIG.hidden, dtype=torch.bfloat16) for t in tokens]
    limit = 600_000  # of heaps; what is free stays out of it
    monkeypatch.setattr(host, "available_bytes", lambda: limit)
    monkeypatch.setattr(host, "_require_memory", lambda needed: None)

    def act(engine: HostEngine) -> Any:
        first = engine.shape["pool_rows"]
        launch = engine.launch()
        assert launch.status is Status.OK
        assert engine.launch().status is Status.OK
        return first, engine.shape["pool_rows"], launch.rows_needed

    found = on_each(tokens, x, act, no_pointers=no_pointers)
    (one,) = set(found)
    assert one[0] < one[1] == one[2]


def test_a_rank_of_which_nothing_starts_is_waited_for_and_ends_with_the_others() -> None:
    tokens = [20, 20]
    x = random_tokens(tokens, CONFIG, 0)
    found = on_each(
        tokens, x, lambda engine: engine.launch().status,
        deadline_s=0.3, first_deadline_s=0.3, faults=(Fault("never-starts", 1),),
    )  # fmt: skip
    assert found == [Status.HANG, Status.HANG]

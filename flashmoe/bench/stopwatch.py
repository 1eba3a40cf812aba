"""How time is taken: works in turn, L2 flushed before each, CUDA graphs, device events."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from flashmoe.errors import one_line

FLUSH_BYTES = 256 << 20
"""More than any GPU's L2 holds (50 MB on Hopper)."""

WARMUP_CALLS = 3
WARMUP_ROUNDS = 3

METHOD = (
    "median and quartiles by device events; every work of a shape once a round, in shuffled order; "
    f"before each {FLUSH_BYTES >> 20} MB are written and {FLUSH_BYTES >> 20} MB of others read, so "
    f"that L2 holds nothing of use and nothing to write back; {WARMUP_ROUNDS} rounds dropped"
)


@dataclass
class Prepared:
    """A work ready to be timed: ``run`` replays its graph, or calls it where there is none.

    ``work`` is kept because a graph reads and writes what its work holds, and does not hold it.
    ``output`` is what the last call to capture or to warm up returned; a replay writes it anew.
    ``why_eager`` is empty where there is a graph.
    """

    work: Callable[[], Any]
    run: Callable[[], Any]
    output: Any
    graph: bool
    why_eager: str = ""


class Stopwatch(Protocol):
    """Prepares works and times them in turn."""

    def prepare(self, work: Callable[[], Any], why_eager: str = "") -> Prepared:
        """Warms ``work`` up and captures it, unless ``why_eager`` says why it cannot be.

        A capture that fails is no error: the work then runs eagerly, and ``why_eager`` tells why.
        Whatever warming up raises goes through.
        """

    def rounds(
        self, works: Sequence[Prepared], count: int, during: Callable[[], None] | None = None
    ) -> list[list[float]]:
        """Times each work once a round: ms [work][round].

        ``during`` is called twice while the device is at work, in a round of the middle and in the
        last.
        """


class CudaStopwatch:
    """The stopwatch of one GPU, on torch's current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        half = FLUSH_BYTES // 8
        self._write = torch.zeros(half, dtype=torch.int64, device=device)
        self._read = torch.zeros(half, dtype=torch.int64, device=device)
        self._sum = torch.zeros((), dtype=torch.int64, device=device)

    def prepare(self, work: Callable[[], Any], why_eager: str = "") -> Prepared:
        """See :class:`Stopwatch`."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARMUP_CALLS):
                output = work()
        torch.cuda.current_stream(self.device).wait_stream(side)
        torch.cuda.synchronize(self.device)
        if why_eager:
            return Prepared(work, work, output, False, why_eager)
        del output
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = work()
        except Exception as exc:  # whatever a peer does that no graph can hold
            gc.collect()
            torch.cuda.synchronize(self.device)
            why = f"cannot be captured: {one_line(exc)}"
            return Prepared(work, work, work(), False, why)
        graph.replay()
        torch.cuda.synchronize(self.device)
        return Prepared(work, graph.replay, output, True)

    def rounds(
        self, works: Sequence[Prepared], count: int, during: Callable[[], None] | None = None
    ) -> list[list[float]]:
        """See :class:`Stopwatch`."""
        times: list[list[float]] = [[] for _ in works]
        for turn in range(-WARMUP_ROUNDS, count):
            marks = []
            for at in in_turn(len(works), turn):
                begin = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                self._flush()
                begin.record()
                works[at].run()
                end.record()
                marks.append((at, begin, end))
            if during is not None and turn in (count // 2, count - 1):
                during()
            torch.cuda.synchronize(self.device)
            if turn >= 0:
                for at, begin, end in marks:
                    times[at].append(begin.elapsed_time(end))
        return times

    def _flush(self) -> None:
        self._write.zero_()
        # Written lines are still to go to memory, and would in somebody's time: push them out.
        torch.sum(self._read, dim=0, out=self._sum)


def in_turn(works: int, turn: int) -> list[int]:
    """The order of works in round ``turn``: shuffled, so that none always follows the same one."""
    order = list(range(works))
    random.Random(turn).shuffle(order)
    return order

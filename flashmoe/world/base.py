"""What every world gives: an engine that runs launches and hands over what they left behind."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol

from flashmoe.errors import FlashmoeError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from flashmoe.config import MoEConfig
    from flashmoe.tuning import Tiling

DEADLINE_S = 10.0
"""How long a wait may last where nobody says otherwise."""

FIRST_DEADLINE = 4
"""A launch's first deadline, where none is given, over the others: a peer may still be loading."""

RingMode = Literal["keep-first", "keep-last"]
WorldKind = Literal["host", "local", "ipc", "nvshmem"]


class Status(IntEnum):
    """How a launch ended; mirrors ``enum class Status`` in csrc/core/events.h."""

    OK = 0
    HANG = 1
    OVERFLOW = 2
    BAD_IDS = 3
    HOST_ABORT = 4


class DeviceLost(FlashmoeError):
    """The context of a rank's GPU is broken: of its memory nothing can be read any more."""

    def __init__(self, why: Exception) -> None:
        first = str(why).strip().partition("\n")[0]
        super().__init__(
            f"its GPU context is broken: {first}",
            "one rank killed inside its kernel takes along the others on its GPU: see all ranks' "
            "lines; else compute-sanitizer tells more",
        )


@dataclass(frozen=True)
class Fault:
    """An injected fault, for tests of the diagnosis.

    ``never-starts``: ``rank``'s actors do not begin.  ``lost-signal``: ``rank`` moves the rows of
    ``expert`` but never publishes them.  ``wrong-count``: ``rank`` tells ``peer`` one row too many
    for ``expert`` (host engine only).  ``slow``: ``rank`` sleeps ``seconds`` before each unit of
    work (host engine only).  Where ranks are processes, ``killed`` and ``raises``: the process of
    ``rank`` is killed, or fails, at ``point``: ``start``, before it meets the others; ``joined``,
    after; ``kernel``, ``seconds`` after its first launch began.
    """

    kind: Literal["never-starts", "lost-signal", "wrong-count", "slow", "killed", "raises"]
    rank: int
    peer: int = -1
    expert: int = -1
    seconds: float = 0.0
    point: str = ""


PROCESS_FAULTS = ("killed", "raises")
"""Faults of the process, not of the engine: they strike at a point of ``flashmoe.pe.run_pe``."""


@dataclass(frozen=True)
class EngineOptions:
    """How to run, as opposed to what.

    ``sms_per_rank`` None: all of the device's SMs shared evenly (GPU), 2 (host).  ``deadline_s``
    bounds every wait; ``first_deadline_s`` replaces it in the first launch (None: FIRST_DEADLINE
    times the former).  ``ring_capacity`` is in records an actor; None derives it from the plan's
    worst case.  With ``no_pointers`` every other rank counts as beyond the reach of pointers: rows
    and signals go by put-with-signal (host engine).  Without ``in_place`` a rank alone copies its
    rows to its pool as several do, to be compared with these (GPU).  ``tiling`` None: as the tuning
    table has it, or untuned (GPU).
    """

    ranks: int = 1
    sms_per_rank: int | None = None
    traced: bool = False
    deadline_s: float = DEADLINE_S
    first_deadline_s: float | None = None
    ring_capacity: int | None = None
    ring_mode: RingMode = "keep-first"
    device: int = 0
    no_pointers: bool = False
    in_place: bool = True
    faults: tuple[Fault, ...] = ()
    tiling: Tiling | None = None

    @property
    def first_s(self) -> float:
        """The deadline that holds in the first launch."""
        return self.first_deadline_s or FIRST_DEADLINE * self.deadline_s


@dataclass
class RingDump:
    """All rings as the engine hands them over, one entry an actor, in (rank, cta, lane) order.

    ``headers``: structured array of ``flashmoe.trace.schema.RING_HEADER`` [n].  ``records``:
    structured array of ``RECORD`` [n, capacity]; only the first min(count, capacity) of a row were
    written.
    """

    headers: np.ndarray
    records: np.ndarray


@dataclass
class Launch:
    """One launch's outcome.

    ``elapsed_ms`` is by device events on a GPU (launch to completion), by the host's monotonic
    clock on the host engine.  ``rows_needed`` is set with OVERFLOW.
    """

    status: Status
    elapsed_ms: float
    iteration: int
    rows_needed: int = 0


@dataclass
class RankOutput:
    """One rank's results: y [T, H] in the dtype, ids int32 [T, k], weights float32 [T, k]."""

    y: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


@dataclass
class ClockInfo:
    """The engine's clock: its source by name, its measured step, and what one record costs."""

    source: str
    step_ns: float
    record_cost_ns: float
    sm_mhz: float | None = None


@dataclass
class Routing:
    """Rows of the last launch: ``chunk_counts`` uint32 [W, chunks, E], and the tiles in order.

    ``tiles`` is a structured array with the columns of plan.parquet but ``iter``: rank, tile, gemm,
    expert, row_tile, row_tile_global, col_tile, rows, height, cols, depth, family.
    """

    chunk_counts: np.ndarray
    tiles: np.ndarray


class Runner(Protocol):
    """What runs forwards: of an engine, all that a caller needs who reads no trace of it."""

    sms_per_rank: int

    def load(
        self,
        tokens: list[torch.Tensor],
        ids: list[torch.Tensor] | None = None,
        routing_weights: list[torch.Tensor] | None = None,
    ) -> None:
        """Sets each rank's input: x [T, H] dtype; with external routing ids and weights [T, k]."""

    def launch(self) -> Launch:
        """Runs one forward of all ranks and waits for it.  Never raises for a status but OK."""

    def outputs(self) -> list[RankOutput]:
        """Results of the last launch, one a rank, on the CPU."""

    def close(self) -> None:
        """Frees everything; safe to call twice."""


class Engine(Runner, Protocol):
    """A world with weights loaded.  Not thread-safe; one launch at a time.

    Built by ``HostEngine(config, weights, tokens, options)`` or ``LocalEngine(...)``, where
    ``tokens`` is the T of each rank.  Construction raises FlashmoeError before it allocates where
    the shape does not fit, with the bytes needed.
    """

    world: WorldKind
    config: MoEConfig
    options: EngineOptions
    tokens: tuple[int, ...]
    ring_capacity: int
    tiling: dict[str, Any] | None
    """How its tiles are cut, as run.json says it; None where there is nothing to tune."""

    def routing(self) -> Routing:
        """Counts and tile plan of the last launch."""

    def rings(self) -> RingDump:
        """Every actor's ring since construction or ``reset_rings``; empty where not traced."""

    def reset_rings(self) -> None:
        """Empties the rings, so that warm-up launches leave no records; iterations restart at 0."""

    def flight(self) -> np.ndarray:
        """Flight-recorder slots, ``flashmoe.trace.schema.FLIGHT_SLOT`` [n], also while hung."""

    def counts_seen(self) -> np.ndarray:
        """Counts of the last launch as each rank holds them, uint32 [W, W, E].

        Indices are [holder, source, expert]; 0xffffffff where a word has not arrived.
        """

    def clock(self) -> ClockInfo:
        """The clock that stamped the events."""

    def reset(self) -> None:
        """Clears a sticky abort: signals zero, epoch 0.  Collective over the ranks."""

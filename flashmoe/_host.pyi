"""The compiled side of flashmoe that needs no GPU."""

from collections.abc import Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray


TILE_M: int = 16

TILE_STEP: int = 1

TILE_N1: int = 32

TILE_N2: int = 64

WAVE_EXPERTS: int = 4

FAMILY: str = 'host-16x32'

LANES: int = 6

MAX_RANKS: int = 8

def vector_unit() -> str:
    """The instruction set that the engine's products use."""

def cycles_mhz() -> float:
    """Measured rate of the cycle counter."""

def clock_step_ns() -> float:
    """Smallest step of the clock seen just now."""

def now_ns() -> int:
    """The engine's clock."""

def skew_clock(offset_ns: int, drift: float) -> None:
    """
    Makes the engine's clock wrong, to test how clocks are aligned: `offset_ns` ahead, and from now on faster by the factor 1 + `drift`.
    """

def record_cost_ns() -> float:
    """What one span costs, measured just now."""

class EngineConfig:
    def __init__(self, shape: dict, dtype: str, tokens: Sequence[int], traced: bool, ring_capacity: int, keep_last: bool, deadline_ns: int, first_deadline_ns: int, faults: Sequence[tuple[str, int, int, int, float]], ranks: tuple[int, int], no_pointers: bool) -> None: ...

    @property
    def bytes_needed(self) -> int:
        """Bytes an engine of this allocates."""

class Engine:
    def __init__(self, config: EngineConfig, gate: Annotated[NDArray[numpy.uint16], dict(order='C', device='cpu', writable=False)], bias: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)] | None, up: Annotated[NDArray[numpy.uint16], dict(order='C', device='cpu', writable=False)], down: Annotated[NDArray[numpy.uint16], dict(order='C', device='cpu', writable=False)], heaps: Sequence[int], slots: int) -> None:
        """
        `heaps`: the address of every rank's, and `slots` of the own flight slots, where ranks are processes; else empty and 0.
        """

    def load(self, rank: int, x: Annotated[NDArray[numpy.uint16], dict(order='C', device='cpu', writable=False)], ids: Annotated[NDArray[numpy.int32], dict(order='C', device='cpu', writable=False)] | None, weights: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)] | None) -> None: ...

    def launch(self) -> tuple[int, int, int]:
        """(status, elapsed ns, rows needed) of one forward."""

    def abort(self) -> None: ...

    def reset(self) -> None: ...

    def resize_pools(self, pool_rows: int, heaps: Sequence[int]) -> None:
        """
        Undoes the last launch and gives every pool this many rows; `heaps` as at the start.
        """

    def reset_rings(self) -> None: ...

    @property
    def iteration(self) -> int: ...

    def y(self, arg: int, /) -> object: ...

    def ids(self, arg: int, /) -> object: ...

    def weights(self, arg: int, /) -> object: ...

    def rings(self) -> object: ...

    def records(self) -> object: ...

    def flight(self) -> object: ...

    def counts_seen(self) -> object: ...

    def chunk_counts(self) -> object: ...

def heap_layout(shape: dict, in_place: bool = False) -> dict:
    """
    Offsets in bytes of every section of a rank's heap, and what they are sized by.  `in_place`: as launch_args() says; a rank alone then has no pool.
    """

def plan(shape: dict, chunk_counts: Annotated[NDArray[numpy.uint32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)]) -> dict:
    """
    The tiles of all ranks in order, one uint32 array a column, from rows [W, chunks, E].
    """

def units(shape: dict, tokens: int) -> dict | None:
    """
    Where so few tokens of a rank alone may go by units: the fields of the shape that these change.
    """

def launch_args(shape: dict, heaps: Sequence[int], ranks: list, local_ranks: int, ring_capacity: int, keep_last: bool, iteration_base: int, deadline_ns: int, first_deadline_ns: int, slots: int, rings: int, records: int, images: int, images_written: int, steps: int, image_capacity: int, step_capacity: int, fault: tuple[int, int, int], signals_at: int = 0, rows_at: int | None = None, by_units: bool = False, in_place: bool = True) -> bytes:
    """
    The bytes of LaunchArgs.  Addresses are ints, 0 for none; `fault` is (lost_signal_rank, lost_signal_expert, never_starts_rank), 0xffffffff for none.  A heap's signals (what lies before the pool) begin at `signals_at` from its address, its rows (the pool and the rest) at `rows_at`: behind the signals where that is None.  `by_units`: few tokens go by units where they may, as units() says.  `in_place`: a rank alone reads its rows where they are, where it may.
    """

THREADS: int = 384

SHARED_BYTES: int = 232448

MAX_EXPERTS: int = 1024

MAX_GROUPS: int = 32

TILE_WEIGHT_ROWS: int = 256

TILE_DEPTH: int = 64

TILE_ROWS: dict = {'bf16' : 176, 'fp16' : 128}

TILE_ROWS_STEP: dict = {'bf16' : 16, 'fp16' : 64}

ROW_BOXES: tuple = (16, 32, 64, 128)

UNIT_WEIGHT_ROWS: int = 128

UNIT_ROWS: int = 8

UNIT_BOX_ROWS: int = 64

UNIT_BOX_ATOM: int = 8

SLICE_ROWS: int = 8

SLICE_BLOCKS: int = 32

def gate_columns(experts: int) -> int:
    """
    Columns of the gate's product; the box of the gate's tensor map has half as many rows.
    """

PAIR_SIZE_AT: int = 18368

def record_layout() -> dict:
    """
    (offset, size) of each field of Record, RingHeader and FlightSlot; under 'structs' their sizes.
    """

"""The bytes and the words of a trace: a mirror of csrc/core's records.h, flight.h and events.h.

The C headers are the truth; ``tests/trace/test_schema.py`` parses them and holds this module to
them.  Everything that reads or writes a trace takes its layouts, names and classes from here.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

import numpy as np


class TimeClass(IntEnum):
    """What an actor's time divides into."""

    NONE = 0
    BUSY = 1
    COMM = 2
    WAIT = 3


class EventKind(IntEnum):
    """What an actor was doing during a record."""

    NONE = 0
    LAUNCH = 1
    GATE = 2
    PLAN = 3
    GEMM1 = 4
    GEMM2 = 5
    COMBINE = 6
    SCHEDULE = 7
    COUNTS = 16
    DISPATCH = 17
    LOAD = 18
    GIVE_BACK = 19
    PUT = 20
    WAIT_BARRIER = 32
    WAIT_COUNTS = 33
    WAIT_ROWS = 34
    WAIT_H = 35
    WAIT_RETURN = 36
    WAIT_LOGITS = 37


class Lane(IntEnum):
    """The lanes of an SM, one actor each."""

    LOAD = 0
    SCHED = 1
    COMM0 = 2
    COMM1 = 3
    MATH0 = 4
    MATH1 = 5


class RecordFlag(IntFlag):
    """Bits of ``Record.flags``."""

    OPEN = 1
    SATURATED = 2
    ITER_WRAPPED = 4
    GAVE_UP = 8


class ActorState(IntEnum):
    """What a flight-recorder slot says of its actor."""

    NEVER_STARTED = 0
    RUNNING = 1
    WAITING = 2
    GAVE_UP = 3
    ABORTED = 4
    DONE = 5


class Step(IntEnum):
    """Of a launch on a GPU, before the roles part."""

    GATE = 0
    COUNTS = 1
    PLAN = 2
    DISPATCH = 3


class RingMode(IntEnum):
    """Which records a full ring keeps."""

    KEEP_FIRST = 0
    KEEP_LAST = 1


KIND_CLASS: Final[dict[EventKind, TimeClass]] = {
    kind: (
        TimeClass.NONE
        if kind in (EventKind.NONE, EventKind.LAUNCH)
        else TimeClass.BUSY
        if kind < 16
        else TimeClass.COMM
        if kind < 32
        else TimeClass.WAIT
    )
    for kind in EventKind
}
KIND_NAME: Final[dict[EventKind, str]] = {kind: kind.name.lower() for kind in EventKind}
LANE_NAME: Final[dict[Lane, str]] = {lane: lane.name.lower() for lane in Lane}
MODE_NAME: Final[dict[RingMode, str]] = {
    RingMode.KEEP_FIRST: "keep-first",
    RingMode.KEEP_LAST: "keep-last",
}

# Kinds whose `aux` is a number of bytes.
BYTE_KINDS: Final = (
    EventKind.COUNTS,
    EventKind.DISPATCH,
    EventKind.GIVE_BACK,
    EventKind.PUT,
)
# Kinds whose `aux` is the span in SM cycles and whose `stall_cycles` is a wait inside it,
# with the reason that wait goes by.
STALL_REASON: Final[dict[EventKind, str]] = {
    EventKind.GEMM1: "operands",
    EventKind.GEMM2: "operands",
    EventKind.LOAD: "stage",
}
# The reason a wait of its own goes by.
WAIT_REASON: Final[dict[EventKind, str]] = {
    EventKind.WAIT_LOGITS: "logits",
    EventKind.WAIT_BARRIER: "barrier",
    EventKind.WAIT_COUNTS: "counts",
    EventKind.WAIT_ROWS: "rows",
    EventKind.WAIT_H: "h",
    EventKind.WAIT_RETURN: "return",
}
REASONS: Final[tuple[str, ...]] = (*WAIT_REASON.values(), "operands", "stage")
# Spans that move bytes between ranks; `load` moves them within an SM's reach.
COMM_KINDS: Final = (EventKind.COUNTS, EventKind.DISPATCH, EventKind.GIVE_BACK)
TENSOR_KINDS: Final = (EventKind.GEMM1, EventKind.GEMM2)

N_KINDS: Final = max(EventKind) + 1
N_LANES: Final = len(Lane)

# By value of the byte in the file, also values no kind has: class and name.
CLASS_OF: Final = np.zeros(256, np.uint8)
for _kind, _class in KIND_CLASS.items():
    CLASS_OF[_kind] = _class
NAME_OF: Final[tuple[str, ...]] = tuple(
    {int(kind): name for kind, name in KIND_NAME.items()}.get(value, f"kind{value}")
    for value in range(N_KINDS)
)

NO_PEER: Final = 0xFFFF
NO_EXPERT: Final = 0xFFFF
NO_TILE: Final = 0xFFFFFFFF
RING_MAGIC: Final = 0x524D4F46
FILE_MAGIC: Final = b"FMOERING"
FILE_VERSION: Final = 1

RECORD: Final = np.dtype(
    [
        ("t0_ns", "<u8"),
        ("dur_ns", "<u4"),
        ("kind", "u1"),
        ("flags", "u1"),
        ("peer", "<u2"),
        ("expert", "<u2"),
        ("iter", "<u2"),
        ("tile", "<u4"),
        ("aux", "<u4"),
        ("stall_cycles", "<u4"),
    ]
)
RING_HEADER: Final = np.dtype(
    [
        ("count", "<u8"),
        ("begin_ns", "<u8"),
        ("end_ns", "<u8"),
        ("begin_cycles", "<u8"),
        ("end_cycles", "<u8"),
        ("magic", "<u4"),
        ("capacity", "<u4"),
        ("rank", "<u2"),
        ("sm", "<u2"),
        ("cta", "<u2"),
        ("lane", "u1"),
        ("mode", "u1"),
        ("next", "<u4"),
        ("reserved", "u1", (60,)),
        ("padding", "u1", (8,)),  # what alignas(128) adds
    ]
)
# In memory alone, never in a file: csrc/core/images.h.
_TILE: Final = np.dtype(
    [
        (name, "<u4")
        for name in ("index", "gemm", "expert", "row_tile", "row_tile_global", "row0", "pool_row0",
                     "rows", "col_tile")
    ]
)  # fmt: skip
_TILE_STAMPS: Final = np.dtype(
    [
        ("begin_ns", "<u8"),
        ("begin_cycles", "<u4"),
        ("products_cycles", "<u4"),
        ("end_cycles", "<u4"),
        ("stall_cycles", "<u4"),
    ]
)
_LOAD_STAMPS: Final = np.dtype(
    [("begin_ns", "<u8"), ("end_ns", "<u8"), ("cycles", "<u4"), ("stall_cycles", "<u4")]
)
_RETURN_PATH: Final = np.dtype([("base", "<u8"), ("end", "<u4"), ("source", "<u4")])
TILE_IMAGE: Final = np.dtype(
    [
        ("tile", _TILE),
        ("wait_kind", "<u4"),
        ("wait_lacking", "<u4"),
        ("iter", "<u2"),
        ("iter_flags", "<u2"),
        ("wait_from", "<u8"),
        ("wait_to", "<u8"),
        ("stamps", _TILE_STAMPS, (2,)),
        ("scheduled_from_ns", "<u8"),
        ("scheduled_ns", "<u8"),
        ("loads", _LOAD_STAMPS, (3,)),
        ("padding", "u1", (8,)),
        ("returns", _RETURN_PATH, (8,)),
    ]
)
LOG_CURSOR: Final = np.dtype([("count", "<u8"), ("next", "<u4"), ("unused", "<u4")])
STEP_IMAGE: Final = np.dtype(
    [
        ("begin_ns", "<u8"),
        ("end_ns", "<u8", (len(Step),)),
        ("left_ns", "<u8"),
        ("past_tiles_ns", "<u8"),
        ("past_tiles_cycles", "<u4"),
        ("iter", "<u2"),
        ("iter_flags", "<u2"),
        ("tokens", "<u4"),
        ("sm", "<u4"),
        ("cycles", "<u4"),
        ("padding", "u1", (4,)),
    ]
)
FLIGHT_SLOT: Final = np.dtype(
    [
        ("since_ns", "<u8"),
        ("epoch", "<u4"),
        ("state", "u1"),
        ("kind", "u1"),
        ("peer", "<u2"),
        ("expert", "<u2"),
        ("rank", "<u2"),
        ("tile", "<u4"),
        ("expected", "<u8"),
        ("seen", "<u8"),
        ("sm", "<u2"),
        ("cta", "<u2"),
        ("lane", "u1"),
        ("reserved", "u1", (19,)),
    ]
)
# Of rings.bin, before the first ring.
FILE_HEADER: Final = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("record_bytes", "<u4"),
        ("header_bytes", "<u4"),
        ("n_rings", "<u4"),
        ("reserved", "<u8"),
    ]
)


def among(kind: np.ndarray, kinds: tuple[EventKind, ...]) -> np.ndarray:
    """bool [n]: which of ``kind`` uint8 [n] are one of ``kinds``; for few, quicker than isin."""
    found = kind == kinds[0]
    for other in kinds[1:]:
        found |= kind == other
    return found

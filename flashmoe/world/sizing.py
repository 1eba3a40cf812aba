"""How large pools, rings and a GPU's share of memory are made: arithmetic, nothing allocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashmoe.trace import schema

if TYPE_CHECKING:
    from flashmoe.config import MoEConfig

LAUNCHES_PER_RING = 16
"""Launches that a GPU's ring of the default capacity holds."""

MOST_RECORDS = 1 << 16
"""Of a GPU's ring of the default capacity."""

MOST_LAUNCHES = 1 << 10
"""Of which a GPU keeps the first steps, where its rings have the default capacity."""


def pool_rows(
    config: MoEConfig, ranks: int, rows: int, worst: int, heap_bytes: int, memory: int | None
) -> int:
    """Rows that a rank's pool holds, where ``rows`` are routed in all.

    The ``worst`` case while the heaps then take at most a quarter of the ``memory`` they share
    (None: unknown), ``heap_bytes`` together; else twice what even routing brings the rank that owns
    most experts.  Launches grow the pools should that overflow.
    """
    if memory is None or heap_bytes <= memory // 4:
        return worst
    owned = -(-config.experts // ranks)
    return min(worst, -(-2 * rows * owned // config.experts))


def ring_capacity(
    config: MoEConfig, tokens: Sequence[int], shape: Mapping[str, Any], waves: int
) -> int:
    """Records that an actor on a GPU may write in LAUNCHES_PER_RING launches, were all rows of one
    rank; ``tokens``: T of each of all ranks."""
    ranks, sms = shape["world"], shape["chunks"]
    tiles = _tiles(config, tokens, shape)
    own = -(-max(tokens) // sms)
    records = 64 + 16 * waves * ranks + (3 + ranks) * tiles + 2 * min(own * config.top_k, 512)
    return min(records * LAUNCHES_PER_RING, MOST_RECORDS)


def tiles_of(capacity: int) -> int:
    """Tiles whose images are kept beside rings of so many records: each is one or more of a lane,
    and most lanes have others."""
    return max(1, capacity // 4)


def launches_of(capacity: int) -> int:
    """Launches whose first steps are kept beside rings of so many records: a power of two, by which
    a kernel that keeps the last ones finds a launch's place."""
    return 1 << max(1, capacity // 8).bit_length() - 1


def image_capacity(config: MoEConfig, tokens: Sequence[int], shape: Mapping[str, Any]) -> int:
    """Tiles that a CTA on a GPU may run in LAUNCHES_PER_RING launches, as in :func:`ring_capacity`,
    while its lanes' records of them would fit theirs."""
    return min(max(_tiles(config, tokens, shape), 1) * LAUNCHES_PER_RING, tiles_of(MOST_RECORDS))


def _tiles(config: MoEConfig, tokens: Sequence[int], shape: Mapping[str, Any]) -> int:
    """Of a CTA and a launch, were all rows of one rank: twice its even share."""
    row_tiles = sum(tokens) * config.top_k // shape["tile_m"] + config.experts
    columns = -(-config.intermediate // shape["tile_n1"]) + -(-config.hidden // shape["tile_n2"])
    return 2 * row_tiles * columns // int(shape["chunks"])


@dataclass(frozen=True)
class TraceRoom:
    """What the trace of a CTA on a GPU has room for: ``records`` and the first steps of
    ``launches`` of each lane, and images of ``tiles``."""

    records: int
    tiles: int
    launches: int

    def bytes_of(self, ctas: int) -> int:
        """Bytes that so many CTAs take: of first steps there is one place more."""
        lane = self.records * schema.RECORD.itemsize + schema.RING_HEADER.itemsize
        lane += (self.launches + 1) * schema.STEP_IMAGE.itemsize
        images = self.tiles * schema.TILE_IMAGE.itemsize + schema.LOG_CURSOR.itemsize
        return ctas * (schema.N_LANES * lane + images)


def trace_room(
    config: MoEConfig,
    tokens: Sequence[int],
    shape: Mapping[str, Any],
    waves: int,
    records: int | None,
) -> TraceRoom:
    """Room beside rings of ``records`` records, or, if None, of :func:`ring_capacity`."""
    if records:
        return TraceRoom(records, tiles_of(records), launches_of(records))
    records = ring_capacity(config, tokens, shape, waves)
    launches = min(launches_of(records), MOST_LAUNCHES)
    return TraceRoom(records, image_capacity(config, tokens, shape), launches)


def gpu_bytes(config: MoEConfig, tokens: Sequence[int], heap_bytes: int) -> int:
    """Bytes on a GPU of the ranks with these ``tokens``, without weights and trace: a heap each,
    x and y."""
    return heap_bytes * len(tokens) + 2 * sum(tokens) * config.row_bytes

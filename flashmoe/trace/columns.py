"""The events of a run as plain NumPy arrays, whatever way Arrow holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flashmoe.trace import schema

if TYPE_CHECKING:
    import pyarrow as pa

# What a null stands for; a column not named here has 0.
_NONE = {"peer": schema.NO_PEER, "expert": schema.NO_EXPERT, "tile": schema.NO_TILE}


def column(table: pa.Table, name: str) -> np.ndarray:
    """One column as an array of integers: names of kinds and lanes become their values.

    A null becomes the "none" of its column (0xffff for peer and expert, 0xffffffff for tile), or 0.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    from flashmoe.trace.decode import kind_codes, lane_codes

    values = table.column(name)
    if pa.types.is_dictionary(values.type):
        return kind_codes(table) if name == "kind" else lane_codes(table)
    if values.null_count:
        values = pc.fill_null(values, pa.scalar(_NONE.get(name, 0), values.type))
    if values.num_chunks == 1:
        return values.chunk(0).to_numpy(zero_copy_only=False)
    return values.to_numpy()


@dataclass(frozen=True)
class Events:
    """Columns of events.parquet, one integer array each, all of one length.

    Times are nanoseconds of the run's clock; ``bytes`` is 0 where the kind moves none.
    """

    rank: np.ndarray
    sm: np.ndarray
    cta: np.ndarray
    lane: np.ndarray
    kind: np.ndarray
    t0_ns: np.ndarray
    dur_ns: np.ndarray
    peer: np.ndarray
    expert: np.ndarray
    tile: np.ndarray
    aux: np.ndarray
    stall_ns: np.ndarray
    iter: np.ndarray
    flags: np.ndarray
    bytes: np.ndarray

    @classmethod
    def of(cls, table: pa.Table) -> Events:
        """Reads a decoded table; columns it does not need (``flow``) may be absent."""
        columns = {name: column(table, name) for name in cls.__dataclass_fields__}
        for name in ("t0_ns", "dur_ns"):  # signed, so that differences are
            columns[name] = columns[name].astype(np.int64, copy=False)
        return cls(**columns)

    def __len__(self) -> int:
        return len(self.t0_ns)

    def start_ns(self) -> int:
        """The run's start: the first event's time, 0 where there is none."""
        return int(self.t0_ns.min()) if len(self) else 0

    def payload(self) -> np.ndarray:
        """Indices of the events whose bytes cross from ``rank`` to ``peer``."""
        moves = (self.kind == schema.EventKind.DISPATCH) | (self.kind == schema.EventKind.PUT)
        return np.flatnonzero(moves & (self.peer != self.rank) & (self.peer != schema.NO_PEER))

"""From rings to one Arrow table of events.

The table's rows keep the order of the rings, and inside a ring the order of writing.  Absent peers,
experts and tiles keep the sentinels of the record (``schema.NO_PEER`` and so on); ``flow`` 0 is no
flow; ``bytes`` is 0 where the kind moves none.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from flashmoe.errors import FlashmoeError
from flashmoe.trace import schema
from flashmoe.trace.rings import Rings, held
from flashmoe.trace.schema import EventKind, RecordFlag, RingMode

_NAMES = pa.dictionary(pa.uint8(), pa.string())

EVENTS = pa.schema(
    [
        ("rank", pa.uint16()),
        ("sm", pa.uint16()),
        ("cta", pa.uint16()),
        ("lane", _NAMES),
        ("kind", _NAMES),
        ("t0_ns", pa.int64()),
        ("dur_ns", pa.int64()),
        ("peer", pa.uint16()),
        ("expert", pa.uint16()),
        ("tile", pa.uint32()),
        ("aux", pa.uint32()),
        ("stall_ns", pa.uint32()),
        ("iter", pa.uint16()),
        ("flow", pa.uint32()),
        ("flags", pa.uint8()),
        ("bytes", pa.uint32()),
    ]
)

_KIND_NAMES = pa.array(schema.NAME_OF, pa.string())
_LANE_NAMES = pa.array([schema.LANE_NAME[lane] for lane in schema.Lane], pa.string())
_KIND_VALUES = {name: value for value, name in enumerate(schema.NAME_OF)}
_KNOWN_KINDS = {name for kind, name in schema.KIND_NAME.items() if kind}
_LANE_VALUES = {name: int(lane) for lane, name in schema.LANE_NAME.items()}

_IS_BYTES = np.zeros(256, bool)
_IS_BYTES[list(schema.BYTE_KINDS)] = True
_HAS_STALL = np.zeros(256, bool)
_HAS_STALL[list(schema.STALL_REASON)] = True

_KIND_BITS = np.uint64(0xFF << 32)
_OPEN_BIT = np.uint64(RecordFlag.OPEN << 40)

# Records decoded at a time: a block and its columns stay in the second-level cache.
_BLOCK = 16384
_THREADS = 2


def kind_codes(table: pa.Table) -> np.ndarray:
    """The `kind` column as uint8 [n] of ``schema.EventKind`` values."""
    return _codes(table.column("kind"), _KIND_VALUES)


def lane_codes(table: pa.Table) -> np.ndarray:
    """The `lane` column as uint8 [n] of ``schema.Lane`` values."""
    return _codes(table.column("lane"), _LANE_VALUES)


def _codes(column: pa.ChunkedArray, values: dict[str, int]) -> np.ndarray:
    parts = []
    for chunk in column.chunks:
        # A reader of Parquet may have put the names into another order: look each up.
        names = chunk.dictionary.to_pylist()
        indices = chunk.indices.to_numpy(zero_copy_only=False)
        wanted = np.array([values.get(name, 0) for name in names], np.uint8)
        same = np.array_equal(wanted, np.arange(len(wanted)))
        parts.append(indices.astype(np.uint8, copy=False) if same else wanted[indices])
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


@dataclass
class _Block:
    """Consecutive records of one ring, and where they come to lie in the table."""

    ring: int
    words: np.ndarray  # uint64 [n, 4], the records
    keep: np.ndarray | None  # those that become rows; None: all
    rows: int
    at: int = 0


def decode(rings: Rings) -> pa.Table:
    """Decodes every ring into one table with the columns of ``EVENTS``.

    A wait's opening record is left out where its closing record follows it.  One that never closed
    keeps ``RecordFlag.OPEN`` and lasts until its actor's end or, where the actor never ended, until
    the last time seen in the trace.  A span whose duration is past the record's 32 bits lasts until
    what its actor did next.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        blocks = [b for found in pool.map(lambda i: _blocks(rings, i), _live(rings)) for b in found]
        rows = 0
        for block in blocks:
            block.at = rows
            rows += block.rows
        columns = {
            f.name: np.empty(rows, f.type.to_pandas_dtype())
            for f in EVENTS
            if f.name not in ("lane", "kind", "flow")
        }
        columns["lane"] = np.empty(rows, np.uint8)
        columns["kind"] = np.empty(rows, np.uint8)
        list(pool.map(lambda b: _fill(rings, b, columns), blocks))
    columns["flow"] = np.zeros(rows, np.uint32)
    _mend_durations(rings, columns)
    return to_table(columns)


def require_known(table: pa.Table) -> None:
    """Raises FlashmoeError where an event has a kind or a lane that there is none of.

    Readers ask; who writes does not, so that a run that went wrong is kept all the same.
    """
    for column, known in (("kind", _KNOWN_KINDS), ("lane", set(schema.LANE_NAME.values()))):
        for chunk in table.column(column).chunks:
            used = np.flatnonzero(np.bincount(chunk.indices.to_numpy(zero_copy_only=False)))
            names = chunk.dictionary.to_pylist()
            strange = sorted({names[i] for i in used} - known)
            if strange:
                raise FlashmoeError(
                    f"the run holds an event of the {column} {strange[0]}, which there is none of",
                    "it is damaged; copy the run again, or trace again",
                )


def to_table(columns: dict[str, np.ndarray]) -> pa.Table:
    """A table with the columns of ``EVENTS``; ``lane`` and ``kind`` are given as codes."""
    names = {"lane": _LANE_NAMES, "kind": _KIND_NAMES}
    arrays = []
    for field in EVENTS:
        values = pa.array(columns[field.name])
        if field.name in names:
            known, most = names[field.name], int(columns[field.name].max(initial=0))
            # Damage too needs a name; require_known() finds it.
            more = [f"{field.name}{value}" for value in range(len(known), most + 1)]
            named = pa.array([*known.to_pylist(), *more], pa.string()) if more else known
            values = pa.DictionaryArray.from_arrays(values, named, safe=False)
        arrays.append(values)
    return pa.Table.from_arrays(arrays, schema=EVENTS)


def _live(rings: Rings) -> list[int]:
    return np.flatnonzero(rings.began & (held(rings.headers) > 0)).tolist()


def _blocks(rings: Rings, ring: int) -> list[_Block]:
    """The ring's records oldest first, in blocks, with the opening records that a close follows."""
    header = rings.headers[ring]
    pieces = rings.in_order(ring)
    # What follows an opening record may lie in the next block: look at whole pieces, then cut.
    closed = [_closed(piece) for piece in pieces]
    if len(pieces) == 2 and closed[0] is not None:
        closed[0][-1] = _closes(pieces[0][-1], pieces[1][0])
    last = closed[-1]
    kept_first = header["mode"] == RingMode.KEEP_FIRST
    if last is not None and kept_first and header["count"] > header["capacity"]:
        # The close of the last record, if there was one, is among the dropped: nobody can tell.
        last[-1] |= bool(pieces[-1][-1]["flags"] & RecordFlag.OPEN)
    blocks = []
    for piece, gone in zip(pieces, closed, strict=True):
        words = piece.view(np.uint64).reshape(-1, 4)
        for a in range(0, len(piece), _BLOCK):
            part = words[a : a + _BLOCK]
            keep = None if gone is None else np.flatnonzero(~gone[a : a + _BLOCK])
            blocks.append(_Block(ring, part, keep, len(part) if keep is None else len(keep)))
    return blocks


def _closed(records: np.ndarray) -> np.ndarray | None:
    """bool [n]: an opening record whose close is the next record; None where nothing is open."""
    opened = (records["flags"] & RecordFlag.OPEN) != 0
    if not opened.any():
        return None
    # Of a record's four words, t0_ns is the first; the second is dur_ns, kind, flags and peer.
    words = records.view(np.uint64).reshape(-1, 4)
    at = np.flatnonzero(opened[:-1])
    one, two = np.take(words, at, axis=0), np.take(words, at + 1, axis=0)
    closes = (one[:, 0] == two[:, 0]) & ((one[:, 1] ^ two[:, 1]) & _KIND_BITS == 0)
    closes &= two[:, 1] & _OPEN_BIT == 0
    gone = np.zeros(len(records), bool)
    gone[at[closes]] = True
    return gone


def _closes(one: np.void, two: np.void) -> bool:
    return bool(
        one["flags"] & RecordFlag.OPEN
        and not two["flags"] & RecordFlag.OPEN
        and one["kind"] == two["kind"]
        and one["t0_ns"] == two["t0_ns"]
    )


def _fill(rings: Rings, block: _Block, columns: dict[str, np.ndarray]) -> None:
    words = block.words if block.keep is None else np.take(block.words, block.keep, axis=0)
    records = np.ascontiguousarray(words).view(schema.RECORD)[:, 0]
    here = slice(block.at, block.at + block.rows)
    header = rings.headers[block.ring]
    for name in ("rank", "sm", "cta", "lane"):
        columns[name][here] = header[name]
    for name in ("t0_ns", "dur_ns", "kind", "flags", "peer", "expert", "iter", "tile", "aux"):
        columns[name][here] = records[name]
    kind, aux = columns["kind"][here], columns["aux"][here]
    np.multiply(aux, _IS_BYTES[kind], out=columns["bytes"][here])
    stall = columns["stall_ns"][here]
    stall[:] = 0
    at = np.flatnonzero(_HAS_STALL[kind])
    if len(at):
        stall[at] = stall_ns(columns["dur_ns"][here][at], records["stall_cycles"][at], aux[at])


def stall_ns(dur_ns: np.ndarray, stall_cycles: np.ndarray, cycles: np.ndarray) -> np.ndarray:
    """The part of a span that its stall takes: round(dur x stall / cycles), at most ``dur_ns``."""
    share = stall_cycles / np.maximum(cycles, 1)
    return np.rint(dur_ns * np.minimum(share, 1.0)).astype(np.uint32)


def _mend_durations(rings: Rings, columns: dict[str, np.ndarray]) -> None:
    """Gives open waits and saturated spans the duration that their record could not hold."""
    t0, dur = columns["t0_ns"], columns["dur_ns"]
    unknown = RecordFlag.OPEN | RecordFlag.SATURATED
    at = np.flatnonzero(columns["flags"] & unknown)
    if not len(at):
        return
    alive = rings.headers[rings.began]
    name = ["rank", "cta", "lane"]
    times = alive[["begin_ns", "end_ns"]].tolist()
    ends = dict(zip(alive[name].tolist(), times, strict=True))
    last = max(int((t0 + dur).max()), int(alive["end_ns"].max(initial=0)))
    # From the back, so that what follows a span is mended before it; such spans are few.
    for i in at[::-1].tolist():
        actor = tuple(int(columns[n][i]) for n in name)
        begin, end = ends[actor]
        own = begin <= t0[i]  # the header knows the end of the last launch only
        if columns["kind"][i] == EventKind.LAUNCH:
            stop = end if own else int(t0[i] + dur[i])
        elif i + 1 < len(t0) and actor == tuple(int(columns[n][i + 1]) for n in name):
            outer = columns["kind"][i + 1] == EventKind.LAUNCH
            stop = int(t0[i + 1] + dur[i + 1]) if outer else int(t0[i + 1])
        else:
            stop = end if own and end else last
        dur[i] = max(int(dur[i]), stop - int(t0[i]))

"""Which event made another possible: dispatch to GEMM1 tile, GEMM2 tile to combine.

Two kinds of edges, both derived from the routing counts and the tile plan, never from times alone:

* ``dispatch`` -> ``gemm1``: from every dispatch record to the first GEMM1 tile of the owner that
  read one of the rows of its dispatch.
* ``gemm2`` -> ``combine``: from the last GEMM2 tile of a row tile, once for every source that has
  rows in it, to that source's first combine record that read them.

A dispatch is the rows of one chunk for one group of experts.  Several lanes of a CTA may have moved
them together, each leaving a record of what it moved itself; which rows those were, the trace does
not say.  So the records of one (iteration, rank, chunk, owner, first expert) stand for one dispatch
of all their bytes, and each of them leads where it leads.

A dispatch record has at most one edge; the other three kinds can have many.  So the edges are a
table of their own, which is the truth, and the single ``flow`` column of the events holds what one
number can: each edge's destination has its own number, which all dispatch records that lead to it
carry too.  A GEMM2 tile that leads to several combines carries the number of one it was the last
thing awaited by, else of the first to begin.  0 is no flow.  ``a.flow = b.flow`` thus finds every
dispatch edge, and of the combine edges those that matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flashmoe.trace.columns import Events, column
from flashmoe.trace.intervals import NEVER, least_by
from flashmoe.trace.schema import EventKind

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Flows:
    """Edges between events, by index into the events, and the column that sums them up.

    ``source``, ``target``: int64 [edges]; ``kind``: uint8 [edges], the EventKind of the source
    (DISPATCH or GEMM2); ``flow``: uint32 [events], 0 where an event has none.
    """

    source: np.ndarray
    target: np.ndarray
    kind: np.ndarray
    flow: np.ndarray


def assign(
    events: pa.Table | Events,
    plan: pa.Table,
    counts: pa.Table,
    row_bytes: int | None = None,
) -> Flows:
    """Finds the edges of a run.

    ``plan`` has the columns of plan.parquet, ``counts`` those of counts.parquet.  Where
    ``row_bytes`` (bytes of one row) is given, a dispatch is held to have moved no more rows than
    the bytes of its records are, so that one dropped from a full ring does not lend its rows to the
    one before.  Edges that point back in time (clocks of two GPUs that disagree) are left out.
    """
    table = events if isinstance(events, Events) else Events.of(events)
    rows = _RowTiles.of(plan)
    units = _Units.of(counts, rows)
    pairs = [_dispatch_edges(table, rows, units, row_bytes), _combine_edges(table, rows, units)]
    source = np.concatenate([pair[0] for pair in pairs])
    target = np.concatenate([pair[1] for pair in pairs])
    forward = table.t0_ns[source] < table.t0_ns[target]
    source, target = source[forward], target[forward]
    return Flows(source, target, table.kind[source], _flow_column(table, source, target))


@dataclass(frozen=True)
class _RowTiles:
    """The row tiles of a run, ordered by (iteration, expert, row tile), and where each begins."""

    group: np.ndarray  # iteration and expert, as one number
    experts: int  # one more than the largest expert id
    owner: np.ndarray  # rank of each tile
    begin: np.ndarray  # first row within the expert
    key: np.ndarray  # (iteration, owner, row tile in the pool), as one number
    stride: int  # of `key`: row tiles of a pool, at most
    tile_row: dict[str, np.ndarray]  # gemm1/gemm2: (iteration, rank, tile) keys and row tile index
    tiles: int
    ranks: int

    @classmethod
    def of(cls, plan: pa.Table) -> _RowTiles:
        get = {
            name: column(plan, name).astype(np.int64)
            for name in ("iter", "rank", "tile", "gemm", "expert", "row_tile", "rows")
        }
        stride = int(get["row_tile"].max(initial=0)) + 1
        experts = int(get["expert"].max(initial=0)) + 1
        tiles = int(get["tile"].max(initial=0)) + 1
        ranks = int(get["rank"].max(initial=0)) + 1
        key = (get["iter"] * ranks + get["rank"]) * stride + get["row_tile"]
        unique, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        group = get["iter"][first] * experts + get["expert"][first]
        order = np.lexsort((get["row_tile"][first], group))
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        group = group[order]
        height = get["rows"][first][order]
        before = np.cumsum(height) - height
        starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]) if len(group) else order
        sizes = np.diff(np.r_[starts, len(group)])
        begin = before - np.repeat(before[starts], sizes)
        tile_row = {}
        for gemm in (1, 2):
            mine = np.flatnonzero(get["gemm"] == gemm)
            tile_key = (get["iter"][mine] * ranks + get["rank"][mine]) * tiles + get["tile"][mine]
            by_key = np.argsort(tile_key, kind="stable")
            tile_row[f"gemm{gemm}"] = np.stack([tile_key[by_key], place[inverse[mine][by_key]]])
        return cls(
            group, experts, get["rank"][first][order], begin, unique, stride, tile_row, tiles, ranks
        )

    def of_events(self, events: Events, index: np.ndarray, gemm: str) -> np.ndarray:
        """Row tile of each tile event in ``index``, -1 where the plan does not know the tile."""
        known, row = self.tile_row[gemm]
        if not len(known):
            return np.full(len(index), -1)
        iteration = events.iter[index].astype(np.int64)
        rank = events.rank[index].astype(np.int64)
        key = (iteration * self.ranks + rank) * self.tiles + events.tile[index]
        at = np.minimum(np.searchsorted(known, key), len(known) - 1)
        valid = (known[at] == key) & (rank < self.ranks) & (events.tile[index] < self.tiles)
        return np.where(valid, row[at], -1)


@dataclass(frozen=True)
class _Units:
    """Rows of one (iteration, source, chunk, expert): where they lie, and the row tiles they meet.

    Entry i of the pair arrays says that unit ``pair_unit[i]`` has rows in row tile
    ``pair_tile[i]``.
    """

    iter: np.ndarray
    source: np.ndarray
    chunk: np.ndarray
    expert: np.ndarray
    rows: np.ndarray
    owner: np.ndarray
    pair_unit: np.ndarray
    pair_tile: np.ndarray

    @classmethod
    def of(cls, counts: pa.Table, tiles: _RowTiles) -> _Units:
        names = ("iter", "source", "chunk", "expert", "rows")
        get = {name: column(counts, name).astype(np.int64) for name in names}
        known = (get["rows"] > 0) & (get["expert"] < tiles.experts)
        group = get["iter"] * tiles.experts + get["expert"]
        known &= np.isin(group, tiles.group)
        order = np.lexsort((get["chunk"], get["source"], group))
        order = order[known[order]]
        get = {name: values[order] for name, values in get.items()}
        group = group[order]
        starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]) if len(group) else order
        total = np.cumsum(get["rows"])
        base = np.repeat((total - get["rows"])[starts], np.diff(np.r_[starts, len(group)]))
        end = total - base  # within the expert
        begin = end - get["rows"]
        # One ascending number for (group, row): rows of an expert fit 2^32.
        keys = (tiles.group << 32) + tiles.begin
        first = np.searchsorted(keys, (group << 32) + begin, side="right") - 1
        last = np.searchsorted(keys, (group << 32) + end - 1, side="right") - 1
        span = last - first + 1
        pair_unit = np.repeat(np.arange(len(group)), span)
        offset = np.arange(len(pair_unit)) - np.repeat(np.cumsum(span) - span, span)
        owner = tiles.owner[first] if len(group) else first
        return cls(
            get["iter"],
            get["source"],
            get["chunk"],
            get["expert"],
            get["rows"],
            owner,
            pair_unit,
            np.repeat(first, span) + offset,
        )


@dataclass(frozen=True)
class _Runs:
    """Where the runs of equal values in an ascending array begin, and how long they are."""

    first: np.ndarray
    size: np.ndarray

    @classmethod
    def of(cls, ascending: np.ndarray) -> _Runs:
        first = np.flatnonzero(np.r_[True, ascending[1:] != ascending[:-1]])
        return cls(first, np.diff(np.r_[first, len(ascending)]))

    def indices(self, runs: np.ndarray) -> np.ndarray:
        """The places of all values of these runs, run after run."""
        size = self.size[runs]
        begin = np.cumsum(size) - size
        return np.arange(size.sum()) + np.repeat(self.first[runs] - begin, size)


def _first_by(keys: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Of each distinct key, the index of its first entry with its least time; keys ascending.

    Keys are numbers from 0, few enough to be places of an array: to sort them takes far longer.
    """
    if not len(keys):
        return np.empty(0, np.int64)
    size = int(keys.max()) + 1
    index = np.flatnonzero(times == least_by(keys, times, size)[keys])
    first = least_by(keys[index], index, size)
    return first[first != NEVER]


def _dispatch_edges(
    events: Events, tiles: _RowTiles, units: _Units, row_bytes: int | None
) -> tuple[np.ndarray, np.ndarray]:
    none = np.empty(0, np.int64)
    dispatch = np.flatnonzero(events.kind == EventKind.DISPATCH)
    gemm1 = np.flatnonzero(events.kind == EventKind.GEMM1)
    if not len(dispatch) or not len(gemm1) or not len(units.iter):
        return none, none
    # The first GEMM1 tile of each row tile, and its begin.
    row = tiles.of_events(events, gemm1, "gemm1")
    gemm1, row = gemm1[row >= 0], row[row >= 0]
    first = _first_by(row, events.t0_ns[gemm1])
    tile_event = np.full(len(tiles.group), -1)
    tile_event[row[first]] = gemm1[first]
    tile_begin = np.where(tile_event >= 0, events.t0_ns[tile_event].astype(np.int64), NEVER)
    # The dispatch of each unit: the last of its (source, chunk, owner) at or before its expert.
    chunks = int(max(units.chunk.max(), events.tile[dispatch].astype(np.int64).max())) + 1
    wide = int(max(tiles.ranks, units.source.max() + 1, events.rank.max() + 1))

    def place(
        iteration: np.ndarray, source: np.ndarray, chunk: np.ndarray, owner: np.ndarray
    ) -> np.ndarray:
        return ((iteration * wide + source) * chunks + chunk) * wide + owner

    record = {
        name: getattr(events, name)[dispatch].astype(np.int64)
        for name in ("iter", "rank", "tile", "peer", "expert", "bytes")
    }
    key = place(record["iter"], record["rank"], record["tile"], record["peer"])
    key = (key << 17) + record["expert"]
    by_key = np.argsort(key, kind="stable")
    members = _Runs.of(key[by_key])  # the records of each dispatch
    dispatch_key = key[by_key][members.first]
    unit_place = place(units.iter, units.source, units.chunk, units.owner)
    at = np.searchsorted(dispatch_key, (unit_place << 17) + units.expert, side="right") - 1
    owned = np.maximum(at, 0)
    valid = (at >= 0) & (dispatch_key[owned] >> 17 == unit_place)
    if row_bytes:
        order = np.lexsort((units.expert, unit_place))
        before = np.empty_like(units.rows)
        before[order] = np.cumsum(units.rows[order]) - units.rows[order]
        begin = least_by(owned[valid], before[valid], len(dispatch_key))
        moved = np.add.reduceat(record["bytes"][by_key], members.first) // row_bytes
        valid &= before - begin[owned] < moved[owned]
    # The earliest tile over all units of a dispatch and all row tiles of a unit.
    unit, tile = units.pair_unit, units.pair_tile
    keep = valid[unit] & (tile_begin[tile] != NEVER)
    unit, tile = unit[keep], tile[keep]
    best = _first_by(owned[unit], tile_begin[tile])
    found = owned[unit[best]]
    return (
        dispatch[by_key[members.indices(found)]],
        np.repeat(tile_event[tile[best]], members.size[found]),
    )


def _combine_edges(
    events: Events, tiles: _RowTiles, units: _Units
) -> tuple[np.ndarray, np.ndarray]:
    none = np.empty(0, np.int64)
    combine = np.flatnonzero(events.kind == EventKind.COMBINE)
    gemm2 = np.flatnonzero(events.kind == EventKind.GEMM2)
    if not len(combine) or not len(gemm2) or not len(units.iter):
        return none, none
    # The last GEMM2 tile of each row tile, and its end.
    row = tiles.of_events(events, gemm2, "gemm2")
    gemm2, row = gemm2[row >= 0], row[row >= 0]
    end = (events.t0_ns[gemm2] + events.dur_ns[gemm2]).astype(np.int64)
    last = _first_by(row, -end)
    tile_event = np.full(len(tiles.group), -1)
    tile_event[row[last]] = gemm2[last]
    # Combine records of each (iteration, source, chunk), in order of time.
    chunks = int(max(units.chunk.max(), events.tile[combine].astype(np.int64).max())) + 1
    wide = int(max(units.source.max() + 1, events.rank.max() + 1))
    record_group = (events.iter[combine].astype(np.int64) * wide + events.rank[combine]) * chunks
    record_group += events.tile[combine]
    names, group_of = np.unique(record_group, return_inverse=True)
    start = events.t0_ns.min()
    begin = (events.t0_ns[combine] - start).astype(np.int64)
    span = int(begin.max()) + 2
    record_key = group_of * span + begin
    by_key = np.argsort(record_key, kind="stable")
    # For each (row tile, unit): the first record of the unit's chunk that began after the tile's
    # end, since an earlier one may have summed other tokens; else the chunk's last, if it ended
    # later than the tile.
    unit, tile = units.pair_unit, units.pair_tile
    wanted = (units.iter * wide + units.source) * chunks + units.chunk
    at = np.minimum(np.searchsorted(names, wanted), len(names) - 1)
    exists = (names[at] == wanted)[unit] & (tile_event[tile] >= 0)
    unit, tile = unit[exists], tile[exists]
    of_tile = tile_event[tile]
    tile_end = (events.t0_ns[of_tile] + events.dur_ns[of_tile] - start).astype(np.int64)
    key = at[unit] * span + np.minimum(tile_end, span - 1)
    found = np.searchsorted(record_key[by_key], key, side="left")
    found = np.minimum(found, len(by_key) - 1)
    later = group_of[by_key[found]] == at[unit]
    later &= begin[by_key[found]] >= tile_end
    final = np.searchsorted(record_key[by_key], (at[unit] + 1) * span, side="left") - 1
    found = np.where(later, found, final)
    finish = begin + events.dur_ns[combine]
    good = later | (finish[by_key[found]] > tile_end)
    unit, tile, found = unit[good], tile[good], found[good]
    target = combine[by_key[found]]
    best = _first_by(tile * wide + units.source[unit], events.t0_ns[target])
    return tile_event[tile[best]], target[best]


def _flow_column(events: Events, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    flow = np.zeros(len(events), np.uint32)
    if not len(source):
        return flow
    names, number = np.unique(target, return_inverse=True)
    number = (number + 1).astype(np.uint32)
    flow[names] = np.arange(1, len(names) + 1)
    end = (events.t0_ns[source] + events.dur_ns[source]).astype(np.int64)
    awaited = np.zeros(len(source), bool)
    awaited[_first_by(number, -end)] = True
    # Of each source: an edge whose target waited for it last, else the one that begins first.
    best = np.lexsort((events.t0_ns[target], ~awaited, source))
    keep = best[np.r_[True, source[best][1:] != source[best][:-1]]]
    flow[source[keep]] = number[keep]
    return flow

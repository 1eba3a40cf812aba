"""A small run made by hand: every event follows from counts that the tests can read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from flashmoe.trace import schema
from flashmoe.trace.decode import EVENTS, to_table
from flashmoe.trace.schema import EventKind, Lane

NONE = {"peer": schema.NO_PEER, "expert": schema.NO_EXPERT, "tile": schema.NO_TILE}
START_NS = 1_790_000_000_123_456_789  # as a wall clock gives: past what a double holds exactly


@dataclass
class Run:
    """Looks like an opened run directory.  ``waves``: the experts that are dispatched together."""

    events: pa.Table
    plan: pa.Table
    counts: pa.Table
    meta: dict[str, Any] = field(default_factory=dict)
    waves: list[list[int]] = field(default_factory=list)


class Table:
    """Events one by one, then as the Arrow table that decoding gives."""

    def __init__(self) -> None:
        self.rows: list[dict[str, int]] = []

    def add(self, kind: EventKind, t0: int, dur: int, **values: int) -> int:
        row = dict.fromkeys((f.name for f in EVENTS), 0) | NONE | values
        row |= {"kind": int(kind), "t0_ns": START_NS + t0, "dur_ns": dur}
        row.setdefault("sm", row["cta"])
        if kind in schema.BYTE_KINDS:
            row["bytes"] = row["aux"]
        self.rows.append(row)
        return len(self.rows) - 1

    def table(self) -> pa.Table:
        columns = {}
        for f in EVENTS:
            dtype = np.uint8 if f.name in ("kind", "lane") else f.type.to_pandas_dtype()
            columns[f.name] = np.array([row[f.name] for row in self.rows], dtype)
        return to_table(columns)


def tables_of(counts: np.ndarray, tile_m: int, columns: tuple[int, int]) -> tuple[pa.Table, ...]:
    """plan and counts tables of one or more iterations.

    ``counts`` [iterations, W, chunks, E]: rows.  A rank's order of tiles is all of GEMM1, then all
    of GEMM2, row tiles before column tiles.
    """
    iterations, world, _, experts = counts.shape
    owner = [((e + 1) * world - 1) // experts for e in range(experts)]
    plan: list[dict[str, int]] = []
    for it in range(iterations):
        of_expert = counts[it].sum(axis=(0, 1))
        of_expert_tiles = -(-of_expert // tile_m)
        for rank in range(world):
            mine = [e for e in range(experts) if owner[e] == rank]
            tile = 0
            for gemm in (1, 2):
                row_tile = 0
                for e in mine:
                    for j in range(of_expert_tiles[e]):
                        for col in range(columns[gemm - 1]):
                            plan.append(
                                {
                                    "iter": it, "rank": rank, "tile": tile, "gemm": gemm,
                                    "expert": e, "row_tile": row_tile,
                                    "row_tile_global": int(of_expert_tiles[:e].sum()) + j,
                                    "col_tile": col,
                                    "rows": int(min(tile_m, of_expert[e] - j * tile_m)),
                                    "height": tile_m,
                                    "cols": 64, "depth": 64, "family": 0,
                                }
                            )  # fmt: skip
                            tile += 1
                        row_tile += 1
    keys = ("iter", "source", "chunk", "expert")
    where = np.argwhere(counts > 0)
    rows = {name: where[:, i] for i, name in enumerate(keys)} | {"rows": counts[counts > 0]}
    return pa.Table.from_pylist(plan), pa.table(rows)


# Which of a CTA's twelve warps are of which lane, as on a GPU.
WARPS_OF = {
    Lane.LOAD: range(1), Lane.SCHED: range(1, 2), Lane.COMM0: range(2, 3), Lane.COMM1: range(3, 4),
    Lane.MATH0: range(4, 8), Lane.MATH1: range(8, 12),
}  # fmt: skip


def shares(rows: int, wave: int, by_lanes: bool) -> list[tuple[Lane, int]]:
    """Who records the dispatch of a unit of ``rows`` rows, and how many of them it moved.

    ``by_lanes``: as on a GPU, where all warps move an owner's first wave and the two comm lanes
    halve the others; else one lane moves it all, in turn.
    """
    if not rows:
        return []
    if not by_lanes:
        return [(Lane.COMM1 if wave % 2 else Lane.COMM0, rows)]
    if wave == 0:
        return [
            (lane, sum(len(range(warp, rows, 12)) for warp in warps))
            for lane, warps in WARPS_OF.items()
        ]
    halves = [(Lane.COMM0, rows // 2), (Lane.COMM1, rows - rows // 2)]
    return [(lane, moved) for lane, moved in halves if moved]


def run_of(
    counts: np.ndarray,
    tile_m: int = 4,
    row_bytes: int = 96,
    sms: int = 2,
    seed: int = 0,
    wave: int = 1,
    by_lanes: bool = False,
) -> Run:
    """A whole run: dispatch, tiles, returns and combine in causal order with random durations.

    Chunk c of a rank is handled by CTA c % sms.  A dispatch moves the rows of ``wave`` experts of
    one owner; ``by_lanes`` as in :func:`shares`.
    """
    rng = np.random.default_rng(seed)
    iterations, world, chunks, experts = counts.shape
    plan, of_counts = tables_of(counts, tile_m, (2, 3))
    owner = [((e + 1) * world - 1) // experts for e in range(experts)]
    t = Table()
    free: dict[tuple[int, int, int], int] = {}

    def span(kind: EventKind, rank: int, cta: int, lane: Lane, after: int = 0, **v: int) -> int:
        actor = (rank, cta, int(lane))
        begin = max(free.get(actor, base), after)
        duration = int(rng.integers(1, 2_000))
        t.add(kind, begin, duration, rank=rank, cta=cta, sm=cta + 17, lane=int(lane), iter=it, **v)
        free[actor] = begin + duration
        return begin + duration

    for it in range(iterations):
        base = it * 10_000_000
        free.clear()
        arrived: dict[int, int] = {}  # expert -> all its rows are there
        for rank in range(world):
            for chunk in range(chunks):
                cta = chunk % sms
                for number, group in waves_of(owner, wave):
                    rows = int(counts[it, rank, chunk, group].sum())
                    for lane, moved in shares(rows, number, by_lanes):
                        end = span(EventKind.DISPATCH, rank, cta, lane, peer=owner[group[0]],
                                   expert=group[0], tile=chunk, aux=moved * row_bytes)  # fmt: skip
                        arrived |= {e: max(arrived.get(e, 0), end) for e in group}
        done: dict[int, int] = {}  # expert -> its last tile of the gemm before
        for gemm, kind in ((1, EventKind.GEMM1), (2, EventKind.GEMM2)):
            ready = dict(arrived if gemm == 1 else done)
            for tile in plan.to_pylist():
                if tile["iter"] != it or tile["gemm"] != gemm:
                    continue
                e, rank, cta = tile["expert"], tile["rank"], tile["tile"] % sms
                lane = Lane.MATH0 if tile["tile"] % 3 else Lane.MATH1
                after = ready[e]
                if free.get((rank, cta, int(lane)), base) < after and gemm == 1:
                    begin = free.get((rank, cta, int(lane)), base)
                    t.add(EventKind.WAIT_ROWS, begin, after - begin, rank=rank, cta=cta,
                          sm=cta + 17, lane=int(lane), iter=it, expert=e, aux=3,
                          tile=tile["row_tile"])  # fmt: skip
                end = span(kind, rank, cta, lane, after, expert=e, tile=tile["tile"], aux=3_500,
                           stall_ns=int(rng.integers(0, 900)))  # fmt: skip
                done[e] = max(done.get(e, 0), end)
                last_col = tile["col_tile"] == 2
                if gemm == 2 and last_col:
                    for source in range(world):
                        rows = _overlap(counts[it], source, e, tile, plan, it)
                        if rows:
                            t.add(EventKind.PUT, end, 0, rank=rank, cta=cta, sm=cta + 17, iter=it,
                                  lane=int(lane), peer=source, expert=e, tile=tile["tile"],
                                  aux=rows * row_bytes)  # fmt: skip
        for rank in range(world):
            for chunk in range(chunks):
                needed = [done[e] for e in range(experts) if counts[it, rank, chunk, e]]
                if needed:
                    span(EventKind.COMBINE, rank, chunk % sms, Lane.MATH0, max(needed), tile=chunk,
                         aux=7)  # fmt: skip
        for (rank, cta, lane_code), end in free.items():
            t.add(EventKind.LAUNCH, base, end - base, rank=rank, cta=cta, sm=cta + 17,
                  lane=lane_code, iter=it, aux=end - base)  # fmt: skip
    meta = {
        "world": {"kind": "host", "row_bytes": row_bytes},
        "tool": {"version": "0"},
        "rings": {"dropped": 0},
    }
    return Run(t.table(), plan, of_counts, meta, [group for _, group in waves_of(owner, wave)])


def waves_of(owner: list[int], wave: int) -> list[tuple[int, list[int]]]:
    """The experts dispatched together, owner after owner, each with its place in the owner's."""
    found = []
    for rank in sorted(set(owner)):
        mine = [e for e, of in enumerate(owner) if of == rank]
        found += [(i // wave, mine[i : i + wave]) for i in range(0, len(mine), wave)]
    return found


def _overlap(
    counts: np.ndarray, source: int, e: int, tile: dict[str, int], plan: pa.Table, it: int
) -> int:
    """Rows of ``source`` in a row tile."""
    first = sum(
        p["rows"]
        for p in plan.to_pylist()
        if (p["iter"], p["gemm"], p["expert"], p["col_tile"]) == (it, 2, e, 0)
        and p["row_tile"] < tile["row_tile"]
    )
    begin = int(counts[:source, :, e].sum())
    end = begin + int(counts[source, :, e].sum())
    return max(0, min(end, first + tile["rows"]) - max(begin, first))

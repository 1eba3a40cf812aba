"""A made-up run that looks like a real one: for tests and benchmarks of what reads traces.

    python benchmarks/synthetic.py --events 1000000 -o big.fmoe

The routing is consistent: tiles follow from the counts by csrc/core/plan.h itself, and the bytes of
every dispatch and put add up to the rows routed.  The lanes record what those of a GPU do: all of
them the gate to the first wave of dispatch.  The times are random, but no two spans of an actor
overlap and each lies inside its launch.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe.trace import schema
from flashmoe.trace.rundir import RunWriter
from flashmoe.trace.schema import EventKind as K
from flashmoe.trace.schema import Lane, RecordFlag
from flashmoe.world.tiles import tile_plan

MHZ = 1755
# Warps of each lane, of a CTA's twelve.
WARPS = 12
WARPS_OF = {
    Lane.LOAD: range(1), Lane.SCHED: range(1, 2), Lane.COMM0: range(2, 3), Lane.COMM1: range(3, 4),
    Lane.MATH0: range(4, 8), Lane.MATH1: range(8, 12),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What to make up.  ``sms`` is per rank; every SM has one chunk of tokens and six actors."""

    ranks: int = 4
    sms: int = 33
    tokens: int = 4096
    hidden: int = 2048
    intermediate: int = 768
    experts: int = 64
    top_k: int = 8
    iterations: int = 1
    tile_m: int = 128
    tile_step: int = 16
    tile_n: int = 256  # weight rows of a tile
    waves: int = 4
    wall_us: float = 3000.0
    skew: float = 0.5
    seed: int = 0
    keep_last: bool = False
    capacity: int | None = None  # None: nothing dropped

    def first_expert(self, rank: int) -> int:
        return rank * self.experts // self.ranks

    @property
    def wave_experts(self) -> int:
        """Experts of one owner that are due together."""
        return -(-self.experts // (self.ranks * self.waves))

    def of_core(self) -> dict[str, Any]:
        """The fields of csrc/core/shape.h."""
        return {
            "world": self.ranks, "experts": self.experts, "top_k": self.top_k,
            "hidden": self.hidden, "inter": self.intermediate, "max_tokens": self.tokens,
            "pool_rows": self.ranks * self.tokens * self.top_k, "chunks": self.sms,
            "tile_m": self.tile_m, "tile_step": self.tile_step, "tile_n1": self.tile_n // 2,
            "tile_n2": self.tile_n, "wave_experts": self.wave_experts, "activation": "swiglu",
            "routing": "softmax", "renormalize": True, "scale": 1.0, "groups": 1, "top_groups": 1,
        }  # fmt: skip


@dataclass
class Dump:
    """The rings in the form in which an engine hands them over."""

    headers: np.ndarray
    records: np.ndarray


@dataclass
class Routed:
    """Counts and tiles in the form in which an engine hands them over."""

    chunk_counts: np.ndarray
    tiles: np.ndarray


def route(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """uint32 [W, chunks, E]: rows of each chunk for each expert, T x k a rank in all."""
    weight = (1.0 + np.arange(shape.experts)) ** -shape.skew
    weight = rng.permutation(weight / weight.sum())
    per_chunk = np.full(shape.sms, shape.tokens // shape.sms)
    per_chunk[: shape.tokens % shape.sms] += 1
    drawn = rng.multinomial(np.tile(per_chunk * shape.top_k, shape.ranks), weight)
    return drawn.reshape(shape.ranks, shape.sms, shape.experts).astype(np.uint32)


def plan(shape: Shape, counts: np.ndarray) -> np.ndarray:
    """The tiles of all ranks, in order: as :func:`flashmoe.world.tiles.tile_plan` gives them."""
    return tile_plan(shape.of_core(), counts, f"{shape.tile_n}w-{shape.tile_m}t")


def puts(shape: Shape, counts: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """int64 [tiles, W]: bytes of rows each GEMM2 tile gives back to each source."""
    by_source = counts.sum(axis=1).astype(np.int64)  # [W, E]
    ends = np.cumsum(by_source, axis=0)
    starts = ends - by_source
    e = tiles["expert"]
    first_tile = np.full(shape.experts, 1 << 40, np.int64)
    np.minimum.at(first_tile, e, tiles["row_tile_global"])
    height = np.zeros(shape.experts, np.int64)  # all but an expert's last row tile are as high
    np.maximum.at(height, e, tiles["rows"])
    a = (tiles["row_tile_global"] - first_tile[e]) * height[e]
    b = a + tiles["rows"]
    rows = np.minimum(b[:, None], ends.T[e]) - np.maximum(a[:, None], starts.T[e])
    return np.maximum(rows, 0) * tiles["cols"][:, None] * 2 * (tiles["gemm"] == 2)[:, None]


def _spans(
    rng: np.random.Generator, kinds: np.ndarray, a: float, b: float, **more: np.ndarray | int
) -> np.ndarray:
    """Records of these kinds one after the other between ``a`` and ``b`` ns, with gaps."""
    records = np.zeros(len(kinds), schema.RECORD)
    edges = np.sort(rng.integers(int(a), int(b), 2 * len(kinds)))
    records["kind"] = kinds
    records["t0_ns"] = edges[0::2]
    records["dur_ns"] = edges[1::2] - edges[0::2]
    records["peer"], records["expert"], records["tile"] = (
        schema.NO_PEER,
        schema.NO_EXPERT,
        schema.NO_TILE,
    )
    for name, value in more.items():
        records[name] = value
    return records


def _with_opening(records: np.ndarray) -> np.ndarray:
    """Puts a wait's opening record in front of it."""
    is_wait = schema.CLASS_OF[records["kind"]] == schema.TimeClass.WAIT
    doubled = np.repeat(records, 1 + is_wait)
    at = np.flatnonzero(np.repeat(is_wait, 1 + is_wait))[0::2]
    doubled["flags"][at] |= np.uint8(RecordFlag.OPEN)
    doubled["dur_ns"][at] = 0
    return doubled


def _in_turn(*parts: np.ndarray) -> np.ndarray:
    records = np.concatenate(parts)
    return records[np.argsort(records["t0_ns"] + records["dur_ns"], kind="stable")]


def _cycles(records: np.ndarray, rng: np.random.Generator, share: float) -> None:
    cycles = records["dur_ns"].astype(np.int64) * MHZ // 1000
    records["aux"] = cycles
    records["stall_cycles"] = cycles * rng.uniform(0, share, len(records))


def launch(shape: Shape, counts: np.ndarray, tiles: np.ndarray) -> list[np.ndarray]:
    """One launch of all ranks: a record array an actor, in (rank, cta, lane) order."""
    rng = np.random.default_rng(shape.seed + 1)
    wall = shape.wall_us * 1000
    row_bytes = shape.hidden * 2
    back = puts(shape, counts, tiles)
    owners = np.searchsorted(
        [shape.first_expert(r) for r in range(1, shape.ranks)], np.arange(shape.experts), "right"
    )
    waves = [
        (r, a, min(a + shape.wave_experts, shape.first_expert(r + 1)))
        for r in range(shape.ranks)
        for a in range(shape.first_expert(r), shape.first_expert(r + 1), shape.wave_experts)
    ]
    begins = [shape.first_expert(r) for r in range(shape.ranks)]
    actors = []
    for rank in range(shape.ranks):
        own = np.flatnonzero(tiles["rank"] == rank)
        for cta in range(shape.sms):
            mine = [own[(2 * cta + i) :: 2 * shape.sms] for i in (0, 1)]
            both = np.sort(np.concatenate(mine))
            units = np.array(
                [(r, a, int(counts[rank, cta, a:b].sum())) for r, a, b in waves], np.int64
            )
            units = units[units[:, 2] > 0]
            units = units[np.argsort((units[:, 0] - rank) % shape.ranks, kind="stable")]
            due_first = np.isin(units[:, 1], begins)
            lanes: dict[Lane, list[np.ndarray]] = {
                Lane.LOAD: _load(rng, wall, tiles[both]),
                Lane.SCHED: [
                    _spans(rng, np.full(len(both), K.SCHEDULE), 0.12 * wall, 0.88 * wall,
                           tile=tiles["tile"][both]),
                ],
            }  # fmt: skip
            for i, lane in enumerate((Lane.COMM0, Lane.COMM1)):
                later = units[~due_first]
                later[:, 2] = (later[:, 2] * (i + 1) // 2 - later[:, 2] * i // 2) * row_bytes
                lanes[lane] = _comm(rng, wall, later[later[:, 2] > 0], owners, shape, cta)
            for i, lane in enumerate((Lane.MATH0, Lane.MATH1)):
                lanes[lane] = _math(rng, wall, tiles[mine[i]], back[mine[i]], cta)
            together = _together(rng, wall, units[due_first], shape, rank, cta)
            for lane in Lane:
                own_part = _own_part(together, units[due_first], lane, shape, cta)
                records = _with_opening(_in_turn(own_part, *lanes[lane]))
                outer = np.zeros(1, schema.RECORD)
                outer["kind"], outer["peer"], outer["expert"], outer["tile"] = (
                    K.LAUNCH, schema.NO_PEER, schema.NO_EXPERT, schema.NO_TILE,
                )  # fmt: skip
                outer["t0_ns"] = rng.integers(0, 100)
                records["t0_ns"] += 100
                outer["dur_ns"] = int(wall) + 200 + rng.integers(0, 1000) - outer["t0_ns"]
                outer["aux"] = outer["dur_ns"].astype(np.int64) * MHZ // 1000
                actors.append(np.concatenate([records, outer]))
    return actors


def _load(rng: np.random.Generator, wall: float, tiles: np.ndarray) -> list[np.ndarray]:
    first = tiles["gemm"] == 1
    waits = rng.random(len(tiles)) < 0.5
    kinds = np.repeat(np.full(len(tiles), K.LOAD, np.int64), 1 + waits)
    at = np.flatnonzero(np.repeat(waits, 1 + waits))[0::2]
    kinds[at] = np.where(first[waits], K.WAIT_ROWS, K.WAIT_H)
    repeated = np.repeat(tiles, 1 + waits)
    records = _spans(rng, kinds, 0.12 * wall, 0.86 * wall, expert=repeated["expert"])
    is_load = kinds == K.LOAD
    records["tile"] = np.where(is_load, repeated["tile"], repeated["row_tile"])
    loads = records[is_load]
    _cycles(loads, rng, 0.3)
    records[is_load] = loads
    records["aux"][~is_load] = rng.integers(1, 128, int((~is_load).sum()))
    return [records]


def _together(
    rng: np.random.Generator, wall: float, units: np.ndarray, shape: Shape, rank: int, cta: int
) -> np.ndarray:
    """What all warps of a CTA do together before the roles part; each lane records it.

    ``units`` int64 [n, 3]: owner, first expert and rows of the dispatches due first.
    """
    others = np.array([r for r in range(shape.ranks) if r != rank], np.int64)
    return np.concatenate(
        [
            _spans(rng, np.array([K.GATE, K.WAIT_BARRIER]), 0, 0.08 * wall, tile=cta),
            _spans(rng, np.array([K.COUNTS]), 0.08 * wall, 0.09 * wall),
            _spans(rng, np.full(len(others), K.WAIT_COUNTS), 0.09 * wall, 0.095 * wall,
                   peer=others, expert=0),
            _spans(rng, np.array([K.PLAN]), 0.095 * wall, 0.1 * wall),
            _spans(rng, np.full(len(units), K.DISPATCH), 0.1 * wall, 0.12 * wall,
                   peer=units[:, 0], expert=units[:, 1], tile=cta),
        ]
    )  # fmt: skip


def _own_part(
    together: np.ndarray, units: np.ndarray, lane: Lane, shape: Shape, cta: int
) -> np.ndarray:
    """``together`` with the bytes that the lane's warps moved: warp w row w, w + WARPS, ..."""
    records = together.copy()
    warps = np.array(WARPS_OF[lane])
    rows = np.maximum(0, -(-(units[:, 2:] - warps) // WARPS)).sum(axis=1)
    records["aux"][records["kind"] == K.DISPATCH] = rows * shape.hidden * 2
    experts = len(range(cta + warps[0] * shape.sms, shape.experts, WARPS * shape.sms))
    records["aux"][records["kind"] == K.COUNTS] = experts * 8 * shape.ranks
    return records


def _comm(
    rng: np.random.Generator,
    wall: float,
    units: np.ndarray,
    owners: np.ndarray,
    shape: Shape,
    cta: int,
) -> list[np.ndarray]:
    returns = rng.integers(0, shape.experts, 4)
    parts = [
        _spans(rng, np.full(len(units), K.DISPATCH), 0.12 * wall, 0.35 * wall, peer=units[:, 0],
               expert=units[:, 1], aux=units[:, 2], tile=cta),
        _spans(rng, np.tile([K.WAIT_RETURN, K.COMBINE], 4), 0.88 * wall, wall,
               peer=np.repeat(owners[returns], 2), expert=np.repeat(returns, 2), tile=cta),
    ]  # fmt: skip
    combine = parts[1][1::2]
    combine["peer"], combine["expert"] = schema.NO_PEER, schema.NO_EXPERT
    return parts


def _math(
    rng: np.random.Generator, wall: float, tiles: np.ndarray, back: np.ndarray, cta: int
) -> list[np.ndarray]:
    second = tiles["gemm"] == 2
    kinds = np.repeat(np.where(second, K.GEMM2, K.GEMM1), 1 + second)
    repeated = np.repeat(tiles, 1 + second)
    at = np.flatnonzero(np.repeat(second, 1 + second))[1::2]
    kinds[at] = K.GIVE_BACK
    work = _spans(rng, kinds, 0.12 * wall, 0.9 * wall, expert=repeated["expert"],
                  tile=repeated["tile"])  # fmt: skip
    _cycles(work, rng, 0.25)
    work["aux"][at] = back[second].sum(axis=1)
    work["stall_cycles"][at] = 0
    which, peer = np.nonzero(back[second])
    sent = work[at][which]
    sent["kind"], sent["peer"], sent["aux"] = K.PUT, peer, back[second][which, peer]
    sent["t0_ns"] += sent["dur_ns"]
    sent["dur_ns"] = 0
    end = _spans(rng, np.array([K.COMBINE]), 0.9 * wall, wall, tile=cta)
    return [work, sent, end]


def rings(shape: Shape, actors: list[np.ndarray]) -> Dump:
    """Repeats the launch ``shape.iterations`` times, each a little longer or shorter."""
    rng = np.random.default_rng(shape.seed + 2)
    start = 1_700_000_000_000_000_000
    scale = rng.uniform(0.9, 1.1, shape.iterations)
    pitch = int(shape.wall_us * 1000 * 1.2) + 10_000
    longest = max(len(a) for a in actors) * shape.iterations
    capacity = shape.capacity or longest
    headers = np.zeros(len(actors), schema.RING_HEADER)
    records = np.zeros((len(actors), min(capacity, longest)), schema.RECORD)
    for i, one in enumerate(actors):
        many = np.tile(one, shape.iterations)
        iteration = np.repeat(np.arange(shape.iterations), len(one))
        t0 = np.rint(many["t0_ns"] * scale[iteration]).astype(np.int64)
        t1 = np.rint((many["t0_ns"] + many["dur_ns"]) * scale[iteration]).astype(np.int64)
        many["t0_ns"] = start + iteration * pitch + t0
        many["dur_ns"] = t1 - t0
        many["iter"] = np.minimum(iteration, 0xFFFF)
        if shape.keep_last:
            at = np.arange(max(0, len(many) - capacity), len(many))
            records[i, at % capacity] = many[at]
        else:
            records[i, : min(capacity, len(many))] = many[:capacity]
        h = headers[i]
        cta, lane = i // 6 % shape.sms, i % 6
        last = many[-1]
        h["count"], h["capacity"], h["magic"] = len(many), capacity, schema.RING_MAGIC
        h["begin_ns"], h["end_ns"] = last["t0_ns"], int(last["t0_ns"]) + int(last["dur_ns"])
        h["end_cycles"] = int(last["dur_ns"]) * MHZ // 1000
        h["rank"], h["cta"], h["lane"] = i // (6 * shape.sms), cta, lane
        h["sm"] = i // 6
        h["mode"] = int(shape.keep_last)
    return Dump(headers, records)


def meta(shape: Shape) -> dict[str, Any]:
    """run.json of the made-up run; it says that it is one."""
    edges = [shape.first_expert(r) for r in range(shape.ranks + 1)]
    return {
        "tool": {"version": "synthetic", "commit": None, "dirty": False},
        "command": "benchmarks/synthetic.py",
        "config": {
            "hidden": shape.hidden, "intermediate": shape.intermediate, "experts": shape.experts,
            "top_k": shape.top_k, "activation": "swiglu", "dtype": "bf16", "preset": "synthetic",
            "seed": shape.seed, "skew": shape.skew, "routing": {"kind": "softmax"},
        },
        "world": {
            "kind": "local", "ranks": shape.ranks, "sms_per_rank": shape.sms,
            "lanes": [schema.LANE_NAME[lane] for lane in Lane],
            "experts_of_rank": [[a, b] for a, b in itertools.pairwise(edges)],
            "tokens": [shape.tokens] * shape.ranks, "row_bytes": shape.hidden * 2,
            "topology": "shared-gpu",
        },
        "device": None,
        "clock": {"source": "synthetic", "step_ns": 32.0, "record_cost_ns": 90.0, "sm_mhz": MHZ},
        "iterations": shape.iterations,
        "warmup": 0,
        "timing": {"launch_ms": [shape.wall_us / 1000] * shape.iterations},
        "check": None,
        "status": {"code": 0, "message": "ok"},
        "hang": None,
    }  # fmt: skip


def make(shape: Shape) -> tuple[Dump, Routed, dict[str, Any]]:
    """Rings, routing and metadata of a made-up run."""
    counts = route(shape, np.random.default_rng(shape.seed))
    tiles = plan(shape, counts)
    return rings(shape, launch(shape, counts, tiles)), Routed(counts, tiles), meta(shape)


def shape_for(events: int, **more: Any) -> Shape:
    """A shape whose run has at least ``events`` events, by its number of iterations."""
    one = Shape(**more)
    counts = route(one, np.random.default_rng(one.seed))
    records = np.concatenate(launch(one, counts, plan(one, counts)))
    per_launch = int(((records["flags"] & RecordFlag.OPEN) == 0).sum())
    return Shape(**more, iterations=max(1, -(-events // per_launch)))


def write(path: Path, shape: Shape, force: bool = False) -> None:
    """Writes the made-up run to ``path``, a run directory."""
    dump, routed, about = make(shape)
    with RunWriter(path, force=force) as out:
        out.meta.update(about)
        out.add_rings(dump)
        out.add_routing(range(shape.iterations), routed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--sms", type=int, default=33, help="per rank")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("-f", "--force", action="store_true")
    given = parser.parse_args()
    began = time.perf_counter()
    write(given.output, shape_for(given.events, ranks=given.ranks, sms=given.sms), given.force)
    print(f"{given.output} in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()

"""Every figure of `flashmoe timeline --json`: docs/numbers.md derives each."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashmoe.trace import schema
from flashmoe.trace.account import CLASSES, KINDS, Account, Actors, account
from flashmoe.trace.columns import Events, column
from flashmoe.trace.intervals import overlap_before, union
from flashmoe.trace.rundir import Run
from flashmoe.trace.schema import EventKind, TimeClass
from flashmoe.trace.traffic import tile_rows

TIMELINE_SCHEMA = 1
# Dense bf16 or fp16 of one Hopper SM: 4 tensor cores x 512 multiply-adds x 2.
FLOP_PER_CYCLE = 4096

_CLASS_OF_KIND = schema.CLASS_OF[KINDS]
_KIND_NAMES = [schema.NAME_OF[k] for k in KINDS]
_REASONS = [schema.WAIT_REASON.get(k) or schema.STALL_REASON.get(k) for k in map(EventKind, KINDS)]


def timeline_summary(run: Run, iteration: int | None = None) -> dict[str, Any]:
    """Every figure of `flashmoe timeline --json`; times are int ns, shares in 0..1.

    ``iteration`` None adds up all of the run's, each apart in ``iterations``.
    """
    events, meta = Events.of(run.events), run.meta
    spent = account(events, Actors.of(meta))
    if iteration is not None:
        spent = one_iteration(spent, iteration)
    hidden = hidden_communication(events, spent)
    work = TensorWork(run, events, spent)
    actors, rings = spent.actors, meta["rings"]
    ranks = np.unique(actors.rank)
    every = np.ones(len(actors), bool)
    start, end = _span(spent)
    clock = meta.get("clock") or {}
    return {
        "schema": TIMELINE_SCHEMA,
        "run": run.path.name,
        "world": (meta.get("world") or {}).get("kind"),
        "topology": (meta.get("world") or {}).get("topology"),
        "iteration": iteration,
        "start_ns": start,
        "span_ns": end - start,
        "events": len(events),
        "bounds": bool(spent.bound.any()),
        "overlap_ns": spent.overlap_ns,
        "clock": clock | {"sm_mhz_mean": work.mhz},
        "tracer": _tracer(clock, actors, spent),
        "rings": {name: rings[name] for name in ("n", "capacity", "mode", "records", "dropped")}
        | {
            "with_drops": int((actors.dropped > 0).sum()),
            "never_began": int(sum(not ring["began"] for ring in rings["per_ring"])),
        },
        "total": _spent(spent, every),
        "ranks": [
            {"rank": int(rank)}
            | _spent(spent, actors.rank == rank)
            | {"hidden": hidden[int(rank)].total(), "tensor": work.of_rank(int(rank))}
            for rank in ranks
        ],
        "iterations": [
            {"iter": int(i), "rank": int(rank)}
            | _spent(spent, actors.rank == rank, at)
            | {
                "hidden": hidden[int(rank)].of(at),
                "tensor": work.of_rank(int(rank), at),
            }
            for at, i in enumerate(spent.iterations)
            for rank in ranks
        ],
        "lanes": [
            {"lane": schema.LANE_NAME[lane]} | _spent(spent, actors.lane == lane)
            for lane in schema.Lane
            if (actors.lane == lane).any()
        ],
        "sms": _per_sm(spent),
        "actors": _per_actor(spent),
        "tiles": work.tiles(),
        "experts": rows_per_expert(run, iteration),
    }


def one_iteration(spent: Account, iteration: int) -> Account:
    """The same account, of one iteration alone."""
    at = slice(iteration, iteration + 1)
    return Account(
        spent.actors,
        spent.iterations[at],
        *(
            getattr(spent, name)[:, at]
            for name in ("kind_ns", "stall_ns", "class_ns", "wall_ns", "begin_ns", "end_ns",
                         "bound", "records")
        ),
        spent.overlap_ns,
    )  # fmt: skip


# ------------------------------------------------------------------------------------ time spent


def _breakdown(
    wall: int, actor_ns: int, by_class: np.ndarray, kinds: np.ndarray, stalls: np.ndarray,
    bound: bool,
) -> dict[str, Any]:  # fmt: skip
    waits = dict.fromkeys(schema.REASONS, 0)
    for reason, kind_ns, stall_ns in zip(_REASONS, kinds.tolist(), stalls.tolist(), strict=True):
        if reason is not None:
            waits[reason] += stall_ns or (kind_ns if reason in schema.WAIT_REASON.values() else 0)
    spent = dict(zip(CLASSES, by_class.tolist(), strict=True))
    return (
        {"wall_ns": wall, "actor_ns": actor_ns}
        | {f"{name}_ns": ns for name, ns in spent.items()}
        | {
            "share": {name: ns / actor_ns if actor_ns else 0.0 for name, ns in spent.items()},
            "kinds_ns": {
                name: ns
                for name, ns, cls in zip(_KIND_NAMES, kinds.tolist(), _CLASS_OF_KIND, strict=True)
                if cls != TimeClass.WAIT
            },
            "waits_ns": waits,
            "bounds": bound,
        }
    )


def _spent(spent: Account, mine: np.ndarray, at: int | None = None) -> dict[str, Any]:
    """What the actors ``mine`` [A] spent, over all iterations or in the one at index ``at``."""
    columns = slice(None) if at is None else slice(at, at + 1)
    walls = spent.wall_ns[mine, columns]
    # The wall of a rank counts once, not once an actor.
    ranks = spent.actors.rank[mine]
    _, one = np.unique(ranks, return_index=True)
    return _breakdown(
        int(walls[one].sum()),
        int(walls.sum()),
        spent.class_ns[mine, columns].sum(axis=(0, 1)),
        spent.kind_ns[mine, columns].sum(axis=(0, 1)),
        spent.stall_ns[mine, columns].sum(axis=(0, 1)),
        bool(spent.bound[mine, columns].any()),
    )


def _per_sm(spent: Account) -> list[dict[str, Any]]:
    actors = spent.actors
    key = actors.rank * (int(actors.cta.max(initial=0)) + 1) + actors.cta
    _, first, group = np.unique(key, return_index=True, return_inverse=True)
    return [
        {"rank": int(actors.rank[i]), "sm": int(actors.sm[i]), "cta": int(actors.cta[i])} | entry
        for i, entry in zip(first, _grouped(spent, group, len(first)), strict=True)
    ]


def _per_actor(spent: Account) -> list[dict[str, Any]]:
    actors = spent.actors
    return [
        {
            "rank": int(actors.rank[i]),
            "sm": int(actors.sm[i]),
            "cta": int(actors.cta[i]),
            "lane": schema.LANE_NAME[schema.Lane(int(actors.lane[i]))],
            "dropped": int(actors.dropped[i]),
        }
        | entry
        for i, entry in enumerate(_grouped(spent, np.arange(len(actors)), len(actors)))
    ]


def _grouped(spent: Account, group: np.ndarray, n: int) -> list[dict[str, Any]]:
    """A breakdown for each group of actors of one rank."""

    def total(values: np.ndarray) -> np.ndarray:
        out = np.zeros((n, *values.shape[2:]), np.int64)
        np.add.at(out, group, values.sum(axis=1))
        return out

    wall = np.zeros(n, np.int64)
    wall[group] = spent.wall_ns.sum(axis=1)
    parts = zip(
        wall.tolist(),
        total(spent.wall_ns).tolist(),
        total(spent.class_ns),
        total(spent.kind_ns),
        total(spent.stall_ns),
        (total(spent.bound.astype(np.int64)) > 0).tolist(),
        strict=True,
    )
    return [_breakdown(*part) for part in parts]


def _span(spent: Account) -> tuple[int, int]:
    begin, end = spent.begin_ns, spent.end_ns
    return (int(begin[begin > 0].min()), int(end.max())) if (begin > 0).any() else (0, 0)


def _tracer(clock: dict[str, Any], actors: Actors, spent: Account) -> dict[str, Any]:
    """What tracing itself took: records written, also those dropped, times the cost of one."""
    cost, records = clock.get("record_cost_ns"), int(actors.count.sum())
    total = None if cost is None else cost * records
    wall = int(spent.wall_ns.sum())
    return {
        "records": records,
        "record_cost_ns": cost,
        "cost_ns": total,
        "share": None if total is None or not wall else total / wall,
    }


# ---------------------------------------------------------------------------------- overlap


class Hidden:
    """One rank's communication time per iteration [N], and how much tensor work covered."""

    def __init__(self, comm: np.ndarray, tensor: np.ndarray, both: np.ndarray) -> None:
        self.comm, self.tensor, self.both = comm, tensor, both

    def of(self, at: int | slice) -> dict[str, Any]:
        """The figures of iteration index ``at``, or of a slice of them added up."""
        comm, tensor, both = (int(np.sum(v[at])) for v in (self.comm, self.tensor, self.both))
        return {
            "comm_ns": comm,
            "tensor_ns": tensor,
            "hidden_ns": both,
            "share": both / comm if comm else None,
        }

    def total(self) -> dict[str, Any]:
        """The figures of all iterations."""
        return self.of(slice(None))


def hidden_communication(events: Events, spent: Account) -> dict[int, Hidden]:
    """By rank: time in which it moved bytes, in which some tensor core of it worked, and in both."""
    comm = np.flatnonzero(np.isin(events.kind, schema.COMM_KINDS))
    tensor = np.flatnonzero(np.isin(events.kind, schema.TENSOR_KINDS))
    found = {}
    for rank in np.unique(spent.actors.rank).tolist():
        sets = []
        for rows in (comm, tensor):
            mine = rows[events.rank[rows] == rank]
            begin = events.t0_ns[mine]
            sets.append(union(begin, begin + events.dur_ns[mine]))
        first, last = spent.rank_window(rank)
        found[rank] = Hidden(
            sets[0].before(last) - sets[0].before(first),
            sets[1].before(last) - sets[1].before(first),
            overlap_before(*sets, last) - overlap_before(*sets, first),
        )
    return found


# ---------------------------------------------------------------------------------- tensor work


class TensorWork:
    """Tiles that ran, their floating-point work, and the share of the tensor cores' time it is."""

    def __init__(self, run: Run, events: Events, spent: Account) -> None:
        self.spent, self.meta = spent, run.meta
        plan = {name: column(run.plan, name).astype(np.int64) for name in run.plan.column_names}
        inside = np.isin(plan["iter"], spent.iterations)
        ran = inside & _ran(plan, events)
        self.planned = int(inside.sum())
        self.plan = {name: values[ran] for name, values in plan.items()}
        self.tile_rows = tile_rows(run.meta, run.plan)
        gated = (run.meta.get("config") or {}).get("activation") in ("swiglu", "geglu")
        # A gated GEMM1 multiplies two weight rows, gate and up, for a column of h.
        double = np.where((self.plan["gemm"] == 1) & gated, 2, 1)
        columns = self.plan["cols"] * double
        self.flop = 2 * self.plan["rows"] * columns * self.plan["depth"]
        actors = spent.actors
        timed = (actors.cycles > 0) & (actors.end_ns > actors.begin_ns)
        on_gpu = (run.meta.get("world") or {}).get("kind") != "host"
        ns = int((actors.end_ns - actors.begin_ns)[timed].sum())
        self.mhz = int(actors.cycles[timed].sum()) * 1000 / ns if on_gpu and ns else None

    def of_rank(self, rank: int, at: int | None = None) -> dict[str, Any]:
        """FLOP of the tiles that ran, and their share of what the rank's tensor cores could do."""
        mine = self.plan["rank"] == rank
        columns = slice(None) if at is None else slice(at, at + 1)
        if at is not None:
            mine &= self.plan["iter"] == self.spent.iterations[at]
        flop = int(self.flop[mine].sum())
        actors = self.spent.actors
        own = actors.rank == rank
        wall = int(self.spent.wall_ns[np.argmax(own), columns].sum()) if own.any() else 0
        sms = len(np.unique(actors.cta[own]))
        could = sms * wall * (self.mhz or 0) / 1000 * FLOP_PER_CYCLE
        return {
            "tiles": int(mine.sum()),
            "flop": flop,
            "tflop_per_s": flop / wall / 1000 if wall else None,
            "useful_share": flop / could if could else None,
        }

    def tiles(self) -> dict[str, Any]:
        """How full the row tiles were, over all ranks: real rows over rows of full tiles."""
        rows = self.plan["rows"][(self.plan["gemm"] == 1) & (self.plan["col_tile"] == 0)]
        slots = len(rows) * self.tile_rows
        return {
            "planned": self.planned,
            "ran": len(self.flop),
            "tile_rows": self.tile_rows,
            "row_tiles": len(rows),
            "rows": int(rows.sum()),
            "fill": int(rows.sum()) / slots if slots else None,
            "not_full": int((rows < self.tile_rows).sum()),
        }


def _ran(plan: dict[str, np.ndarray], events: Events) -> np.ndarray:
    """bool [tiles of the plan]: an event says that the tile ran."""
    if not len(plan["tile"]):
        return np.zeros(0, bool)
    ranks, tiles = int(plan["rank"].max()) + 1, int(plan["tile"].max()) + 1
    iterations = int(plan["iter"].max()) + 1
    seen = np.zeros(iterations * ranks * tiles, bool)
    rows = np.flatnonzero(np.isin(events.kind, schema.TENSOR_KINDS))
    i, r, t = (getattr(events, name)[rows].astype(np.int64) for name in ("iter", "rank", "tile"))
    known = (i < iterations) & (r < ranks) & (t < tiles)
    seen[((i * ranks + r) * tiles + t)[known]] = True
    return seen[(plan["iter"] * ranks + plan["rank"]) * tiles + plan["tile"]]


def rows_per_expert(run: Run, iteration: int | None = None) -> dict[str, Any] | None:
    """Rows routed to each expert, all sources and launches added up; None where none are known."""
    get = {name: column(run.counts, name).astype(np.int64) for name in ("iter", "expert", "rows")}
    mine = slice(None) if iteration is None else get["iter"] == iteration
    if not len(get["rows"][mine]):
        return None
    experts = int((run.meta.get("config") or {}).get("experts") or get["expert"].max() + 1)
    rows = np.bincount(get["expert"][mine], get["rows"][mine], experts).astype(np.int64)
    mean = float(rows.mean())
    return {
        "rows": rows.tolist(),
        "min": int(rows.min()),
        "mean": mean,
        "max": int(rows.max()),
        "max_over_mean": int(rows.max()) / mean,
        "busiest": int(rows.argmax()),
    }

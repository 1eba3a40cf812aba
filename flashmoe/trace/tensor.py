"""The tiles that ran: their floating-point work, how full they were, and the share of the peak."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashmoe.trace import schema
from flashmoe.trace.account import Account
from flashmoe.trace.columns import Events, column
from flashmoe.trace.rundir import Run

# Dense bf16 or fp16 of one Hopper SM: 4 tensor cores x 512 multiply-adds x 2.
FLOP_PER_CYCLE = 4096
GATED = ("swiglu", "geglu")
_COLUMNS = ("iter", "rank", "tile", "gemm", "col_tile", "rows", "height", "cols", "depth")


class TensorWork:
    """The plan's tiles of the account's iterations of which an event says that they ran."""

    def __init__(self, run: Run, events: Events, spent: Account) -> None:
        actors, meta = spent.actors, run.meta
        plan = {name: column(run.plan, name).astype(np.int64) for name in _COLUMNS}
        inside = np.isin(plan["iter"], spent.iterations)
        ran = inside & _ran(plan, events)
        self.planned, self.ran = int(inside.sum()), int(ran.sum())
        plan = {name: values[ran] for name, values in plan.items()}
        gated = (meta.get("config") or {}).get("activation") in GATED
        # A gated GEMM1 multiplies two weight rows, gate and up, for each column of h.
        double = np.where((plan["gemm"] == 1) & gated, 2, 1)
        flop = 2 * plan["rows"] * plan["cols"] * double * plan["depth"]
        ranks, n = int(actors.rank.max(initial=0)) + 1, len(spent.iterations)
        cell = plan["rank"] * n + plan["iter"] - int(spent.iterations[0])
        # Exact below 2^53 FLOP a (rank, launch).
        self._flop = np.bincount(cell, flop, ranks * n).astype(np.int64).reshape(ranks, n)
        self._tiles = np.bincount(cell, minlength=ranks * n).reshape(ranks, n)
        of_rows = (plan["gemm"] == 1) & (plan["col_tile"] == 0)
        self._rows, self._computed = plan["rows"][of_rows], plan["height"][of_rows]
        self._wall = np.zeros((ranks, n), np.int64)
        self._wall[actors.rank] = spent.wall_ns
        self._sms = np.bincount(np.unique(np.stack([actors.rank, actors.cta]), axis=1)[0])
        self.sm_mhz = sm_clock(spent) if (meta.get("world") or {}).get("kind") != "host" else None

    def of_rank(self, rank: int, at: int | slice = slice(None)) -> dict[str, Any]:
        """FLOP of the tiles that ran, and their share of what the rank's SMs could have done.

        Over all iterations, or the one at index ``at``.  ``useful_share`` is None on the host
        engine, which has no tensor cores.
        """
        flop, wall = int(np.sum(self._flop[rank, at])), int(np.sum(self._wall[rank, at]))
        could = int(self._sms[rank]) * wall * (self.sm_mhz or 0.0) / 1000 * FLOP_PER_CYCLE
        return {
            "tiles": int(np.sum(self._tiles[rank, at])),
            "flop": flop,
            "tflop_per_s": flop / wall / 1000 if wall else None,
            "useful_share": flop / could if could else None,
        }

    def tiles(self) -> dict[str, Any]:
        """How full the row tiles were, over all ranks: real rows over the rows computed."""
        rows, computed = int(self._rows.sum()), int(self._computed.sum())
        return {
            "planned": self.planned,
            "ran": self.ran,
            "row_tiles": len(self._rows),
            "rows": rows,
            "computed_rows": computed,
            "fill": rows / computed if computed else None,
            "not_full": int((self._rows < self._computed).sum()),
        }


def sm_clock(spent: Account) -> float | None:
    """Mean SM clock of the last launch, MHz: cycles over ns, all actors added up."""
    actors = spent.actors
    timed = (actors.cycles > 0) & (actors.end_ns > actors.begin_ns)
    ns = int((actors.end_ns - actors.begin_ns)[timed].sum())
    return int(actors.cycles[timed].sum()) * 1000 / ns if ns else None


def _ran(plan: dict[str, np.ndarray], events: Events) -> np.ndarray:
    """bool [tiles of the plan]: an event says that the tile ran."""
    if not len(plan["tile"]):
        return np.zeros(0, bool)
    ranks, tiles = int(plan["rank"].max()) + 1, int(plan["tile"].max()) + 1
    iterations = int(plan["iter"].max()) + 1
    seen = np.zeros(iterations * ranks * tiles, bool)
    rows = np.flatnonzero(schema.among(events.kind, schema.TENSOR_KINDS))
    i, r, t = (getattr(events, name)[rows].astype(np.int64) for name in ("iter", "rank", "tile"))
    known = (i < iterations) & (r < ranks) & (t < tiles)
    seen[((i * ranks + r) * tiles + t)[known]] = True
    return seen[(plan["iter"] * ranks + plan["rank"]) * tiles + plan["tile"]]

"""What each rank was given to do: how full its row tiles are, and the rows of its experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashmoe.trace.columns import column
from flashmoe.trace.rundir import Run


class RoutedWork:
    """Plan and counts of a run's ``iterations`` [N], consecutive, added up by rank and expert."""

    def __init__(self, run: Run, iterations: np.ndarray) -> None:
        first, n = int(iterations[0]), len(iterations)
        self._owned = (run.meta.get("world") or {}).get("experts_of_rank") or []
        plan = {
            name: column(run.plan, name).astype(np.int64)
            for name in ("iter", "rank", "gemm", "col_tile", "rows", "height")
        }
        # Each row tile once: its tiles in other columns have the same rows.
        tiles = np.isin(plan["iter"], iterations) & (plan["gemm"] == 1) & (plan["col_tile"] == 0)
        plan = {name: values[tiles] for name, values in plan.items()}
        ranks = max(len(self._owned), int(plan["rank"].max(initial=0)) + 1)
        self._real, self._computed = np.zeros((2, ranks, n), np.int64)
        cell = (plan["rank"], plan["iter"] - first)
        np.add.at(self._real, cell, plan["rows"])
        np.add.at(self._computed, cell, plan["height"])

        counts = {
            name: column(run.counts, name).astype(np.int64) for name in ("iter", "expert", "rows")
        }
        mine = np.isin(counts["iter"], iterations)
        counts = {name: values[mine] for name, values in counts.items()}
        experts = max((b for _, b in self._owned), default=0)
        experts = max(experts, int((run.meta.get("config") or {}).get("experts") or 0))
        experts = max(experts, int(counts["expert"].max(initial=0)) + 1)
        self._rows = np.zeros((n, experts), np.int64)
        np.add.at(self._rows, (counts["iter"] - first, counts["expert"]), counts["rows"])

    def of_rank(self, rank: int, at: int | slice = slice(None)) -> dict[str, Any]:
        """Over all iterations, or the one at index ``at``.

        ``tile_fill``: real rows over those that the planned row tiles compute, None without any.
        ``rows_per_expert``: ``experts``, how many the rank owns, and ``min`` and ``max`` of the
        rows routed to each, None where it owns none; None where nothing is known to be routed.
        """
        known = rank < len(self._real)
        real, computed = (
            int(values[rank, at].sum()) if known else 0 for values in (self._real, self._computed)
        )
        return {
            "tile_fill": real / computed if computed else None,
            "rows_per_expert": self._rows_per_expert(rank, at),
        }

    def experts(self) -> dict[str, Any] | None:
        """Rows routed to each expert, all sources and iterations added up; None where nothing is
        known to be routed."""
        rows = self._rows.sum(axis=0)
        if not rows.any():
            return None
        mean = float(rows.mean())
        return {
            "rows": rows.tolist(),
            "min": int(rows.min()),
            "mean": mean,
            "max": int(rows.max()),
            "max_over_mean": int(rows.max()) / mean,
            "busiest": int(rows.argmax()),
        }

    def _rows_per_expert(self, rank: int, at: int | slice) -> dict[str, Any] | None:
        rows = self._rows[at].reshape(-1, self._rows.shape[1]).sum(axis=0)
        if rank >= len(self._owned) or not rows.any():
            return None
        a, b = self._owned[rank]
        own = rows[a:b]
        return {
            "experts": len(own),
            "min": int(own.min()) if len(own) else None,
            "max": int(own.max()) if len(own) else None,
        }

"""An account added up over groups of actors: the entries of `flashmoe timeline --json`."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashmoe.trace import schema
from flashmoe.trace.account import CLASSES, KINDS, Account
from flashmoe.trace.schema import EventKind, TimeClass

_IS_WAIT = schema.CLASS_OF[KINDS] == TimeClass.WAIT
_WORK = np.flatnonzero(~_IS_WAIT)
_WORK_NAMES = [schema.NAME_OF[k] for k in KINDS[_WORK]]
_CLASS_NAMES = [f"{name}_ns" for name in CLASSES]


def _reason(kind: EventKind) -> str | None:
    return schema.WAIT_REASON.get(kind) or schema.STALL_REASON.get(kind)


class Breakdown:
    """Sums over groups of an account's actors, exact in integer ns.

    A group's entry: ``wall_ns``, the walls of its ranks; ``actor_ns``, the walls of its actors,
    which ``busy_ns``, ``comm_ns``, ``wait_ns``, ``idle_ns`` and ``unrecorded_ns`` add up to;
    ``share`` of each in ``actor_ns``; ``kinds_ns``, busy and comm by kind; ``waits_ns``, wait by
    reason; ``bounds``, whether dropped records make these figures bounds.
    """

    def __init__(self, spent: Account) -> None:
        self.spent = spent
        waits = np.zeros((*spent.wall_ns.shape, len(schema.REASONS)), np.int64)
        for column, kind in enumerate(KINDS):
            reason = _reason(EventKind(kind))
            if reason is not None:
                own = spent.kind_ns if _IS_WAIT[column] else spent.stall_ns
                waits[:, :, schema.REASONS.index(reason)] += own[:, :, column]
        self._values = np.concatenate(
            [
                spent.wall_ns[:, :, None],
                spent.class_ns,
                spent.kind_ns[:, :, _WORK],
                waits,
                spent.bound[:, :, None].astype(np.int64),
            ],
            axis=2,
        )

    def grouped(self, group: np.ndarray, n: int) -> list[dict[str, Any]]:
        """``n`` entries; ``group`` [A] says which of them each actor adds to."""
        values = self._values.sum(axis=1)
        out = np.zeros((n, values.shape[1]), np.int64)
        np.add.at(out, group, values)
        walls = self._walls(group, n).sum(axis=1)
        return [_entry(w, row) for w, row in zip(walls.tolist(), out.tolist(), strict=True)]

    def by_iteration(self, group: np.ndarray, n: int) -> list[list[dict[str, Any]]]:
        """The same for each iteration apart: [N][n] entries."""
        out = np.zeros((n, *self._values.shape[1:]), np.int64)
        np.add.at(out, group, self._values)
        walls = self._walls(group, n)
        return [
            [_entry(w, row) for w, row in zip(wall, rows, strict=True)]
            for wall, rows in zip(walls.T.tolist(), np.swapaxes(out, 0, 1).tolist(), strict=True)
        ]

    def _walls(self, group: np.ndarray, n: int) -> np.ndarray:
        """int64 [n, N]: the walls of each group's ranks, a rank counted once."""
        ranks = int(self.spent.actors.rank.max(initial=0)) + 1
        _, first = np.unique(group * ranks + self.spent.actors.rank, return_index=True)
        out = np.zeros((n, self.spent.wall_ns.shape[1]), np.int64)
        np.add.at(out, group[first], self.spent.wall_ns[first])
        return out


def _entry(wall: int, row: list[int]) -> dict[str, Any]:
    actor_ns, classes = row[0], row[1:6]
    work, waits = row[6 : 6 + len(_WORK)], row[6 + len(_WORK) : -1]
    per = 1 / actor_ns if actor_ns else 0.0
    return {
        "wall_ns": wall,
        "actor_ns": actor_ns,
        **dict(zip(_CLASS_NAMES, classes, strict=True)),
        "share": dict(zip(CLASSES, [ns * per for ns in classes], strict=True)),
        "kinds_ns": dict(zip(_WORK_NAMES, work, strict=True)),
        "waits_ns": dict(zip(schema.REASONS, waits, strict=True)),
        "bounds": row[-1] > 0,
    }

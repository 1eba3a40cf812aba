"""How much of a rank's communication some tensor core of the same rank worked under."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flashmoe.trace import schema
from flashmoe.trace.account import Account
from flashmoe.trace.columns import Events
from flashmoe.trace.intervals import overlap_before, union


@dataclass(frozen=True)
class Hidden:
    """One rank, int64 [N] ns an iteration: moving bytes, a tensor core at work, both at once."""

    comm: np.ndarray
    tensor: np.ndarray
    both: np.ndarray

    def of(self, at: int | slice = slice(None)) -> dict[str, Any]:
        """The figures of iteration index ``at``, or of a slice of them added up."""
        comm, tensor, both = (int(np.sum(v[at])) for v in (self.comm, self.tensor, self.both))
        return {
            "comm_ns": comm,
            "tensor_ns": tensor,
            "hidden_ns": both,
            "share": both / comm if comm else None,
        }


def hidden_communication(events: Events, spent: Account) -> dict[int, Hidden]:
    """By rank.  Communication is `counts`, `dispatch`, `give_back`; tensor work `gemm1`, `gemm2`.

    Where inside a tile's span its stalls lie is not recorded: a span counts as a whole.
    """
    rows = {
        name: np.flatnonzero(schema.among(events.kind, kinds))
        for name, kinds in (("comm", schema.COMM_KINDS), ("tensor", schema.TENSOR_KINDS))
    }
    found = {}
    for rank in np.unique(spent.actors.rank).tolist():
        sets = {}
        for name, of_kind in rows.items():
            mine = of_kind[events.rank[of_kind] == rank]
            begin = events.t0_ns[mine]
            sets[name] = union(begin, begin + events.dur_ns[mine])
        comm, tensor = sets["comm"], sets["tensor"]
        first, last = spent.rank_window(rank)
        found[rank] = Hidden(
            comm.before(last) - comm.before(first),
            tensor.before(last) - tensor.before(first),
            overlap_before(comm, tensor, last) - overlap_before(comm, tensor, first),
        )
    return found

"""Does every wait end after what ended it began?  What aligned clocks are held to.

Three kinds of waits are looked at, each with a cause on another rank that cannot have come later:

    wait_counts   the source had not begun to send its counts before its first `counts` span
    wait_rows     a source beyond pointers (the wait names it) had not begun its first dispatch to
                  this rank; where the wait names none, none of the sources with rows of the expert
    wait_return   the owner had not begun the first GEMM2 tile of that row tile

A wait that ends before its cause by more than both clocks' bounds and steps is a violation.  Where
the order itself has tightened clocks (``flashmoe.trace.tighten``), that proves nothing of it: so
waits are held to what the exchanges alone say of the clocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flashmoe.trace.align import Alignment
from flashmoe.trace.columns import Events, column
from flashmoe.trace.intervals import NEVER, least_by
from flashmoe.trace.schema import NO_PEER, EventKind, RecordFlag

if TYPE_CHECKING:
    from flashmoe.trace.rundir import Run


def order_of(run: Run, events: Events) -> dict[str, Any] | None:
    """How many waits were held to their causes, and which broke the order; None without clocks.

    ``checked`` and ``violations`` count waits between different ranks; ``worst_ns`` is by how much
    the worst ended too early beyond the bound, ``worst`` says which it was.  ``contradiction_ns``:
    by how much waits contradict each other, though each may be within the bounds; 0 if they do not.
    """
    clock = run.meta.get("clock") or {}
    clocks = clock.get("ranks")
    if not clocks:
        return None
    ranks = len(clocks)
    found = [part for look in (_counts, _rows, _returns) for part in look(run, events, ranks)]
    wait = np.concatenate([w for w, _, _ in found]) if found else np.zeros(0, np.int64)
    cause = np.concatenate([c for _, c, _ in found]) if found else np.zeros(0, np.int64)
    peer = np.concatenate([p for _, _, p in found]) if found else np.zeros(0, np.int64)
    known = (cause != NEVER) & (peer != events.rank[wait])
    wait, cause, peer = wait[known], cause[known], peer[known]
    here = events.rank[wait].astype(np.int64)
    known_clocks = [None if said is None else Alignment.from_dict(said) for said in clocks]
    end = _as_exchanged(known_clocks, here, events.t0_ns[wait] + events.dur_ns[wait])
    cause = _as_exchanged(known_clocks, peer, cause)
    bound = _bounds(known_clocks, here, end)
    bound += _bounds(known_clocks, peer, cause) + 2 * float(clock.get("step_ns") or 0.0)
    early = cause - end - bound
    broken = early > 0
    out: dict[str, Any] = {
        "checked": len(wait),
        "violations": int(broken.sum()),
        "bound_ns": float(bound.max(initial=0.0)),
        "worst_ns": float(early[broken].max(initial=0.0)),
        "worst": None,
        "contradiction_ns": (clock.get("tightening") or {}).get("contradiction_ns", 0.0),
    }
    if broken.any():
        at = int(early.argmax())
        i = int(wait[at])
        out["worst"] = {
            "kind": EventKind(int(events.kind[i])).name.lower(),
            "rank": int(events.rank[i]),
            "peer": int(peer[at]),
            "iter": int(events.iter[i]),
        }
    return out


Found = list[tuple[np.ndarray, np.ndarray, np.ndarray]]  # waits, their causes' begin, their peers


def _as_exchanged(
    clocks: list[Alignment | None], rank: np.ndarray, times: np.ndarray
) -> np.ndarray:
    """int64 [n]: the run's times as the exchanges alone would have put them on the reference."""
    out = times.astype(np.int64)
    for r, how in enumerate(clocks):
        if how is not None and how.tightened is not None:
            mine = np.flatnonzero(rank == r)
            out[mine] = how.as_exchanged(times[mine])
    return out


def _bounds(clocks: list[Alignment | None], rank: np.ndarray, times: np.ndarray) -> np.ndarray:
    """float64 [n]: how far each time, on the reference clock, may be off as one of its rank."""
    out = np.zeros(len(rank))
    for r, how in enumerate(clocks):
        mine = np.flatnonzero(rank == r)
        if how is None or not len(mine):
            continue
        if how.applied:
            out[mine] = how.bound_ns(times[mine] - how.start.offset_ns)
        else:
            out[mine] = how.bound_ns(times[mine]) + np.abs(how.offset(times[mine]))
    return out


def _waits(events: Events, kind: EventKind) -> np.ndarray:
    """Waits of a kind that ended because what they awaited came."""
    ended = (events.flags & (RecordFlag.OPEN | RecordFlag.GAVE_UP)) == 0
    return np.flatnonzero((events.kind == kind) & ended)


def _first(events: Events, kind: EventKind, key: np.ndarray, size: int) -> np.ndarray:
    """int64 [size]: the earliest begin of the kind's events by ``key`` [events]."""
    mine = np.flatnonzero(events.kind == kind)
    return least_by(key[mine], events.t0_ns[mine], size)


def _launches(events: Events) -> int:
    return int(events.iter.max(initial=0)) + 1


def _counts(run: Run, events: Events, ranks: int) -> Found:
    key = events.iter.astype(np.int64) * ranks + events.rank
    sent = _first(events, EventKind.COUNTS, key, _launches(events) * ranks)
    wait = _waits(events, EventKind.WAIT_COUNTS)
    peer = events.peer[wait].astype(np.int64)
    return [(wait, sent[events.iter[wait].astype(np.int64) * ranks + peer], peer)]


def _rows(run: Run, events: Events, ranks: int) -> Found:
    moved = events.kind == EventKind.DISPATCH
    peer = np.where(moved, events.peer, 0).astype(np.int64)
    key = (events.iter.astype(np.int64) * ranks + events.rank) * ranks + peer
    sent = _first(events, EventKind.DISPATCH, key, _launches(events) * ranks * ranks)
    wait = _waits(events, EventKind.WAIT_ROWS)
    here = events.rank[wait].astype(np.int64)
    launch = events.iter[wait].astype(np.int64)
    named = events.peer[wait] != NO_PEER
    source = events.peer[wait[named]].astype(np.int64)
    found = [(wait[named], sent[(launch[named] * ranks + source) * ranks + here[named]], source)]
    # Rows of whom the tile has is in the plan; that one source with rows of the expert must have
    # sent some holds without it: the earliest of them.
    counts = {n: column(run.counts, n).astype(np.int64) for n in ("iter", "source", "expert")}
    if not len(counts["iter"]) or named.all():
        return found
    experts = int(max(counts["expert"].max(), events.expert[wait].max())) + 1
    launches = _launches(events)
    has = np.zeros((launches, experts, ranks), bool)
    in_run = counts["iter"] < launches
    has[counts["iter"][in_run], counts["expert"][in_run], counts["source"][in_run]] = True
    rest = wait[~named]
    at = events.iter[rest].astype(np.int64)
    candidates = has[at, events.expert[rest].astype(np.int64)]  # [n, W]
    begins = sent.reshape(launches, ranks, ranks)[at, :, events.rank[rest].astype(np.int64)]
    begins = np.where(candidates, begins, NEVER)
    first = begins.argmin(axis=1)
    found.append((rest, begins[np.arange(len(rest)), first], first))
    return found


def _returns(run: Run, events: Events, ranks: int) -> Found:
    names = ("iter", "rank", "tile", "gemm", "row_tile_global")
    plan = {n: column(run.plan, n).astype(np.int64) for n in names}
    second = np.flatnonzero(plan["gemm"] == 2)
    if not len(second):
        return []
    plan = {n: values[second] for n, values in plan.items()}
    tiles, rows = int(plan["tile"].max()) + 1, int(plan["row_tile_global"].max()) + 1
    launches = max(_launches(events), int(plan["iter"].max()) + 1)
    row_of = np.full(launches * ranks * tiles, -1)
    row_of[(plan["iter"] * ranks + plan["rank"]) * tiles + plan["tile"]] = plan["row_tile_global"]
    tile = np.flatnonzero((events.kind == EventKind.GEMM2) & (events.tile < tiles))
    launch = events.iter[tile].astype(np.int64)
    row = row_of[(launch * ranks + events.rank[tile]) * tiles + events.tile[tile]]
    key = (launch * rows + row)[row >= 0]
    begun = least_by(key, events.t0_ns[tile][row >= 0], launches * rows)
    wait = _waits(events, EventKind.WAIT_RETURN)
    wait = wait[events.tile[wait] < rows]
    cause = begun[events.iter[wait].astype(np.int64) * rows + events.tile[wait]]
    return [(wait, cause, events.peer[wait].astype(np.int64))]

"""Clocks of ranks held closer together by the order of events: who waited cannot have seen a word
before it was sent.

Each wait on another rank that ended because a word came is a pair: something that this rank did
before it sent the word, on its clock, and the wait's end, on the other's.  With y the error of a
clock's exchanges (``flashmoe.trace.align``), at times that these map to A and B,

    A + y_a <= B + y_b + steps        hence  y_a - y_b <= B - A + steps

Pairs both ways bound y_a - y_b from both sides, exchanges bound each y by itself, and the tightest
that follows of all together is a shortest path between ranks.  What is taken for granted is no more
than for the exchanges: that each clock drifts evenly between the two of them, so that y changes by
no more than the drift's bound times the time between.  Only such causes are taken as the protocol
proves:

    wait_counts   the source's counts had begun
    wait_rows     where the wait names a source: its first dispatch to this rank had begun
    wait_return   every GEMM2 tile of that row tile had ended

A ring that dropped records may lack what came first: of its rank only the last is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from flashmoe.trace import schema
from flashmoe.trace.align import Alignment, Exchange
from flashmoe.trace.intervals import NEVER, least_by
from flashmoe.trace.rings import Rings
from flashmoe.trace.schema import NO_PEER, EventKind, RecordFlag

_UNKNOWN = 0xFFFFFFFF  # a duration that did not fit its field
_LAST_ITER = 0xFFFF  # what all launches from this one on are numbered
_MOST_LAUNCHES = 8  # whose pairs are taken


@dataclass(frozen=True)
class Pairs:
    """int64 [n] each: ``early``, when rank ``sender`` at the latest had not sent yet, and ``late``,
    when rank ``waiter`` had seen it; each by that rank's own clock, ns."""

    sender: np.ndarray
    early: np.ndarray
    waiter: np.ndarray
    late: np.ndarray


@dataclass(frozen=True)
class Tightened:
    """The clocks, tightened where ``contradiction_ns`` is 0 and the pairs say more than they did.

    ``contradiction_ns``: by how much at least what pairs and exchanges say cannot all be true.
    """

    clocks: list[Alignment]
    pairs: int
    contradiction_ns: float


# ------------------------------------------------------------------------------------------ pairs


def pairs(rings: Sequence[Rings], plans: Sequence[np.ndarray]) -> Pairs:
    """The pairs in the ranks' rings, whose times are each rank's own.

    ``plans``: of each launch, the structured array of its tiles (``base.Routing.tiles``).
    """
    records, rank = _records(rings, _sample(len(plans)))
    ranks = len(rings)
    whole_rings = np.array([not own.dropped.any() for own in rings])
    found = [
        *(_of_senders(whole_rings, look(records, rank, ranks)) for look in (_counts, _rows)),
        _returns(records, rank, plans, ranks),
    ]
    whole = Pairs(*(np.concatenate(part) for part in zip(*found, strict=True)))
    other = whole.sender != whole.waiter
    return Pairs(whole.sender[other], whole.early[other], whole.waiter[other], whole.late[other])


_Found = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_KINDS = (
    *(EventKind.COUNTS, EventKind.DISPATCH, EventKind.GEMM2),
    *(EventKind.WAIT_COUNTS, EventKind.WAIT_ROWS, EventKind.WAIT_RETURN),
)


def _sample(launches: int) -> np.ndarray:
    """The launches whose pairs are taken, by a record's ``iter``: first, last, some between.

    Clocks drift evenly, so that more would tighten them by little and take long to read.
    """
    told = min(launches, _LAST_ITER)
    of_iter = np.zeros(_LAST_ITER + 1, bool)
    of_iter[np.linspace(0, told - 1, min(told, _MOST_LAUNCHES)).round().astype(int)] = True
    return of_iter


def _records(rings: Sequence[Rings], of_iter: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The records that pairs are made of, ``RECORD`` [n], and whose they are."""
    wanted = np.zeros(256, bool)
    wanted[list(_KINDS)] = True
    bad = int(RecordFlag.OPEN | RecordFlag.GAVE_UP)
    found, of = [np.zeros(0, schema.RECORD)], [np.zeros(0, np.int64)]
    for rank, own in enumerate(rings):
        kept = [np.zeros((0, 4), np.uint64)]
        for stored in own.stored:  # most records are of no use here: no copy of all is made
            at = np.flatnonzero(wanted[stored["kind"]] & of_iter[stored["iter"]])
            kept.append(np.take(stored.view(np.uint64).reshape(-1, 4), at, axis=0))
        records = np.concatenate(kept).view(schema.RECORD).reshape(-1)
        sure = (records["flags"] & bad == 0) & (records["dur_ns"] != _UNKNOWN)
        records = records[sure]
        found.append(records)
        of.append(np.full(len(records), rank))
    return np.concatenate(found), np.concatenate(of)


def _end(records: np.ndarray) -> np.ndarray:
    end: np.ndarray = records["t0_ns"].astype(np.int64) + records["dur_ns"]
    return end


def _joined(
    cause: np.ndarray, key: np.ndarray, sender: np.ndarray, waiter: np.ndarray, late: np.ndarray
) -> _Found:
    """Waits with the cause at ``key``, where there is one (above 0)."""
    early = cause[key]
    at = np.flatnonzero(early > 0)
    return sender[at], early[at], waiter[at], late[at]


def _of_senders(these: np.ndarray, found: _Found) -> _Found:
    sender, early, waiter, late = found
    at = np.flatnonzero(these[sender])
    return sender[at], early[at], waiter[at], late[at]


def _earliest(key: np.ndarray, times: np.ndarray, size: int) -> np.ndarray:
    out = least_by(key, times, size)
    return np.where(out == NEVER, 0, out)


def _launches(records: np.ndarray) -> int:
    return int(records["iter"].max(initial=0)) + 1


def _counts(records: np.ndarray, rank: np.ndarray, ranks: int) -> _Found:
    sent = np.flatnonzero(records["kind"] == EventKind.COUNTS)
    launch = records["iter"].astype(np.int64)
    begin = records["t0_ns"][sent].astype(np.int64)
    cause = _earliest(launch[sent] * ranks + rank[sent], begin, _launches(records) * ranks)
    wait = np.flatnonzero((records["kind"] == EventKind.WAIT_COUNTS) & (records["peer"] < ranks))
    peer = records["peer"][wait].astype(np.int64)
    return _joined(cause, launch[wait] * ranks + peer, peer, rank[wait], _end(records[wait]))


def _rows(records: np.ndarray, rank: np.ndarray, ranks: int) -> _Found:
    named = (records["kind"] == EventKind.WAIT_ROWS) & (records["peer"] != NO_PEER)
    wait = np.flatnonzero(named & (records["peer"] < ranks))
    if not len(wait):
        return (np.zeros(0, np.int64),) * 4
    sent = np.flatnonzero((records["kind"] == EventKind.DISPATCH) & (records["peer"] < ranks))
    launch, to = records["iter"].astype(np.int64), records["peer"].astype(np.int64)
    key = (launch[sent] * ranks + rank[sent]) * ranks + to[sent]
    begin = records["t0_ns"][sent].astype(np.int64)
    cause = _earliest(key, begin, _launches(records) * ranks * ranks)
    key = (launch[wait] * ranks + to[wait]) * ranks + rank[wait]
    return _joined(cause, key, to[wait], rank[wait], _end(records[wait]))


def _returns(
    records: np.ndarray, rank: np.ndarray, plans: Sequence[np.ndarray], ranks: int
) -> _Found:
    distinct: dict[int, int] = {}
    of_launch = np.array([distinct.setdefault(id(p), len(distinct)) for p in plans], np.int64)
    if not len(of_launch) or not sum(len(p) for p in plans):
        return (np.zeros(0, np.int64),) * 4
    by_id = {id(p): p for p in plans}
    tiles = max(int(p["tile"].max(initial=0)) for p in by_id.values()) + 1
    rows = max(int(p["row_tile_global"].max(initial=0)) for p in by_id.values()) + 1
    row_of = np.full((len(distinct), ranks, tiles), -1)
    for which, at in distinct.items():
        second = by_id[which][by_id[which]["gemm"] == 2]
        row_of[at, second["rank"], second["tile"]] = second["row_tile_global"]
    launch = records["iter"].astype(np.int64)
    planned = launch < len(of_launch)
    done = (records["kind"] == EventKind.GEMM2) & planned & (records["tile"] < tiles)
    done = np.flatnonzero(done)
    row = row_of[of_launch[launch[done]], rank[done], records["tile"][done]]
    done, row = done[row >= 0], row[row >= 0]
    # All tiles of a row tile are one rank's, hence by one clock.
    cause = np.zeros(len(of_launch) * rows, np.int64)
    np.maximum.at(cause, launch[done] * rows + row, _end(records[done]))
    wait = (records["kind"] == EventKind.WAIT_RETURN) & planned & (records["tile"] < rows)
    wait = np.flatnonzero(wait & (records["peer"] < ranks))
    key = launch[wait] * rows + records["tile"][wait]
    peer = records["peer"][wait].astype(np.int64)
    return _joined(cause, key, peer, rank[wait], _end(records[wait]))


# -------------------------------------------------------------------------------------- tightening


def tighten(
    clocks: Sequence[Alignment], found: Pairs, span: Sequence[tuple[int, int]], step_ns: float
) -> Tightened:
    """The clocks with what ``found`` says; rank 0's is the reference, and each has both exchanges.

    ``span``: first and last time of each rank's events, by its own clock.  No clock's bound gets
    wider: one that gains nothing stays as it was, and so do all where the pairs contradict each
    other or the exchanges.
    """
    whole = [h.mapped(np.array(s)) for h, s in zip(clocks, span, strict=True)]
    ends = (int(min(w[0] for w in whole)), int(max(w[1] for w in whole)))
    limits = [_limits(clocks, found, at, step_ns) for at in ends]
    off = max(_contradiction(*most) for most in limits)
    if off > 0:
        return Tightened(list(clocks), len(found.early), off)
    paths = [_shortest(np.minimum(*most)) for most in limits]
    out = [clocks[0]]
    for rank in range(1, len(clocks)):
        high = np.array([most[rank, 0] for most in paths])
        low = np.array([-most[0, rank] for most in paths])
        out.append(_closer(clocks[rank], ends, low, high))
    return Tightened(out, len(found.early), 0.0)


def _limits(
    clocks: Sequence[Alignment], found: Pairs, at: int, step_ns: float
) -> tuple[np.ndarray, np.ndarray]:
    """float64 [W, W] twice: the most that y_row - y_column can be at ``at``, a time of the
    reference, as exchanges and as pairs say it; infinite where they say nothing."""
    ranks = len(clocks)
    by_exchange, by_pair = np.full((2, ranks, ranks), np.inf)
    np.fill_diagonal(by_exchange, 0.0)
    early, late = np.zeros(len(found.early), np.int64), np.zeros(len(found.late), np.int64)
    slack = np.full(len(found.early), 2 * step_ns + 2.0)  # and what rounding may take
    for rank, how in enumerate(clocks):
        for which, own, mapped in (
            (found.sender, found.early, early),
            (found.waiter, found.late, late),
        ):
            mine = np.flatnonzero(which == rank)
            mapped[mine] = how.mapped(own[mine])
            if rank:
                slack[mine] += how.drift_bound * np.abs(mapped[mine] - at)
        if rank:
            bound = float(how.bound_ns(how.from_reference(np.array([at])))[0])
            by_exchange[rank, 0] = by_exchange[0, rank] = bound
    np.minimum.at(by_pair, (found.sender, found.waiter), late - early + slack)
    return by_exchange, by_pair


def _shortest(most: np.ndarray) -> np.ndarray:
    """What follows of all limits together; below 0 on the diagonal where no y satisfies them."""
    for through in range(len(most)):
        most = np.minimum(most, most[:, through, None] + most[None, through, :])
    return most


def _contradiction(by_exchange: np.ndarray, by_pair: np.ndarray) -> float:
    """The least ns by which all waits had to end later, so that some y satisfies all; 0 if one
    does."""

    def possible(later: float) -> bool:
        together = _shortest(np.minimum(by_exchange, by_pair + later))
        return bool(np.diagonal(together).min() >= 0)

    if possible(0.0):
        return 0.0
    enough = 1.0
    while not possible(enough):
        enough *= 2
    least = enough / 2
    while enough - least > max(1.0, 1e-3 * enough):
        middle = (least + enough) / 2
        least, enough = (least, middle) if possible(middle) else (middle, enough)
    return enough


def _closer(how: Alignment, ends: tuple[int, int], low: np.ndarray, high: np.ndarray) -> Alignment:
    """The clock corrected so that its error lies evenly in [low, high] at both of ``ends``.

    By one shift, which leaves the drift as the exchanges have it, unless no shift lies in both:
    then by the middle of each.
    """
    shift = np.full(2, (high.max() + low.min()) / 2)
    if low.max() > high.min():
        shift = (high + low) / 2
    own = how.from_reference(np.array(ends))
    shifted = np.rint(shift).astype(np.int64)
    bound = np.ceil(np.maximum(high - shifted, shifted - low)).astype(np.int64)
    if bound.max() >= how.bound_ns(own).max():
        return how
    offset = how.offset(own) + shifted
    first, last = (
        Exchange(int(t), int(o), int(b)) for t, o, b in zip(own, offset, bound, strict=True)
    )
    return replace(how, tightened=Alignment.of(first, last))

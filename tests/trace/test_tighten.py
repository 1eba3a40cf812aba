"""Clocks that are off and drift, and waits that follow what others send: order bounds offsets."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.trace import schema
from flashmoe.trace.align import Alignment, Exchange, tightest
from flashmoe.trace.rings import Rings
from flashmoe.trace.schema import EventKind, RecordFlag
from flashmoe.trace.tighten import Pairs, Tightened, pairs, tighten

START, SECOND = 10**13, 10**9


class Clock:
    """A rank's own clock as a function of the reference's."""

    def __init__(self, offset_ns: int, drift: float) -> None:
        self.offset_ns, self.drift = offset_ns, drift

    def own(self, reference: np.ndarray | int) -> np.ndarray:
        t = np.asarray(reference, np.int64)
        return t + self.offset_ns + np.rint((t - START) * self.drift).astype(np.int64)


def exchanged(clock: Clock, seconds: float, rng: np.random.Generator) -> Alignment:
    """By exchanges of 20 to 60 us each way, at 0 s and at ``seconds``."""

    def at(begin: int) -> Exchange:
        there, back = rng.integers(20_000, 60_000, (2, 30))
        asked = begin + np.arange(30) * 1000
        return tightest(clock.own(asked), asked + there, clock.own(asked + there + back))

    return Alignment.of(at(START), at(START + int(seconds * SECOND)))


def waited(
    clocks: list[Clock], begin: int, end: int, rng: np.random.Generator, count: int = 400
) -> Pairs:
    """Words that took 1 to 30 us from rank to rank, seen between ``begin`` and ``end``."""
    sender, waiter = rng.integers(0, len(clocks), (2, count))
    keep = sender != waiter
    sender, waiter = sender[keep], waiter[keep]
    sent = rng.integers(begin, end - 40_000, len(sender))
    seen = sent + rng.integers(1000, 30_000, len(sender))
    own = [clock.own for clock in clocks]
    early = np.array([int(own[r](t)) for r, t in zip(sender, sent, strict=True)])
    late = np.array([int(own[r](t)) for r, t in zip(waiter, seen, strict=True)])
    return Pairs(sender, early, waiter, late)


def world(
    seed: int, seconds: float, begin_s: float, length_s: float, drifts: list[float]
) -> tuple[list[Clock], list[Alignment], Pairs, list[tuple[int, int]], np.ndarray]:
    """Clocks, their exchanges, pairs, each one's span of events, and true times within it."""
    rng = np.random.default_rng(seed)
    clocks = [Clock(0, 0.0)]
    clocks += [Clock(int(rng.integers(-(10**7), 10**7)), drift) for drift in drifts]
    known = [Alignment.of(Exchange.same(START), Exchange.same(START + int(seconds * SECOND)))]
    known += [exchanged(clock, seconds, rng) for clock in clocks[1:]]
    begin = START + 10**6 + int(begin_s * SECOND)
    end = begin + int(length_s * SECOND)
    found = waited(clocks, begin, end, rng)
    spans = [(int(clock.own(begin)), int(clock.own(end))) for clock in clocks]
    return clocks, known, found, spans, rng.integers(begin, end, 200)


def off_by(how: Alignment, clock: Clock, true: np.ndarray) -> np.ndarray:
    mapped: np.ndarray = np.abs(how.used.mapped(clock.own(true)) - true)
    return mapped


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    seconds=st.sampled_from([0.2, 2.0, 30.0]),
    share=st.floats(0.02, 0.95),
    drifts=st.lists(st.floats(-5e-5, 5e-5), min_size=1, max_size=5),
)
def test_the_truth_stays_within_bounds_that_never_get_wider(
    seed: int, seconds: float, share: float, drifts: list[float]
) -> None:
    length = (seconds - 0.01) * share
    clocks, known, found, spans, true = world(seed, seconds, 0.0, length, drifts)
    got = tighten(known, found, spans, step_ns=1.0)
    assert got.contradiction_ns == 0
    assert got.clocks[0] == known[0]
    for clock, before, how in zip(clocks[1:], known[1:], got.clocks[1:], strict=True):
        before_bound = before.bound_ns(clock.own(true)).max()
        if how.tightened is None:
            assert how == before
            continue
        assert (how.start, how.end) == (before.start, before.end)
        bound = how.tightened.bound_ns(clock.own(true))
        assert bound.max() < before_bound
        # In the 0.1 ms that exchanges take the clock drifts, too.
        assert (off_by(how, clock, true) <= bound + 4 + 2e5 * abs(clock.drift)).all()


def test_a_short_run_is_told_to_what_its_quickest_words_took() -> None:
    clocks, known, found, spans, true = world(3, 0.2, 0.02, 0.02, [1e-5, -8e-6, 3e-6])
    got = tighten(known, found, spans, step_ns=32.0)
    assert got.pairs == len(found.early)
    for clock, before, how in zip(clocks[1:], known[1:], got.clocks[1:], strict=True):
        assert before.start.bound_ns > 20_000
        assert how.tightened is not None and how.tightened.start.bound_ns < 8_000
        assert off_by(how, clock, true).max() < 8_000
        # One shift for all of it: spans are as long as before.
        assert how.tightened.drift == pytest.approx(before.drift, abs=2e-7)


def test_ranks_that_only_wait_for_each_other_hold_each_other() -> None:
    """Rank 2 hears of rank 1 alone, and rank 1 is known well: so is rank 2, through it."""
    rng = np.random.default_rng(1)
    clocks = [Clock(0, 0.0), Clock(5_000_000, 0.0), Clock(-7_000_000, 0.0)]
    ends = Exchange.same(START), Exchange.same(START + SECOND)
    sure = [Exchange(t + 5_000_000, -5_000_000, 100) for t in (START, START + SECOND)]
    known = [Alignment.of(*ends), Alignment.of(*sure), exchanged(clocks[2], 1.0, rng)]
    found = waited(clocks, START + 10**6, START + 10**7, rng, 4000)
    direct = (found.sender == 0) | (found.waiter == 0)
    found = Pairs(*(getattr(found, n)[~direct] for n in ("sender", "early", "waiter", "late")))
    spans = [(int(c.own(START + 10**6)), int(c.own(START + 10**7))) for c in clocks]
    how = tighten(known, found, spans, 1.0).clocks[2]
    assert known[2].start.bound_ns > 20_000
    assert how.tightened is not None and how.tightened.start.bound_ns < 3_000


def test_a_long_run_whose_drift_was_misjudged_gets_another_slope() -> None:
    """Exchanges that are wrong by most of their bound, one up and one down."""
    clocks = [Clock(0, 0.0), Clock(0, 0.0)]
    ends = START, START + 10 * SECOND
    known = [
        Alignment.of(*(Exchange.same(t) for t in ends)),
        Alignment.of(Exchange(ends[0], 90_000, 100_000), Exchange(ends[1], -90_000, 100_000)),
    ]
    rng = np.random.default_rng(0)
    found = waited(clocks, ends[0], ends[1], rng, 200_000)
    (how,) = tighten(known, found, [ends, ends], 1.0).clocks[1:]
    assert how.tightened is not None
    true = rng.integers(*ends, 100)
    assert off_by(how, clocks[1], true).max() <= how.tightened.bound_ns(true).max() < 10_000


def test_one_clock_is_still_left_as_it_is() -> None:
    """The exchanges are off by 15 us, consistently with zero; the order tells no more than that."""
    clocks = [Clock(0, 0.0), Clock(0, 0.0)]
    ends = START, START + SECOND
    known = [
        Alignment.of(*(Exchange.same(t) for t in ends)),
        Alignment.of(Exchange(ends[0], 15_000, 20_000), Exchange(ends[1], 15_000, 20_000)),
    ]
    found = waited(clocks, *ends, np.random.default_rng(0))
    (how,) = tighten(known, found, [ends, ends], 1.0).clocks[1:]
    assert how.tightened is not None and how.tightened.start.bound_ns < 20_000
    assert not how.used.applied and how.as_dict()["applied"] is False
    times = np.array(ends)
    assert (how.to_reference(times) == times).all()


def test_what_cannot_all_be_true_tightens_nothing() -> None:
    """Each of two words is within the exchange's bound; one after the other they are not."""
    ends = START, START + SECOND
    known = [
        Alignment.of(*(Exchange.same(t) for t in ends)),
        Alignment.of(*(Exchange(t, 0, 20_000) for t in ends)),
    ]
    early, late = np.array([START, START]), np.array([START - 4000, START - 3000])
    found = Pairs(np.array([0, 1]), early, np.array([1, 0]), late)
    got = tighten(known, found, [ends, ends], 0.0)
    assert got == Tightened(known, 2, pytest.approx(3500, abs=10))  # 7 us, halved between the two
    one = Pairs(*(getattr(found, n)[:1] for n in ("sender", "early", "waiter", "late")))
    assert tighten(known, one, [ends, ends], 0.0).contradiction_ns == 0


def test_a_tightened_clock_comes_back_from_run_json_and_undone() -> None:
    clocks, known, found, spans, true = world(5, 0.2, 0.02, 0.02, [2e-5])
    how = tighten(known, found, spans, 32.0).clocks[1]
    assert how.tightened is not None
    again = Alignment.from_dict(json.loads(json.dumps(how.as_dict())))
    assert again == how
    own = clocks[1].own(true)
    alone = replace(how, tightened=None)
    assert (how.to_reference(own) != alone.to_reference(own)).all()
    assert (np.abs(how.as_exchanged(how.to_reference(own)) - alone.to_reference(own)) <= 1).all()


def record(kind: EventKind, t0: int, t1: int, **more: int) -> np.ndarray:
    one = np.zeros(1, schema.RECORD)
    one["kind"], one["t0_ns"], one["dur_ns"] = kind, t0, t1 - t0
    one["peer"], one["expert"], one["tile"] = schema.NO_PEER, schema.NO_EXPERT, schema.NO_TILE
    for name, value in more.items():
        one[name] = value
    return one


def rings(*of_rank: list[np.ndarray]) -> list[Rings]:
    found = []
    for rank, records in enumerate(of_rank):
        header = np.zeros(1, schema.RING_HEADER)
        header["rank"], header["magic"] = rank, schema.RING_MAGIC
        header["count"] = header["capacity"] = len(records)
        found.append(Rings(header, [np.concatenate(records)]))
    return found


def plan() -> np.ndarray:
    """Rank 0 owns row tile 4, of which two column tiles are its tiles 1 and 2 of GEMM2."""
    tiles = np.zeros(3, [("rank", "u2"), ("tile", "u4"), ("gemm", "u1"), ("row_tile_global", "u4")])
    tiles["tile"], tiles["gemm"], tiles["row_tile_global"] = [0, 1, 2], [1, 2, 2], [4, 4, 4]
    return tiles


def test_pairs_are_what_the_protocol_proves() -> None:
    owner = [
        record(EventKind.COUNTS, 100, 150),
        record(EventKind.COUNTS, 90, 140),  # the first of them
        record(EventKind.GEMM1, 200, 999, tile=0),
        record(EventKind.GEMM2, 300, 400, tile=1),
        record(EventKind.GEMM2, 310, 450, tile=2),  # the last to end
        record(EventKind.DISPATCH, 160, 170, peer=1),
        record(EventKind.DISPATCH, 155, 158, peer=0),  # to itself
    ]
    other = [
        record(EventKind.WAIT_COUNTS, 95, 101, peer=0),
        record(EventKind.WAIT_RETURN, 400, 460, peer=0, tile=4),
        record(EventKind.WAIT_ROWS, 150, 175, peer=0, tile=0),
        record(EventKind.WAIT_ROWS, 150, 176, tile=0),  # of whom, it does not say
        record(EventKind.WAIT_COUNTS, 95, 95, peer=0, flags=RecordFlag.OPEN),
        record(EventKind.WAIT_COUNTS, 95, 99, peer=0, flags=RecordFlag.GAVE_UP),
        record(EventKind.WAIT_COUNTS, 95, 99, peer=0, iter=1),  # of which nothing is known
        record(EventKind.WAIT_RETURN, 400, 460, peer=0, tile=3),
        record(EventKind.WAIT_COUNTS, 95, 99, peer=1),
    ]
    found = pairs(rings(owner, other), [plan()])
    assert (found.sender == 0).all() and (found.waiter == 1).all()
    said = set(zip(found.early.tolist(), found.late.tolist(), strict=True))
    assert said == {(90, 101), (450, 460), (160, 175)}
    # What a ring has dropped may have come before what it holds.
    short = rings(owner, other)
    short[0].headers["count"] += 1
    assert pairs(short, [plan()]).early.tolist() == [450]


def test_of_many_launches_the_first_the_last_and_some_between_are_read() -> None:
    launches = 40
    owner = [record(EventKind.COUNTS, 100 * i + 1, 100 * i + 50, iter=i) for i in range(launches)]
    other = [
        record(EventKind.WAIT_COUNTS, 100 * i, 100 * i + 60, peer=0, iter=i)
        for i in range(launches)
    ]
    early = pairs(rings(owner, other), [plan()] * launches).early
    assert (early.min(), early.max()) == (1, 100 * (launches - 1) + 1)
    assert 3 <= len(early) < launches / 2

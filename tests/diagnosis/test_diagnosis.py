"""Each way to hang, and the rank that a report must name for it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flashmoe.trace.schema import ActorState, EventKind, Lane

from .flights import BEGIN_NS, DEADLINE_NS, NOW_NS, RAISED_NS, WAIT_NS, Launch

W, CTAS, E, TILE_M = 4, 2, 8, 16
TILE_FIELDS = [(n, "<u4") for n in ("rank", "tile", "gemm", "expert", "row_tile", "rows")]


def counts() -> np.ndarray:
    """[W, chunks, E]: every source gives expert 5 another number of rows."""
    rows = np.full((W, CTAS, E), 2, np.uint32)
    rows[:, 0, 5] = (1, 3, 7, 10)
    rows[:, 1, 5] = (2, 2, 5, 0)
    return rows


def tiles(of: np.ndarray) -> np.ndarray:
    """The plan of GEMM1, one column tile."""
    out = []
    for rank in range(W):
        row_tile = 0
        for e in range(rank * E // W, (rank + 1) * E // W):
            total = int(of[:, :, e].sum())
            for j in range(-(-total // TILE_M)):
                rows = min(TILE_M, total - j * TILE_M)
                out.append((rank, row_tile, 1, e, row_tile, rows))
                row_tile += 1
    return np.array(out, TILE_FIELDS)


def dispatched() -> Launch:
    """Every rank past dispatch, waiting for results of expert 5 from rank 2, its owner."""
    launch = Launch(W, CTAS)
    for rank in range(W):
        for lane in (Lane.LOAD, Lane.MATH0, Lane.MATH1, Lane.SCHED):
            launch.left(rank, lane=lane)
        for lane in (Lane.COMM0, Lane.COMM1):
            launch.waits(rank, EventKind.WAIT_RETURN, lane=lane, peer=2, expert=5, tile=10,
                         expected=1)  # fmt: skip
    return launch


def lacking_rows(launch: Launch, tile: int, expected: int, seen: int, cta: int = 0) -> Launch:
    return launch.waits(2, EventKind.WAIT_ROWS, cta, Lane.SCHED, gave_up=cta == 0, expert=5,
                        tile=tile, expected=expected, seen=seen)  # fmt: skip


def test_rank_that_never_starts_is_named_by_those_who_lack_its_counts() -> None:
    launch = Launch(W, CTAS).never(3)
    for rank in range(3):
        launch.waits(rank, EventKind.WAIT_COUNTS, gave_up=rank == 1, peer=3, expert=0, expected=1)
    report = launch.diagnose()
    assert (report.hang, report.cause, report.culprit) == (True, "never-started", 3)
    assert report.chain[0].rank == 1 and report.chain[0].peer == 3
    assert "rank 3 never started" in report.text[0]
    assert "ranks 0, 1, 2 wait for it" in report.reason
    assert report.ranks[3]["never_started"] == CTAS * 6


def test_rank_that_stayed_in_the_launch_before_never_started_this_one() -> None:
    launch = Launch(W, CTAS, epoch=7)
    for rank in range(3):
        launch.waits(rank, EventKind.WAIT_COUNTS, gave_up=True, peer=3, expert=0, expected=7)
    launch.epoch = 6
    launch.set(3, ActorState.DONE, EventKind.LAUNCH, since=BEGIN_NS)
    report = launch.diagnose()
    assert (report.cause, report.culprit) == ("never-started", 3)


def test_cta_that_never_started_holds_up_its_own_rank() -> None:
    launch = Launch(2, 3)
    launch.waits(0, EventKind.WAIT_COUNTS, gave_up=True, peer=1, expert=4, expected=1)
    launch.waits(1, EventKind.WAIT_BARRIER, expected=3, seen=2).never(1, cta=2)
    report = launch.diagnose()
    assert (report.cause, report.culprit) == ("never-started", 1)
    assert "CTA 2" in report.reason


@pytest.mark.parametrize(
    ("source", "lacking"), [(0, (3, 0)), (1, (5, 0)), (2, (8, 4)), (3, (0, 10))]
)
def test_lost_signal_is_matched_to_the_source_whose_rows_lack(
    source: int, lacking: tuple[int, int]
) -> None:
    rows = counts()
    assert rows[:, :, 5].sum(axis=1).tolist() == [3, 5, 12, 10]  # row tiles of 16 and 14 rows
    plan = tiles(rows)
    assert plan[plan["rank"] == 2]["expert"].tolist() == [4, 5, 5]
    launch = dispatched()
    for cta, (tile, expected) in enumerate([(1, 16), (2, 14)]):
        if lacking[cta]:
            lacking_rows(launch, tile, expected, expected - lacking[cta], cta)
    if not lacking[0]:
        launch.waits(2, EventKind.WAIT_ROWS, 1, Lane.SCHED, gave_up=True, expert=5, tile=2,
                     expected=14, seen=4)  # fmt: skip
    report = launch.diagnose(chunk_counts=rows, tiles=plan)
    assert (report.cause, report.culprit) == ("lost-signal", source), report.text
    assert report.chain[-1].kind == "wait_rows" and report.chain[-1].rank == 2
    assert f"has exactly {lacking[0] or lacking[1]} there" in report.reason


def test_lost_signal_where_only_math_lanes_wait_for_results() -> None:
    """On a GPU all warps of a CTA combine; its comm warps may have had no token of the expert."""
    rows = counts()
    launch = dispatched()
    for rank in range(W):
        for comm, math in ((Lane.COMM0, Lane.MATH0), (Lane.COMM1, Lane.MATH1)):
            launch.left(rank, lane=comm)
            launch.waits(rank, EventKind.WAIT_RETURN, lane=math, peer=2, expert=5, tile=10)
    lacking_rows(launch, 2, 14, 4)
    report = launch.diagnose(chunk_counts=rows, tiles=tiles(rows))
    assert (report.cause, report.culprit) == ("lost-signal", 3)


def test_lost_signal_that_fits_two_sources_names_both_and_accuses_none() -> None:
    rows = np.full((W, CTAS, E), 2, np.uint32)
    plan = tiles(rows)
    launch = dispatched()
    tile = int(plan[(plan["rank"] == 2) & (plan["expert"] == 5)]["row_tile"][0])
    lacking_rows(launch, tile, 16, 12)
    report = launch.diagnose(chunk_counts=rows, tiles=plan)
    assert (report.cause, report.culprit) == ("lost-signal", None)
    assert report.candidates == (0, 1, 2, 3)


def test_chain_leads_from_the_combine_that_gave_up_to_the_rows() -> None:
    rows = counts()
    plan = tiles(rows)
    launch = dispatched()
    launch.waits(0, EventKind.WAIT_RETURN, 0, Lane.COMM0, gave_up=True, peer=2, expert=5, tile=10,
                 expected=1)  # fmt: skip
    launch.waits(2, EventKind.WAIT_ROWS, 0, Lane.SCHED, expert=5, tile=1, expected=16, seen=13)
    report = launch.diagnose(chunk_counts=rows, tiles=plan)
    assert [w.kind for w in report.chain] == ["wait_return", "wait_rows"]
    assert (report.cause, report.culprit) == ("lost-signal", 0)


def test_source_that_has_not_dispatched_is_slow_not_lossy() -> None:
    rows = counts()
    launch = dispatched()
    lacking_rows(launch, 1, 16, 13)
    for lane in (Lane.COMM0, Lane.COMM1):
        launch.set(0, ActorState.RUNNING, EventKind.DISPATCH, lane=lane, peer=2, expert=5)
    report = launch.diagnose(chunk_counts=rows, tiles=tiles(rows))
    assert (report.cause, report.culprit) == ("slow", 0)
    assert "dispatch" in report.reason


def test_wait_begun_after_the_abort_is_no_evidence() -> None:
    """A rank that was slow in dispatch reaches its combine only to find the abort there."""
    rows = counts()
    launch = dispatched()
    lacking_rows(launch, 1, 16, 13)
    for lane in (Lane.COMM0, Lane.COMM1):
        launch.waits(0, EventKind.WAIT_RETURN, lane=lane, peer=2, expert=5, tile=10, expected=1,
                     since=RAISED_NS + 5_000_000)  # fmt: skip
    report = launch.diagnose(chunk_counts=rows, tiles=tiles(rows))
    assert (report.cause, report.culprit) == ("slow", 0)
    assert all(w.rank != 0 for w in report.waits)


@pytest.mark.parametrize("truth", ["routed", "own"])
def test_wrong_count_names_who_told_it(truth: str) -> None:
    rows = counts()
    seen = np.broadcast_to(rows.sum(axis=1), (W, W, E)).copy()
    seen[2, 1, 5] += 1  # rank 1 told rank 2, the owner, one row too many
    launch = dispatched()
    lacking_rows(launch, 2, 16, 15)
    given = {"chunk_counts": rows, "tiles": tiles(rows)} if truth == "routed" else {}
    report = launch.diagnose(counts_seen=seen, **given)
    assert (report.cause, report.culprit) == ("wrong-count", 1)
    assert "6 rows for expert 5" in report.reason and "5" in report.reason


def test_counts_not_yet_received_are_not_wrong() -> None:
    rows = counts()
    seen = np.broadcast_to(rows.sum(axis=1), (W, W, E)).copy()
    seen[0, 3] = seen[1, 3] = seen[2, 3] = 0xFFFFFFFF
    launch = Launch(W, CTAS)
    for rank in range(3):
        launch.waits(rank, EventKind.WAIT_COUNTS, gave_up=True, peer=3, expert=0, expected=1)
    launch.set(3, ActorState.RUNNING, EventKind.GATE, since=NOW_NS - 1_000)
    report = launch.diagnose(counts_seen=seen)
    assert (report.cause, report.culprit) == ("slow", 3)


def test_lost_counts_are_a_lost_signal() -> None:
    launch = Launch(2, 1)
    launch.waits(0, EventKind.WAIT_COUNTS, gave_up=True, peer=1, expert=3, expected=1)
    launch.waits(1, EventKind.WAIT_RETURN, peer=0, expert=0, tile=0)
    report = launch.diagnose()
    assert (report.cause, report.culprit) == ("lost-signal", 1)


@pytest.mark.parametrize("state", [ActorState.RUNNING, ActorState.WAITING])
def test_stopped_rank_is_the_one_whose_slots_stand_still(state: ActorState) -> None:
    launch = dispatched()
    launch.set(1, state, EventKind.WAIT_RETURN, since=WAIT_NS, peer=2, expert=5, tile=10)
    lacking_rows(launch, 1, 16, 13)
    report = launch.diagnose(now_ns=NOW_NS + 2 * DEADLINE_NS)
    assert (report.cause, report.culprit) == ("stopped", 1)


def test_killed_rank_is_named_with_what_the_host_knows() -> None:
    launch = dispatched()
    lacking_rows(launch, 1, 16, 13)
    report = launch.diagnose(rank_status={3: "killed by SIGKILL"})
    assert (report.cause, report.culprit) == ("dead", 3)
    assert "SIGKILL" in report.reason


def test_barrier_waits_on_the_cta_that_still_routes() -> None:
    launch = Launch(2, 3)
    for cta in (0, 2):
        launch.waits(1, EventKind.WAIT_BARRIER, cta, gave_up=cta == 0, expected=3, seen=2)
    launch.waits(0, EventKind.WAIT_COUNTS, peer=1, expert=4, expected=1)
    launch.set(1, ActorState.RUNNING, EventKind.GATE, 1, since=NOW_NS - 1_000)
    report = launch.diagnose()
    assert (report.cause, report.culprit) == ("slow", 1)
    assert "CTA 1" in report.reason and "gate" in report.reason


def test_logits_wait_on_the_cta_that_has_not_worked_out_its_share() -> None:
    launch = Launch(1, 4)
    for cta in (0, 1):
        launch.waits(0, EventKind.WAIT_LOGITS, cta, gave_up=cta == 0, expert=9)
    launch.waits(0, EventKind.WAIT_BARRIER, 2, expected=4, seen=1)
    launch.set(0, ActorState.RUNNING, EventKind.LAUNCH, cta=3)
    report = launch.diagnose()
    assert (report.cause, report.culprit) == ("slow", 0)
    assert "CTA 3 had not worked out its share of the logits" in report.reason
    assert "expert 9 is the first lacking" in report.chain[0].sentence()


def test_choices_wait_on_the_cta_that_has_not_chosen() -> None:
    launch = Launch(1, 3)
    for cta in (0, 1):
        launch.waits(0, EventKind.WAIT_LOGITS, cta, gave_up=cta == 0, tile=2)
    launch.set(0, ActorState.RUNNING, EventKind.GATE, cta=2)
    report = launch.diagnose()
    assert (report.cause, report.culprit) == ("slow", 0)
    assert "CTA 2 had not worked out what its tokens choose" in report.reason
    assert "for what token 2 of its rank chooses" in report.chain[0].sentence()


def test_choices_of_a_cta_without_logits_lead_to_them() -> None:
    launch = Launch(1, 3)
    launch.waits(0, EventKind.WAIT_LOGITS, 0, gave_up=True, tile=2)
    launch.waits(0, EventKind.WAIT_LOGITS, 1, expert=9)
    launch.set(0, ActorState.RUNNING, EventKind.LAUNCH, cta=2)
    report = launch.diagnose()
    assert [w.expert for w in report.chain] == [None, 9]
    assert "CTA 2 had not worked out its share of the logits" in report.reason


def test_barrier_that_waits_for_a_cta_without_logits_leads_to_them() -> None:
    launch = Launch(1, 3)
    launch.waits(0, EventKind.WAIT_BARRIER, 0, gave_up=True, expected=3, seen=1)
    launch.waits(0, EventKind.WAIT_LOGITS, 1, expert=9)
    launch.set(0, ActorState.RUNNING, EventKind.LAUNCH, cta=2)
    report = launch.diagnose()
    assert [w.kind for w in report.chain] == ["wait_barrier", "wait_logits"]
    assert "CTA 2 had not worked out its share" in report.reason


def test_barrier_arrival_that_was_lost() -> None:
    launch = Launch(1, 3)
    launch.waits(0, EventKind.WAIT_BARRIER, gave_up=True, expected=3, seen=2)
    report = launch.diagnose()
    assert (report.cause, report.culprit) == ("lost-signal", 0)


def test_slow_rank_within_the_deadline_is_no_hang() -> None:
    launch = Launch(2, 1)
    half = NOW_NS - DEADLINE_NS // 2
    launch.set(0, ActorState.WAITING, EventKind.WAIT_COUNTS, since=half, peer=1, expert=4)
    launch.set(1, ActorState.RUNNING, EventKind.GATE, since=half)
    report = launch.diagnose()
    assert (report.hang, report.cause, report.culprit) == (False, "none", None)
    assert "500.0 ms" in report.reason
    assert not launch.diagnose(now_ns=NOW_NS - DEADLINE_NS // 4).hang


def test_withheld_return_names_the_owner() -> None:
    launch = Launch(2, 1)
    for rank in range(2):
        launch.left(rank)
    launch.waits(0, EventKind.WAIT_RETURN, 0, Lane.COMM0, gave_up=True, peer=1, expert=4, tile=9,
                 expected=1)  # fmt: skip
    report = launch.diagnose()
    assert (report.cause, report.culprit) == ("lost-signal", 1)
    assert "row tile 9" in report.reason


def test_h_waits_on_the_rows_of_the_tile_before() -> None:
    rows = counts()
    launch = dispatched()
    launch.waits(2, EventKind.WAIT_H, 1, Lane.SCHED, gave_up=True, expert=5, tile=1, expected=1,
                 seen=0)  # fmt: skip
    launch.waits(2, EventKind.WAIT_ROWS, 0, Lane.SCHED, expert=5, tile=2, expected=14, seen=4)
    report = launch.diagnose(chunk_counts=rows, tiles=tiles(rows))
    assert [w.kind for w in report.chain] == ["wait_h", "wait_rows"]
    assert (report.cause, report.culprit) == ("lost-signal", 3)


def test_report_is_plain_json_with_the_same_words() -> None:
    launch = dispatched()
    lacking_rows(launch, 1, 16, 13)
    report = launch.diagnose(chunk_counts=counts(), tiles=tiles(counts()))
    told = json.loads(json.dumps(report.as_dict()))
    assert told["culprit"] == report.culprit and told["text"] == report.text
    wait = told["chain"][-1]
    found = [wait[name] for name in ("kind", "lacking", "expected", "seen")]
    assert found == ["wait_rows", 3, 16, 13]
    assert wait["waited_ns"] >= DEADLINE_NS


def test_slots_of_idle_ranks_are_placed_by_position() -> None:
    """A slot that was never written has rank 0 in it: it must not count as rank 0's."""
    launch = Launch(3, 1).never(2)
    launch.waits(0, EventKind.WAIT_COUNTS, gave_up=True, peer=2, expert=5)
    launch.waits(1, EventKind.WAIT_COUNTS, peer=2, expert=5)
    report = launch.diagnose()
    assert [r["never_started"] for r in report.ranks] == [0, 0, 6]
    assert report.culprit == 2


@pytest.mark.parametrize("state", [ActorState.DONE, ActorState.ABORTED])
def test_owner_that_ended_long_after_the_abort_was_slow(state: ActorState) -> None:
    launch = Launch(2, 1)
    for rank in range(2):
        launch.left(rank)
    launch.waits(0, EventKind.WAIT_RETURN, 0, Lane.COMM0, gave_up=True, peer=1, expert=4, tile=9,
                 expected=1)  # fmt: skip
    launch.set(1, state, EventKind.LAUNCH, 0, Lane.MATH0, since=RAISED_NS + DEADLINE_NS // 2)
    report = launch.diagnose(now_ns=RAISED_NS + DEADLINE_NS)
    assert (report.cause, report.culprit) == ("slow", 1)
    assert "--deadline" in report.hint


def test_comm_lane_that_finished_after_the_abort_was_still_dispatching() -> None:
    """One comm lane of a chunk waits for results, the other had rows left to send."""
    rows = counts()
    launch = dispatched()
    lacking_rows(launch, 1, 16, 13)
    launch.set(0, ActorState.DONE, EventKind.LAUNCH, 1, Lane.COMM1, since=RAISED_NS + 5_000_000)
    report = launch.diagnose(chunk_counts=rows, tiles=tiles(rows))
    assert (report.cause, report.culprit) == ("slow", 0)

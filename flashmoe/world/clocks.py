"""Two-way exchanges between each rank's clock and rank 0's: who asks when, and who answers.

Under our own launcher through the board, else through the job's store, which is slower and so gives
a wider bound.  One rank is served at a time, so that no more than two processes poll.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from flashmoe.trace.align import Exchange, tightest

if TYPE_CHECKING:
    from flashmoe.world.board import Board
    from flashmoe.world.rendezvous import Job

MOST = 200
"""Exchanges of a rank at most, while they take less than ``SHORT_S``."""
SHORT_S = 0.03
BY_STORE = 20
LOST_S = 5.0
"""Without an answer for so long the comparison is given up: no trace is worth a hang."""

Now = Callable[[], int]


def compare(job: Job, board: Board, now_ns: Now) -> Exchange | None:
    """Compares this rank's clock with rank 0's; collective.  None where nobody answered."""
    job.barrier("clocks")
    turn = job.turn("clocks")
    if job.rank == 0:
        for rank in range(1, job.world):
            if board.shared:
                _serve_board(board, rank, now_ns)
            else:
                _serve_store(job, turn, rank, now_ns)
        return Exchange.same(now_ns())
    return _ask_board(job, board, now_ns) if board.shared else _ask_store(job, turn, now_ns)


def _spin(until: Callable[[], bool], limit_s: float) -> bool:
    """Polls without a pause, but lets others run; False where it did not come in time."""
    end = time.monotonic() + limit_s
    while not until():
        if time.monotonic() > end:
            return False
        time.sleep(0)
    return True


def _serve_board(board: Board, rank: int, now_ns: Now) -> None:
    turn, asked = board.header(0)["turn"], board.header(rank)[0]
    turn[0] = rank

    def asked_or_done() -> bool:
        return bool(asked["ping"] != asked["pong"] or turn[0] != rank)

    while _spin(asked_or_done, LOST_S) and turn[0] == rank:
        question = int(asked["ping"])
        asked["there_ns"] = now_ns()
        asked["pong"] = question


def _ask_board(job: Job, board: Board, now_ns: Now) -> Exchange | None:
    turn, mine = board.header(0)["turn"], board.header(job.rank)[0]
    end = time.monotonic() + LOST_S * job.world
    while int(turn[0]) != job.rank:
        if time.monotonic() > end:
            return None
        time.sleep(0.0005)
    sent: list[int] = []
    there: list[int] = []
    back: list[int] = []
    begin, question = time.monotonic(), int(mine["ping"])
    try:
        while (len(sent) < MOST and time.monotonic() - begin < SHORT_S) or len(sent) < 4:
            question += 1
            sent.append(now_ns())
            mine["ping"] = question
            if not _spin(lambda: bool(mine["pong"] == mine["ping"]), LOST_S):
                return None
            back.append(now_ns())
            there.append(int(mine["there_ns"]))
    finally:
        turn[0] = 0
    return tightest(sent, there, back)


def _serve_store(job: Job, turn: int, rank: int, now_ns: Now) -> None:
    for i in range(BY_STORE):
        job.get(f"clock/{turn}/{rank}/{i}", rank)
        job.set(f"clock/{turn}/{rank}/{i}/there", str(now_ns()).encode())


def _ask_store(job: Job, turn: int, now_ns: Now) -> Exchange | None:
    sent: list[int] = []
    there: list[int] = []
    back: list[int] = []
    for i in range(BY_STORE):
        key = f"clock/{turn}/{job.rank}/{i}"
        sent.append(now_ns())
        job.set(key, b"?")
        said = job.get(f"{key}/there", 0)
        back.append(now_ns())
        there.append(int(said))
    return tightest(sent, there, back)

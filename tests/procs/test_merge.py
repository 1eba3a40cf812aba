"""What becomes of a run, by what its ranks left: parts made up for it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("flashmoe._host")

from flashmoe.errors import FlashmoeError
from flashmoe.merge import Outcome, conclude
from flashmoe.part import Part
from flashmoe.presets import PRESETS
from flashmoe.session import Request
from flashmoe.world.base import Status

CONFIG = PRESETS["tiny"].config
OUTPUT = {"ok": True, "elements": 1, "max_abs": 0.0}


def part(rank: int, **report: Any) -> Part:
    """What a rank leaves that ran and was checked, but for ``report``."""
    said = {
        "rank": rank, "pid": 1, "exit_code": 0, "message": "ok", "interrupted": False,
        "status": int(Status.OK), "launch_ms": [1.0], "rows_needed": 0,
        "check": {"output": OUTPUT}, "nvlink": None, "clock": {"start": None, "end": None},
        "inputs": {"name": "tiny", "config": CONFIG.to_dict(), "tokens": [4, 4],
                   "remarks": [], "shared_expert": False},
    }  # fmt: skip
    return Part(said | report)


def stopped(rank: int, *, by_itself: bool = False) -> Part:
    return part(rank, exit_code=130, message="stopped", interrupted=by_itself, check=None,
                status=int(Status.HOST_ABORT))  # fmt: skip


def end(*parts: Part, check: bool = True, **outcome: Any) -> Any:
    request = Request("tiny", "tiny", CONFIG, (4, 4), ranks=2, world="host", check=check)
    by_rank = {p.report["rank"]: p for p in parts}
    return conclude(request, Outcome(by_rank, **outcome), "", lambda *_: None)


def failure(*parts: Part, **how: Any) -> tuple[int, str]:
    with pytest.raises(FlashmoeError) as caught:
        end(*parts, **how)
    return caught.value.exit_code, caught.value.message


def test_all_well() -> None:
    assert end(part(0), part(1)).check["ok"]
    result = end(part(0, check=None), part(1, check=None), check=False)
    assert (result.exit_code, result.message, result.check) == (0, "ok, not checked", None)


def test_who_was_stopped_first_is_named() -> None:
    assert failure(stopped(0), stopped(1, by_itself=True)) == (130, "rank 1 was stopped")
    assert failure(part(0), stopped(1)) == (130, "rank 1 was stopped")
    # It was stopped while it wrote its part.
    assert failure(stopped(0), halted=[0, 1]) == (130, "rank 1 was stopped")
    # Neither left a part: who ended first is the one.
    assert failure(halted=[1, 0]) == (130, "rank 1 was stopped")
    assert failure(halted=[0, 1]) == (130, "rank 0 was stopped")


def test_a_failure_is_told_rather_than_that_others_were_stopped() -> None:
    code, message = failure(stopped(0, by_itself=True), part(1, exit_code=7, message="bad ids"))
    assert (code, message) == (7, "rank 1: bad ids")


def test_a_verdict_or_a_part_that_lacks_is_no_success() -> None:
    assert failure(part(0), part(1, check=None)) == (1, "rank 1 left no verdict on its result")
    assert failure(part(0)) == (1, "rank 1 left no part of the run")
    assert failure(part(0), check=False) == (1, "rank 1 left no part of the run")

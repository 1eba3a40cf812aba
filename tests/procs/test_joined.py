"""What a rank of another launcher says where its part cannot be gathered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashmoe import joined
from flashmoe.errors import FlashmoeError
from flashmoe.pe import Ended


class FakeJob:
    """The store's words, of one rank."""

    rank = 1

    def __init__(self) -> None:
        self.words: dict[str, bytes] = {}
        self.failed = ""

    def has(self, key: str) -> bool:
        return key in self.words

    def set(self, key: str, value: bytes) -> None:
        self.words[key] = value

    def fail(self, reason: str) -> str:
        self.failed = self.failed or reason
        return self.failed


class Broken:
    """A rank whose failure took along what it had."""

    engine = object()
    interrupted = False

    def __init__(self, exit_code: int = 0, message: str = "ok") -> None:
        self.exit_code, self.message = exit_code, message

    def part(self) -> Any:
        raise IndexError("nothing is left of it")


@pytest.mark.parametrize(
    ("pe", "why", "code"),
    [(Broken(7, "no room"), "no room", 7), (Broken(), "IndexError: nothing is left of it", 1)],
)
def test_rank_0_is_told_at_once_why_there_is_no_part(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], pe: Any, why: str, code: int
) -> None:
    job: Any = FakeJob()
    joined._leave(pe, tmp_path, job)
    assert json.loads(job.words["part/1"]) == [f"rank 1: {why}", "", code]
    assert job.failed == f"rank 1: {why}"
    assert "IndexError" in capfd.readouterr().err


def test_rank_0_raises_what_it_failed_of(capfd: pytest.CaptureFixture[str]) -> None:
    pe: Any = Broken(1, "no room")
    with pytest.raises(FlashmoeError, match="no room"):
        joined._own_part(pe, Ended(pe, FlashmoeError("no room")))
    assert "IndexError" in capfd.readouterr().err
    with pytest.raises(IndexError):
        joined._own_part(pe, None)

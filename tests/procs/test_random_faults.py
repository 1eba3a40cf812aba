"""A short form of ``random_faults.py``; ``make fault-runs`` does two hundred."""

from __future__ import annotations

import pytest

pytest.importorskip("flashmoe._host")

from .random_faults import one


@pytest.mark.parametrize("number", range(10))
def test_runs_with_random_faults_end_and_leave_nothing(number: int) -> None:
    one(number, seed=1)

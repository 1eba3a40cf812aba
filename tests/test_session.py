"""From a request to what its engines are told."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from flashmoe.session import Request, engine_options
from flashmoe.world.base import DEADLINE_S, EngineOptions, Fault


def test_engines_are_told_all_but_the_faults_of_processes() -> None:
    slow, killed = Fault("slow", 1, seconds=0.1), Fault("killed", 0, point="kernel")
    request = Request(
        "tiny", "tiny", None, (4, 4), ranks=2, sms_per_rank=3, traced=True, ring_capacity=64,
        ring_mode="keep-last", device=5, no_pointers=True, faults=(slow, killed),
    )  # fmt: skip
    assert engine_options(request, 1) == EngineOptions(
        ranks=2, sms_per_rank=3, traced=True, deadline_s=DEADLINE_S, ring_capacity=64,
        ring_mode="keep-last", device=1, no_pointers=True, faults=(slow,),
    )  # fmt: skip

"""Faults injected into the host engine: its own flight recorder, and the rank that is named."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("flashmoe._host")

from flashmoe.config import MoEConfig
from flashmoe.tokens import random_tokens
from flashmoe.trace.diagnosis import HangReport, diagnose
from flashmoe.weights import random_weights
from flashmoe.world.base import EngineOptions, Fault, Status
from flashmoe.world.host import HostEngine

CONFIG = MoEConfig(hidden=64, intermediate=72, experts=8, top_k=2)
DEADLINE_S = 0.2


def hang(fault: Fault, tokens: list[int], sms: int) -> HangReport:
    options = EngineOptions(
        ranks=len(tokens),
        sms_per_rank=sms,
        deadline_s=DEADLINE_S,
        first_deadline_s=DEADLINE_S,
        faults=(fault,),
    )
    engine = HostEngine(CONFIG, random_weights(CONFIG, 0), tokens, options)
    try:
        engine.load(random_tokens(tokens, CONFIG, 0))
        assert engine.launch().status is Status.HANG
        routing = engine.routing()
        return diagnose(
            engine.flight(),
            ranks=len(tokens),
            deadline_s=DEADLINE_S,
            now_ns=time.monotonic_ns(),
            counts_seen=engine.counts_seen(),
            chunk_counts=routing.chunk_counts,
            tiles=routing.tiles,
        )
    finally:
        engine.close()


@pytest.mark.parametrize(("tokens", "sms"), [([40, 23], 1), ([31, 50, 7, 40], 2)])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_rank_at_fault_is_named(tokens: list[int], sms: int, rank: int) -> None:
    for fault, cause in (
        (Fault("never-starts", rank), "never-started"),
        (Fault("lost-signal", rank, expert=6), "lost-signal"),
        (Fault("slow", rank, seconds=3 * DEADLINE_S), "slow"),
    ):
        report = hang(fault, tokens, sms)
        assert report.cause == cause, report.text
        # Two sources may have sent as many rows as lack: then both are named, and none accused.
        accused = {report.culprit} if report.culprit is not None else set(report.candidates)
        assert rank in accused and len(accused) <= 2, report.text
        assert report.waits and report.chain

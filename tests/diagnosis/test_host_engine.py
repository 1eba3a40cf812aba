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


def test_a_deadline_shorter_than_the_arithmetic_misleads_nobody() -> None:
    """The time that a wait is allowed for arithmetic is part of the deadline that was passed."""
    from flashmoe.verdict import diagnose_hang

    config = MoEConfig(hidden=512, intermediate=512, experts=8, top_k=2)
    tokens = [200, 200]
    options = EngineOptions(
        ranks=2,
        sms_per_rank=2,
        deadline_s=0.001,
        first_deadline_s=0.001,
        faults=(Fault("lost-signal", 1, expert=3),),
    )
    engine = HostEngine(config, random_weights(config, 0), tokens, options)
    try:
        work_s = 2 * 400 * 512 * (8 + 2 * 3 * 512) / 1e9
        assert engine.options.deadline_s == pytest.approx(0.001 + work_s)
        assert engine.options.first_deadline_s == engine.options.deadline_s
        engine.load(random_tokens(tokens, config, 0))
        assert engine.launch().status is Status.HANG
        report = diagnose_hang(engine, engine.flight())
    finally:
        engine.close()
    assert report.cause == "lost-signal", report.text
    assert report.culprit == 1 or 1 in report.candidates, report.text
    assert report.deadline_s == engine.options.first_deadline_s

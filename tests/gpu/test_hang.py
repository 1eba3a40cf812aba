"""A launch that cannot end ends by its deadline, and says who holds it up."""

from __future__ import annotations

import _thread
import threading
import time

import pytest
import torch

from flashmoe.trace import schema
from flashmoe.world.base import EngineOptions, Fault, Status

from .layers import SMALL, deal, engine_for, inputs


@pytest.mark.parametrize("traced", [False, True])
def test_withheld_signal(traced: bool) -> None:
    weights, x = inputs(SMALL, 300)
    options = EngineOptions(
        ranks=2,
        traced=traced,
        deadline_s=0.5,
        first_deadline_s=0.5,
        faults=(Fault("lost-signal", rank=1, expert=2),),
    )
    engine = engine_for(SMALL, weights, deal(x, 2), options)
    began = time.monotonic()
    assert engine.launch().status is Status.HANG
    assert time.monotonic() - began < 0.5 + 3
    slots = engine.flight()
    gave_up = slots["state"] == schema.ActorState.GAVE_UP
    assert gave_up.any()
    # Who first reaches the deadline is chance: those who wait for the result rows may.
    cut_short = slots[gave_up | (slots["state"] == schema.ActorState.ABORTED)]
    rows = cut_short[cut_short["kind"] == schema.EventKind.WAIT_ROWS]
    assert set(rows["expert"]) == {2} and set(rows["rank"]) == {0}
    assert (rows["seen"] < rows["expected"]).all()
    engine.reset()


def test_abort_reaches_a_kernel_that_runs() -> None:
    weights, x = inputs(SMALL, 300)
    fault = Fault("lost-signal", rank=1, expert=2)
    options = EngineOptions(ranks=2, deadline_s=20.0, first_deadline_s=20.0, faults=(fault,))
    engine = engine_for(SMALL, weights, deal(x, 2), options)
    from_another_thread = threading.Timer(0.5, engine.abort)
    from_another_thread.start()
    began = time.monotonic()
    assert engine.launch().status is Status.HOST_ABORT
    assert 0.4 < time.monotonic() - began < 3
    from_another_thread.join()
    assert engine.launch().status is Status.HOST_ABORT, "abort is sticky until reset()"
    engine.reset()


def test_what_interrupts_the_wait_ends_the_kernel() -> None:
    weights, x = inputs(SMALL, 300)
    fault = Fault("lost-signal", rank=1, expert=2)
    options = EngineOptions(ranks=2, deadline_s=20.0, first_deadline_s=20.0, faults=(fault,))
    engine = engine_for(SMALL, weights, deal(x, 2), options)
    threading.Timer(0.5, _thread.interrupt_main).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        engine.launch()
    assert time.monotonic() - began < 3
    torch.cuda.synchronize()  # nothing runs any more, or this would take 20 s
    assert time.monotonic() - began < 3
    engine.reset()


def test_rank_that_never_starts() -> None:
    weights, x = inputs(SMALL, 300)
    options = EngineOptions(
        ranks=4,
        deadline_s=0.5,
        first_deadline_s=0.5,
        faults=(Fault("never-starts", rank=2),),
    )
    engine = engine_for(SMALL, weights, deal(x, 4), options)
    assert engine.launch().status is Status.HANG
    slots = engine.flight()
    assert (slots[slots["rank"] == 2]["state"] == schema.ActorState.NEVER_STARTED).all()
    waiting = slots[slots["state"] == schema.ActorState.GAVE_UP]
    assert set(waiting["kind"]) == {schema.EventKind.WAIT_COUNTS}
    assert set(waiting["peer"]) == {2}

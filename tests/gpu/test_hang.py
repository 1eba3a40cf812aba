"""A launch that cannot end ends by its deadline, and says who holds it up."""

from __future__ import annotations

import time

import pytest

from flashmoe.config import MoEConfig
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


@pytest.mark.parametrize("tokens", [64, 700])
def test_withheld_rows_of_a_first_tile(tokens: int) -> None:
    """Rows of a rank alone are copied out of x; whoever copies a first tile's awaits them."""
    config = MoEConfig(hidden=2048, intermediate=768, experts=128, top_k=8)
    weights, x = inputs(config, tokens)
    options = EngineOptions(
        ranks=1,
        deadline_s=0.5,
        first_deadline_s=0.5,
        faults=(Fault("lost-signal", rank=0, expert=0),),
    )
    engine = engine_for(config, weights, [x], options)
    began = time.monotonic()
    assert engine.launch().status is Status.HANG
    assert time.monotonic() - began < 0.5 + 3
    slots = engine.flight()
    ended = (slots["state"] == schema.ActorState.GAVE_UP) | (
        slots["state"] == schema.ActorState.ABORTED
    )
    rows = slots[ended & (slots["kind"] == schema.EventKind.WAIT_ROWS)]
    assert {schema.Lane.COMM0, schema.Lane.COMM1} <= set(rows["lane"])
    assert set(rows["expert"]) == {0}
    assert (rows["seen"] < rows["expected"]).all()
    engine.reset()
    engine.close()

"""A launch that cannot end ends by its deadline, and says who holds it up."""

from __future__ import annotations

import time

import numpy as np
import pytest

from flashmoe.presets import PRESETS
from flashmoe.trace import schema
from flashmoe.world.base import EngineOptions, Fault, Status

from .layers import SMALL, deal, engine_for, inputs


def waited_in_vain_for_rows(slots: np.ndarray) -> np.ndarray:
    """The slots whose actor waited for rows until it gave up or the launch was given up."""
    ended = np.isin(slots["state"], [schema.ActorState.GAVE_UP, schema.ActorState.ABORTED])
    return slots[ended & (slots["kind"] == schema.EventKind.WAIT_ROWS)]


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
    assert (slots["state"] == schema.ActorState.GAVE_UP).any()
    # Who first reaches the deadline is chance: those who wait for the result rows may.
    rows = waited_in_vain_for_rows(slots)
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
    config = PRESETS["qwen3-30b"].config
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
    rows = waited_in_vain_for_rows(slots)
    assert {schema.Lane.COMM0, schema.Lane.COMM1} <= set(rows["lane"])
    assert set(rows["expert"]) == {0}
    assert (rows["seen"] < rows["expected"]).all()
    engine.reset()
    engine.close()

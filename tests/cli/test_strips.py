"""Rows of states as a terminal gets them."""

from __future__ import annotations

import re

import pytest

from flashmoe.trace.cells import STATE_NAME, State
from flashmoe.trace.schema import EventKind
from flashmoe_cli.render.palette import EMPTY, INDEX, STATES
from flashmoe_cli.render.strips import Strip, draw, legend
from flashmoe_cli.render.text import visible

G1, WAIT, IDLE = INDEX["gemm1"], INDEX["wait_rows"], INDEX["idle"]

# An instant takes no room; outside of any launch there is nothing to draw.
NEVER_DRAWN = {EventKind.PUT, State.OUTSIDE}


def test_every_state_of_a_cell_can_be_drawn() -> None:
    drawn = {name for value, name in STATE_NAME.items() if value not in NEVER_DRAWN}
    assert drawn == set(INDEX)


def test_letters_and_colours_tell_states_apart() -> None:
    by_words = {state.words: state for state in STATES}
    assert len({s.letter for s in by_words.values()}) == len(by_words)
    assert len({s.colour for s in by_words.values()}) == len(by_words)


def test_without_colour_a_cell_is_a_letter() -> None:
    strips = [Strip("sm 0", [G1, G1, WAIT]), Strip("sm 10", [IDLE, EMPTY, G1])]
    assert draw(strips, colour=False, blocks=True) == [" sm 0 11r", "sm 10 . 1"]


def test_half_blocks_carry_two_strips_a_line() -> None:
    strips = [Strip(f"sm {i}", [G1, IDLE]) for i in range(3)]
    lines = draw(strips, colour=True, blocks=True)
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines] == ["sm 0-1 ▀▀", "  sm 2 ▀▀"]
    fore, back = f"38;5;{STATES[G1].colour}m", f"48;5;{STATES[G1].colour}m"
    assert fore in lines[0]
    assert back in lines[0]
    assert "48;5" not in lines[1]


def test_two_lanes_of_one_sm_share_its_name() -> None:
    lanes = [Strip(f"sm 3 {lane:<5}", [G1]) for lane in ("load", "sched", "comm0", "comm1")]
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", x) for x in draw(lanes, colour=True, blocks=True)]
    assert lines == [" sm 3 load/sched ▀", "sm 3 comm0/comm1 ▀"]


@pytest.mark.parametrize(("colour", "blocks"), [(True, True), (True, False), (False, False)])
def test_the_legend_names_what_is_there_and_fits(colour: bool, blocks: bool) -> None:
    lines = legend([G1, WAIT, IDLE, EMPTY], colour=colour, blocks=blocks, width=24)
    text = " ".join(lines)
    assert "GEMM1" in text
    assert "wait rows" in text
    assert "GEMM2" not in text
    assert all(visible(line) <= 24 for line in lines)

"""The states of a timeline: the name the analysis gives, a letter, a colour, and words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class State:
    """``letter`` stands for the state where there is no colour; ``colour`` is one of 256."""

    name: str
    letter: str
    colour: int
    words: str


#: In the order of the legend.  Work in greens and blues, moving in yellows, waiting in reds.
STATES: tuple[State, ...] = (
    State("gate", "G", 108, "gate"),
    State("plan", "P", 65, "plan"),
    State("dispatch", "D", 220, "dispatch"),
    State("gemm1", "1", 33, "GEMM1"),
    State("gemm2", "2", 37, "GEMM2"),
    State("combine", "C", 98, "combine"),
    State("counts", "N", 180, "send counts"),
    State("load", "L", 110, "load"),
    State("give_back", "R", 214, "return rows"),
    State("schedule", "S", 66, "schedule"),
    State("wait_logits", "l", 89, "wait logits"),
    State("wait_barrier", "b", 95, "wait barrier"),
    State("wait_counts", "n", 131, "wait counts"),
    State("wait_rows", "r", 160, "wait rows"),
    State("wait_h", "h", 203, "wait h"),
    State("wait_return", "t", 168, "wait return"),
    State("wait_operands", "o", 174, "wait operands"),
    State("wait_stage", "s", 138, "wait stage"),
    State("idle", ".", 237, "idle"),
    State("unrecorded", "?", 250, "unrecorded"),
)
INDEX: dict[str, int] = {state.name: i for i, state in enumerate(STATES)}
EMPTY = -1

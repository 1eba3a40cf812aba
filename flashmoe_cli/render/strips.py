"""Draws rows of states: half-block characters in colour, one letter a cell without."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flashmoe_cli.render.palette import EMPTY, STATES

_RESET = "\x1b[0m"
_UPPER = "▀"
_LETTERS = [state.letter for state in STATES]
_COLOURS = [state.colour for state in STATES]


@dataclass(frozen=True)
class Strip:
    """One row of cells: a label, and an index into ``STATES`` (or EMPTY) for each column."""

    label: str
    states: Sequence[int]


def draw(strips: Sequence[Strip], *, colour: bool, blocks: bool, label_width: int = 0) -> list[str]:
    """The strips under each other, labels right-aligned in ``label_width`` columns or more.

    With ``colour`` and ``blocks`` two strips share a line, the first above the second; with
    ``colour`` alone each cell is a letter on its colour; else a letter.
    """
    if colour and blocks:
        return _half_blocks(strips, label_width)
    width = max((len(s.label) for s in strips), default=0)
    width = max(width, label_width)
    cells = _on_colour if colour else _letters
    return [f"{s.label:>{width}} {cells(s.states)}" for s in strips]


def legend(present: Iterable[int], *, colour: bool, blocks: bool, width: int) -> list[str]:
    """What the cells mean, for the states that occur, wrapped to ``width`` columns."""
    words: dict[str, str] = {}
    for i in sorted(set(present) - {EMPTY}):
        state = STATES[i]
        sign = state.letter
        if colour:
            sign = f"\x1b[38;5;{state.colour}m██{_RESET}" if blocks else _on_colour([i])
        words.setdefault(state.words, sign)
    lines, line, used = [], "", 0
    for word, sign in words.items():
        size = len(word) + (3 if colour and blocks else 2)
        if used and used + 2 + size > width:
            lines.append(line)
            line, used = "", 0
        line += ("  " if used else "") + f"{sign} {word}"
        used += size + (2 if used else 0)
    return [*lines, line] if line else lines


def _letters(states: Sequence[int]) -> str:
    return "".join(" " if s == EMPTY else _LETTERS[s] for s in states)


def _on_colour(states: Sequence[int]) -> str:
    parts = []
    last = None
    for state in states:
        if state != last:
            parts.append(_RESET if state == EMPTY else f"\x1b[38;5;231;48;5;{_COLOURS[state]}m")
            last = state
        parts.append(" " if state == EMPTY else _LETTERS[state])
    return "".join(parts) + _RESET


def _half_blocks(strips: Sequence[Strip], label_width: int) -> list[str]:
    labels = [_pair_label(strips[i : i + 2]) for i in range(0, len(strips), 2)]
    width = max(label_width, *map(len, labels)) if labels else 0
    lines = []
    for label, i in zip(labels, range(0, len(strips), 2), strict=True):
        upper = strips[i].states
        lower = strips[i + 1].states if i + 1 < len(strips) else [EMPTY] * len(upper)
        lines.append(f"{label:>{width}} {_blocks(upper, lower)}")
    return lines


def _pair_label(pair: Sequence[Strip]) -> str:
    first, *second = (strip.label.strip() for strip in pair)
    if not second:
        return pair[0].label
    head, _, tail = first.rpartition(" ")
    other, _, last = second[0].rpartition(" ")
    if head != other:
        return f"{first}/{second[0]}"
    if not (tail + last).replace("-", "").isdigit():
        return f"{head} {tail}/{last}"
    return f"{head} {tail.split('-')[0]}-{last.split('-')[-1]}".strip()


def _blocks(upper: Sequence[int], lower: Sequence[int]) -> str:
    parts = []
    last: tuple[int, int] | None = None
    for pair in zip(upper, lower, strict=True):
        if pair != last:
            parts.append(_cell_style(*pair))
            last = pair
        parts.append(" " if pair[0] == EMPTY else _UPPER)
    return "".join(parts) + _RESET


def _cell_style(upper: int, lower: int) -> str:
    fore = "" if upper == EMPTY else f"\x1b[38;5;{_COLOURS[upper]}m"
    back = "" if lower == EMPTY else f"\x1b[48;5;{_COLOURS[lower]}m"
    return _RESET + fore + back

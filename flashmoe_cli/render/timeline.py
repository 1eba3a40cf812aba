"""The picture of a launch: rows of SMs or lanes over time, an axis, a legend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flashmoe_cli.output import Terminal
from flashmoe_cli.render.palette import EMPTY, INDEX
from flashmoe_cli.render.strips import Strip, draw, legend
from flashmoe_cli.render.text import clip, paint, plural, time_text

if TYPE_CHECKING:
    from flashmoe.trace.cells import Cells, Row


def label_width(meta: dict[str, Any], lane: str | None, where: Terminal) -> int:
    """Columns that the longest row label of a run can take; in half blocks a line has two rows."""
    last = max((ring["sm"] for ring in meta["rings"]["per_ring"]), default=0)
    paired = where.colour and where.unicode
    if lane == "all":
        return len(f"sm {last} comm0/comm1" if paired else f"sm {last} comm0")
    return len(f"sm {last}-{last}" if paired or lane is None else f"sm {last}")


def picture_lines(
    cells: Cells, meta: dict[str, Any], iteration: int, lane: str | None, where: Terminal
) -> list[str]:
    """The launch as a picture, with what a row and a column are, and the legend.

    ``lane`` is the one chosen, ``all`` for a row a lane, None for a row an SM.
    """
    from flashmoe.trace.cells import STATE_NAME

    to_palette = {value: INDEX.get(name, EMPTY) for value, name in STATE_NAME.items()}
    blocks = where.unicode
    width = label_width(meta, lane, where)
    lines = [clip(_caption(cells, meta, iteration, lane, where), where.width)]
    seen: set[int] = set()
    for rank in dict.fromkeys(row.rank for row in cells.rows):
        strips = []
        for row, values in zip(cells.rows, cells.states.tolist(), strict=True):
            if row.rank == rank:
                states = [to_palette[value] for value in values]
                seen.update(states)
                strips.append(Strip(_label(row, lane), states))
        if meta["world"]["ranks"] > 1:
            lines.append(paint(f"rank {rank}", "1", where.colour))
        lines += draw(strips, colour=where.colour, blocks=blocks, label_width=width)
    lines.append(_axis(cells, width, cells.states.shape[1]))
    return lines + legend(seen, colour=where.colour, blocks=blocks, width=where.width)


def _caption(
    cells: Cells, meta: dict[str, Any], iteration: int, lane: str | None, where: Terminal
) -> str:
    launches = int(meta.get("iterations") or 1)
    which = f"launch {iteration} of 0 to {launches - 1}: " if launches > 1 else ""
    row = plural(max(row.sms for row in cells.rows), "SM")
    if lane == "all":
        row = "one lane of " + row
    elif lane is not None:
        row = f"{lane} of {row}"
    per_line = "half a line" if where.colour and where.unicode else "a line"
    return (
        f"{which}{time_text(cells.begin_ns)} to {time_text(cells.end_ns)}; "
        f"a column is {time_text(cells.bin_ns)}, {per_line} is {row}"
    )


def _label(row: Row, lane: str | None) -> str:
    sm = f"sm {row.first_sm}"
    if row.last_sm != row.first_sm:
        sm += f"-{row.last_sm}"
    return f"{sm} {row.lane:<5}" if lane == "all" else sm


def _axis(cells: Cells, indent: int, columns: int) -> str:
    """Times under the picture: begin, end, and equal steps between where there is room."""
    marks = [" "] * columns
    last = time_text(cells.end_ns)
    free = columns - len(last) - 1
    step = max(columns // 5, 12)
    for at in range(0, max(free, 1), step):
        text = "|" + time_text(cells.begin_ns + at * cells.bin_ns)
        if at + len(text) < free:
            marks[at : at + len(text)] = text
    marks[columns - len(last) - 1 :] = last + "|"
    return " " * (indent + 1) + "".join(marks[:columns])

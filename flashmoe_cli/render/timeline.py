"""The picture of a launch: rows of SMs or lanes over time, an axis, a legend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flashmoe_cli.output import Terminal
from flashmoe_cli.render.palette import INDEX
from flashmoe_cli.render.strips import Strip, draw, legend
from flashmoe_cli.render.text import clip, paint, plural, time_text

if TYPE_CHECKING:
    from flashmoe.trace.cells import Cells


def label_width(meta: dict[str, Any], lane: str | None) -> int:
    """Columns that the longest row label of a run can take."""
    last = max((ring["sm"] for ring in meta["rings"]["per_ring"]), default=0)
    label = f"sm {last}" if lane is not None else f"sm {last}-{last}"
    return len(label) + (6 if lane == "all" else 0)


def picture_lines(cells: Cells, meta: dict[str, Any], where: Terminal) -> list[str]:
    """The launch as a picture, with what a row and a column are, and the legend."""
    from flashmoe.trace.cells import STATES

    to_palette = [INDEX[name] for name in STATES]
    blocks = where.unicode
    width = label_width(meta, next((lane for lane in cells.lane if lane), None))
    if None not in cells.lane and len(set(cells.lane)) > 1:
        width = label_width(meta, "all")
    lines = [clip(_caption(cells, meta, where), where.width)]
    seen: set[int] = set()
    for rank in dict.fromkeys(cells.rank):
        strips = []
        for i, of_rank in enumerate(cells.rank):
            if of_rank == rank:
                states = [to_palette[s] for s in cells.state[i].tolist()]
                seen.update(states)
                strips.append(Strip(_label(cells, i).rjust(width), states))
        if len(set(cells.rank)) > 1 or meta["world"]["ranks"] > 1:
            lines.append(paint(f"rank {rank}", "1", where.colour))
        lines += draw(_trimmed(strips, where), colour=where.colour, blocks=blocks)
    lines.append(_axis(cells, width, cells.state.shape[1]))
    return lines + legend(seen, colour=where.colour, blocks=blocks, width=where.width)


def _trimmed(strips: list[Strip], where: Terminal) -> list[Strip]:
    """Half-block lines join two labels, which must not carry the padding of one."""
    if where.colour and where.unicode:
        width = max(len(s.label) for s in strips)
        return [Strip(s.label.strip(), s.states) for s in strips] if width else strips
    return strips


def _caption(cells: Cells, meta: dict[str, Any], where: Terminal) -> str:
    launches = int(meta.get("iterations") or 1)
    which = f"launch {cells.iteration} of {launches} (0 to {launches - 1}), "
    if launches == 1:
        which = ""
    lane = f"{plural(cells.sms_per_row, 'SM')}, {cells.lane[0]}"
    if cells.lane[0] is None:
        lane = plural(cells.sms_per_row, "SM")
    elif len(set(cells.lane)) > 1:
        lane = "one lane of an SM"
    per_line = "half a line" if where.colour and where.unicode else "a row"
    return (
        f"{which}{time_text(cells.begin_ns)} to {time_text(cells.end_ns)} "
        f"of {time_text(cells.launch_ns)}; a column is {time_text(cells.column_ns)}, "
        f"{per_line} {lane}"
    )


def _label(cells: Cells, i: int) -> str:
    first, last = cells.sms[i]
    sm = f"sm {first}" if first == last else f"sm {first}-{last}"
    if len(set(cells.lane)) > 1:
        return f"{sm} {cells.lane[i] or '':<5}"
    return sm


def _axis(cells: Cells, indent: int, columns: int) -> str:
    """Times under the picture: begin, end, and round places between where there is room."""
    marks = [" "] * columns
    last = time_text(cells.end_ns)
    free = columns - len(last) - 1
    step = max(columns // 5, 12)
    for at in range(0, max(free, 1), step):
        text = "|" + time_text(cells.begin_ns + at * cells.column_ns)
        if at + len(text) < free:
            marks[at : at + len(text)] = text
    marks[columns - len(last) - 1 :] = last + "|"
    return " " * (indent + 1) + "".join(marks[:columns])

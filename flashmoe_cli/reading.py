"""What the reading verbs have in common: a run opened, its figures, and the picture's grid."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.errors import FlashmoeError
from flashmoe_cli.output import SCHEMA, Terminal

if TYPE_CHECKING:
    from flashmoe.trace.cells import Cells
    from flashmoe.trace.rundir import Run

#: Exit code of ``--strict`` where records were dropped or the run ended early.
INCOMPLETE = 4

#: Lines that the picture takes at least, and where nobody says how high the terminal is.
_FEWEST, _LINES = 12, 33
#: More rows than any run has: nothing is grouped.
_EVERY_ROW = 1 << 20


@dataclass(frozen=True)
class View:
    """The part of a run to draw; None: all of it, or for ``iteration`` the last launch."""

    sms: list[int] | None = None
    window_ns: tuple[float, float | None] | None = None
    lane: str | None = None
    iteration: int | None = None
    rank: int | None = None

    @property
    def zoomed(self) -> bool:
        """True where a part was chosen, and each row is wanted for itself."""
        return self.sms is not None or self.lane is not None


def open_described(name: str | Path | None) -> Run:
    """Opens a run that says what ran; raises FlashmoeError where it ended before it could, or where
    what it says is not what flashmoe writes."""
    from flashmoe.trace.metadata import require_described
    from flashmoe.trace.rundir import open_run

    run = open_run(name)
    lacking = [key for key in ("config", "world") if not isinstance(run.meta.get(key), dict)]
    if lacking:
        what = " and no ".join(lacking)
        raise FlashmoeError(
            f"{run.path.name} does not say what ran: its run.json has no {what}",
            "it ended before it began, or was changed; trace again",
        )
    require_described(run.meta, run.path / "run.json")
    return run


def open_traced(name: str | Path | None) -> Run:
    """Opens a run that holds events; raises FlashmoeError where it has none."""
    run = open_described(name)
    if not run.events.num_rows:
        raise FlashmoeError(
            f"{run.path.name} holds no events: it was not traced, or nothing ran",
            "flashmoe trace records them",
        )
    return run


def is_incomplete(run: Run) -> bool:
    """True where records were dropped, or the run ended before it was done.

    A run that was judged had come to its end, however the judgement went.
    """
    failed = bool((run.meta.get("status") or {}).get("code"))
    return bool(run.meta["rings"]["dropped"]) or (failed and not run.meta.get("check"))


def timeline_json(run: Run, view: View | None = None) -> dict[str, Any]:
    """Every figure of the timeline; with a part chosen, the picture's grid too."""
    from flashmoe.trace.analysis import timeline_summary

    view = view or View()
    _known_iteration(run, view.iteration)
    whole = {"schema": SCHEMA, "verb": "timeline"} | timeline_summary(run, view.iteration)
    if view.zoomed or view.window_ns is not None or view.rank is not None:
        from flashmoe.trace.cells import STATE_NAME

        cells = _cells(run, view, columns=100, rows=_EVERY_ROW)
        whole["picture"] = {
            "iteration": _drawn(run, view),
            "begin_ns": cells.begin_ns,
            "end_ns": cells.end_ns,
            "bin_ns": cells.bin_ns,
            "state_names": STATE_NAME,
            "rows": [
                {"rank": row.rank, "sm": row.first_sm, "lane": row.lane, "states": states.tolist()}
                for row, states in zip(cells.rows, cells.states, strict=True)
            ],
        }
    return whole


def timeline_text(run: Run, where: Terminal, view: View | None = None) -> list[str]:
    """The picture and the figures below it."""
    from flashmoe.trace.analysis import timeline_summary
    from flashmoe_cli.render.figures import figure_lines, lines_around
    from flashmoe_cli.render.timeline import label_width, picture_lines

    view = view or View()
    _known_iteration(run, view.iteration)
    columns = max(where.width - label_width(run.meta, view.lane, where) - 1, 10)
    half = 2 if where.colour and where.unicode else 1
    ranks, launches = run.meta["world"]["ranks"], int(run.meta.get("iterations") or 1)
    around = lines_around(ranks, launches)
    lines = max(where.height - around, _FEWEST) if where.height else _LINES
    rows = _EVERY_ROW if view.zoomed else lines * half
    cells = _cells(run, view, columns, rows)
    iteration = _drawn(run, view)
    return [
        *picture_lines(cells, run.meta, iteration, view.lane, where),
        "",
        *figure_lines(timeline_summary(run), run, iteration, where),
    ]


def _drawn(run: Run, view: View) -> int:
    """The launch to draw: the one asked for, else the last of which there are events."""
    if view.iteration is not None:
        return view.iteration
    from flashmoe.trace.columns import column

    return int(column(run.events, "iter").max())


def _cells(run: Run, view: View, columns: int, rows: int) -> Cells:
    from flashmoe.trace.cells import timeline_cells

    window = None
    if view.window_ns is not None:
        begin, end = view.window_ns
        window = (round(begin), None if end is None else round(end))
    return timeline_cells(
        run,
        rows,
        columns,
        lanes=None if view.lane in (None, "all") else [view.lane],
        sm=view.sms,
        window=window,
        iteration=_drawn(run, view),
        rank=view.rank,
        split_lanes=view.lane is not None,
    )


def _known_iteration(run: Run, iteration: int | None) -> None:
    """Refuses a launch that the run does not have."""
    if iteration is None:
        return
    launches = int(run.meta.get("iterations") or 0)
    if iteration >= launches:
        raise FlashmoeError(
            f"{run.path.name} has no launch {iteration}",
            f"its launches are 0 to {launches - 1}" if launches else "it holds none",
            exit_code=2,
        )


def traffic_figures(run: Run, iteration: int | None) -> dict[str, Any]:
    """Every figure of the traffic between ranks."""
    from flashmoe.trace.traffic import traffic_summary

    _known_iteration(run, iteration)
    return {"schema": SCHEMA, "verb": "traffic"} | traffic_summary(run, iteration)

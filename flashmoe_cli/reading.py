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

#: Lines that the picture may take where nobody says how high the terminal is.
_LINES = 33
#: Lines left to what stands above and below the picture.
_AROUND = 26


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


def open_traced(name: str | Path | None) -> Run:
    """Opens a run that holds events; raises FlashmoeError where it has none."""
    from flashmoe.trace.rundir import open_run

    run = open_run(name)
    if not run.events.num_rows:
        raise FlashmoeError(
            f"{run.path.name} holds no events: it was not traced, or nothing ran",
            "flashmoe trace records them",
        )
    return run


def is_incomplete(run: Run) -> bool:
    """True where records were dropped, or the run hung."""
    return bool(run.meta["rings"]["dropped"]) or bool(run.meta.get("hang"))


def timeline_json(run: Run, view: View | None = None) -> dict[str, Any]:
    """Every figure of the timeline; with a part chosen, the picture's grid too."""
    from flashmoe.trace.analysis import timeline_summary

    view = view or View()
    _known_iteration(run, view.iteration)
    whole = {"schema": SCHEMA, "verb": "timeline"} | timeline_summary(run, view.iteration)
    if view.zoomed or view.window_ns is not None or view.rank is not None:
        from flashmoe.trace.cells import STATES

        cells = _cells(run, view, columns=100, max_rows=None)
        whole["picture"] = {
            "iteration": cells.iteration,
            "begin_ns": cells.begin_ns,
            "end_ns": cells.end_ns,
            "column_ns": cells.column_ns,
            "states": STATES,
            "rows": [
                {"rank": r, "sm": sm[0], "lane": lane, "state": state.tolist()}
                for r, sm, lane, state in zip(
                    cells.rank, cells.sms, cells.lane, cells.state, strict=True
                )
            ],
        }
    return whole


def timeline_text(run: Run, where: Terminal, view: View | None = None) -> list[str]:
    """The picture and the figures below it."""
    from flashmoe.trace.analysis import timeline_summary
    from flashmoe_cli.render.figures import figure_lines
    from flashmoe_cli.render.timeline import label_width, picture_lines

    view = view or View()
    _known_iteration(run, view.iteration)
    columns = max(where.width - label_width(run.meta, view.lane) - 1, 10)
    half = 2 if where.colour and where.unicode else 1
    lines = max((where.height or _LINES + _AROUND) - _AROUND, 12)
    cells = _cells(run, view, columns, None if view.zoomed else lines * half)
    summary = timeline_summary(run)
    return [
        *picture_lines(cells, run.meta, where),
        "",
        *figure_lines(summary, run, cells.iteration, where),
    ]


def _cells(run: Run, view: View, columns: int, max_rows: int | None) -> Cells:
    from flashmoe.trace.cells import timeline_cells
    from flashmoe.trace.columns import Events

    events = Events.of(run.events)
    iteration = view.iteration
    return timeline_cells(
        events,
        run.meta,
        iteration=int(events.iter.max()) if iteration is None else iteration,
        columns=columns,
        max_rows=max_rows,
        sms=view.sms,
        rank=view.rank,
        lane=view.lane,
        window_ns=view.window_ns,
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

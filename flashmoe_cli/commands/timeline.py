"""``flashmoe timeline``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from flashmoe_cli.options import Json, RunPath
from flashmoe_cli.output import emit, terminal


class LaneChoice(StrEnum):
    """The lanes of an SM; ``all`` gives each a row of its own."""

    load = "load"
    sched = "sched"
    comm0 = "comm0"
    comm1 = "comm1"
    math0 = "math0"
    math1 = "math1"
    all = "all"


def timeline(
    run: RunPath = None,
    sm: Annotated[
        str | None,
        typer.Option("--sm", metavar="SMS", help="Only these SMs: 3, 17-31 or 0,4-7."),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            "--window", metavar="A..B", help="Only this stretch of the launch: 10us..40us."
        ),
    ] = None,
    lane: Annotated[
        LaneChoice | None,
        typer.Option(
            "--lane", help="This lane alone, or all of them, a row each; else a row an SM."
        ),
    ] = None,
    iteration: Annotated[
        int | None,
        typer.Option(
            "--iteration",
            metavar="N",
            help="The launch to draw, from 0; by default the last.",
            min=0,
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="N", help="Only this rank's SMs.", min=0)
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Exit code 4 where the trace is incomplete."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Shows what every SM did over time, and where each rank's time went.

    Under the picture: busy, communication, waiting and idle of each rank, which add up to the wall
    time; how much of the communication was hidden under computation; tile fill; rows per expert.
    """
    from flashmoe_cli import reading
    from flashmoe_cli.selection import parse_sms, parse_window

    lane_name = None if lane is None else lane.value
    view = reading.View(parse_sms(sm), parse_window(window), lane_name, iteration, rank)
    source = reading.open_traced(run)
    if as_json:
        emit(reading.timeline_json(source, view))
    else:
        from flashmoe_cli.render.info import title
        from flashmoe_cli.render.text import clip

        where = terminal()
        emit(
            [
                clip(title(source.path, source.meta), where.width),
                *reading.timeline_text(source, where, view),
            ]
        )
    if strict and reading.is_incomplete(source):
        raise typer.Exit(reading.INCOMPLETE)

"""``flashmoe traffic``."""

from __future__ import annotations

from typing import Annotated

import typer

from flashmoe_cli.options import Json, RunPath
from flashmoe_cli.output import emit, terminal


def traffic(
    run: RunPath = None,
    iteration: Annotated[
        int | None,
        typer.Option(
            "--iteration", metavar="N", help="Only this launch, from 0; by default all.", min=0
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Exit code 4 where the trace is incomplete."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Shows who sent how many bytes to whom, and at what rate.

    Payload is rows of real tokens that cross from one rank to another; padding never does.
    """
    from flashmoe_cli import reading

    source = reading.open_traced(run)
    figures = reading.traffic_figures(source, iteration)
    if as_json:
        emit(figures)
    else:
        from flashmoe_cli.render.info import title
        from flashmoe_cli.render.text import clip
        from flashmoe_cli.render.traffic import traffic_lines

        where = terminal()
        emit([clip(title(source.path, source.meta), where.width), *traffic_lines(figures, where)])
    if strict and reading.is_incomplete(source):
        raise typer.Exit(reading.INCOMPLETE)

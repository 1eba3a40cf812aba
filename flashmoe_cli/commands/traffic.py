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
        typer.Option("--iteration", help="Only this launch, from 0; by default all.", min=0),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit code 4 where records were dropped.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Shows who sent how many bytes to whom, and at what rate.

    Payload is rows of real tokens that cross from one rank to another; padding never does.
    """
    from flashmoe_cli.reading import INCOMPLETE, is_incomplete, traffic_json, traffic_text

    if as_json:
        emit(traffic_json(run, iteration))
    else:
        emit(traffic_text(run, iteration, terminal()))
    if strict and is_incomplete(run):
        raise typer.Exit(INCOMPLETE)

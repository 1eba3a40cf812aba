"""``flashmoe export``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flashmoe_cli.options import Force, Json, Quiet, RunPath
from flashmoe_cli.output import SCHEMA, emit, terminal


class Format(StrEnum):
    """The viewers' formats."""

    perfetto = "perfetto"
    chrome = "chrome"


def _format_of(output: Path | None) -> Format:
    """What a file of this name should hold."""
    name = "" if output is None else output.name.lower().removesuffix(".gz")
    return Format.chrome if name.endswith(".json") else Format.perfetto


def export(
    run: RunPath = None,
    format: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="Perfetto's binary format, or Chrome's JSON; by default as FILE's name says: "
            ".json is Chrome's, all else Perfetto's.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="The file; .gz compresses it. By default the run's name, here.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Writes a run for other viewers: ui.perfetto.dev, chrome://tracing."""
    from flashmoe.trace.export import FORMATS
    from flashmoe.trace.export import export as write
    from flashmoe_cli.progress import Progress
    from flashmoe_cli.reading import open_traced
    from flashmoe_cli.render.export import export_lines

    with Progress(quiet or as_json) as progress:
        progress("reading the run")
        source = open_traced(run)
        form = format or _format_of(output)
        path = output or Path(source.path.stem + FORMATS[form])
        progress(f"writing {path}")
        done = write(source, form, path, force=force)
    if as_json:
        emit(
            {
                "schema": SCHEMA,
                "verb": "export",
                "run": str(source.path),
                "file": str(done.path),
                "format": done.format,
                "bytes": done.size,
                "slices": done.slices,
                "flows": done.flows,
            }
        )
    elif not quiet:
        emit(export_lines(source.path, done, terminal()))

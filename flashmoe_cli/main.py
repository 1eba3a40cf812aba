"""The root of the command line: the verbs in their order, ``--version``, and the entry point."""

from __future__ import annotations

from typing import Annotated

import typer

from flashmoe.errors import FlashmoeError
from flashmoe_cli.commands import (
    bench,
    doctor,
    export,
    info,
    presets,
    run,
    timeline,
    trace,
    traffic,
    tune,
)
from flashmoe_cli.output import emit, terminal
from flashmoe_cli.root import Root, Verb

app = typer.Typer(
    name="flashmoe",
    cls=Root,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _verb, _panel in (
    (run.run, "Record"),
    (trace.trace, "Record"),
    (bench.bench, "Measure"),
    (tune.tune, "Measure"),
    (timeline.timeline, "Read a recorded run"),
    (traffic.traffic, "Read a recorded run"),
    (export.export, "Read a recorded run"),
    (info.info, "Read a recorded run"),
    (doctor.doctor, "This machine"),
    (presets.presets, "This machine"),
):
    app.command(cls=Verb, rich_help_panel=_panel)(_verb)


@app.callback()
def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit; with -v, the build too.")
    ] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="With --version: more.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --version: as JSON.")] = False,
) -> None:
    """One GPU kernel for a whole Mixture-of-Experts layer, and where its nanoseconds went.

    Start with: flashmoe trace tiny
    """
    if version:
        from flashmoe_cli.render.version import version_json, version_lines

        emit(version_json() if as_json else version_lines(verbose, terminal()))
        raise typer.Exit(0)
    for flag, given in (("--json", as_json), ("-v", verbose)):
        if given:
            verb = ctx.invoked_subcommand or "VERB"
            raise FlashmoeError(
                f"{flag} before the verb is for --version alone",
                f"put it behind the verb: flashmoe {verb} {flag}",
                exit_code=2,
            )
    if ctx.invoked_subcommand is None:
        emit(ctx.get_help())
        raise typer.Exit(0)


def main() -> None:
    """Runs the command line on ``sys.argv`` and exits with its code."""
    app(prog_name="flashmoe")


if __name__ == "__main__":
    main()

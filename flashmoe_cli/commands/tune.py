"""``flashmoe tune``."""

from __future__ import annotations

from typing import Annotated

import typer

from flashmoe_cli import options as o
from flashmoe_cli.completion import complete_presets
from flashmoe_cli.output import emit, terminal


def tune(
    presets: Annotated[
        list[str],
        typer.Argument(
            metavar="PRESET...",
            rich_help_panel="What",
            show_default=False,
            autocompletion=complete_presets,
            help="Layers by name (flashmoe presets lists them).",
        ),
    ],
    tokens: Annotated[
        str,
        typer.Option(
            "-T",
            "--tokens-per-rank",
            metavar="N[,N]...",
            rich_help_panel=o.SHAPE,
            help="Tokens that the layer is to be fast with, all alike.",
        ),
    ] = "1024,4096,8192",
    pairs: Annotated[
        int,
        typer.Option(
            "-n", "--pairs", metavar="N", rich_help_panel="How", min=1, help="Rounds that count."
        ),
    ] = 50,
    seed: o.Seed = 0,
    device: o.Device = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", rich_help_panel="Result", help="Measure, write nothing.")
    ] = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Measures how a layer's tiles are cut best on this GPU, and keeps it for later runs.

    What is found goes into a table in your configuration directory (or $FLASHMOE_TUNING), keyed by
    architecture, H, I and dtype; run, trace, bench and flashmoe.MoE read it.
    """
    given = dict(locals())
    from flashmoe_cli.render.tune import tune_lines
    from flashmoe_cli.tuning import tune as run

    report = run(given)
    emit(report if as_json else tune_lines(report, terminal()))

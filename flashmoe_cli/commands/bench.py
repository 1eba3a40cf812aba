"""``flashmoe bench``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flashmoe_cli import options as o
from flashmoe_cli.completion import complete_presets
from flashmoe_cli.output import emit, terminal


class Mode(StrEnum):
    """What is set beside what."""

    speed = "speed"
    tracing = "tracing"
    ranks = "ranks"
    skew = "skew"


class Suite(StrEnum):
    """Lists of shapes."""

    h200 = "h200"
    latency = "latency"


HOW = "How"


def bench(
    presets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PRESET...",
            rich_help_panel="What",
            show_default=False,
            autocompletion=complete_presets,
            help="Shapes by name (flashmoe presets lists them); without any, a suite.",
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "-T",
            "--tokens-per-rank",
            metavar="N[,N]...",
            rich_help_panel=o.SHAPE,
            show_default=False,
            help="Tokens; a list with commas makes a shape of each.",
        ),
    ] = None,
    hidden: o.Hidden = None,
    intermediate: o.Intermediate = None,
    experts: o.Experts = None,
    top_k: o.TopK = None,
    activation: o.ActivationName = None,
    dtype: o.DTypeName = None,
    suite: Annotated[
        Suite | None,
        typer.Option(
            "--suite",
            rich_help_panel=o.SHAPE,
            show_default=False,
            help="A list of shapes: those of docs/performance.md (h200), or few tokens (latency).",
        ),
    ] = None,
    mode: Annotated[
        Mode,
        typer.Option(
            "--mode",
            rich_help_panel=HOW,
            show_default=False,
            help="Ours beside ceilings and peers (speed), or beside ours traced, over virtual "
            "ranks, or with skewed routing.",
        ),
    ] = Mode.speed,
    pairs: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--pairs",
            metavar="N",
            rich_help_panel=HOW,
            show_default=False,
            min=1,
            help="Rounds that count (50; 300 with --mode tracing).",
        ),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            "--peers",
            metavar="A,B|all|none",
            rich_help_panel=HOW,
            show_default=False,
            help="grouped-mm, grouped-mm-compiled, vllm-triton, vllm-triton-tuned, liger, sglang, "
            "deepgemm (all).",
        ),
    ] = None,
    sglang_wheel: Annotated[
        Path | None,
        typer.Option(
            "--sglang-wheel",
            metavar="FILE",
            rich_help_panel=HOW,
            show_default=False,
            help="The wheel to read the Triton peers from; by default $FLASHMOE_SGLANG_WHEEL, or "
            "an installed SGLang.",
        ),
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            metavar="N",
            rich_help_panel=HOW,
            show_default=False,
            min=2,
            help="With --mode ranks: virtual ranks beside one (8).",
        ),
    ] = None,
    seed: o.Seed = 0,
    device: o.Device = 0,
    compare: Annotated[
        Path | None,
        typer.Option(
            "--compare",
            metavar="FILE",
            rich_help_panel="Result",
            show_default=False,
            help="An earlier result of --json: how much slower or faster each shape became.",
        ),
    ] = None,
    fail_over: Annotated[
        str | None,
        typer.Option(
            "--fail-over",
            metavar="5%",
            rich_help_panel="Result",
            show_default=False,
            help="With --compare: exit code 3 where a shape became slower by more.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            rich_help_panel="Result",
            show_default=False,
            help="Write the object of --json to a file too, anew after each shape.",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="FILE",
            rich_help_panel="Result",
            show_default=False,
            help="Go on with a file of --output: keep its shapes but for those that failed, add "
            "the others, and write it anew after each. Of the same GPU, build and options alone.",
        ),
    ] = None,
    force: o.Force = False,
    as_json: o.Json = False,
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
) -> None:
    """Times the kernel beside its ceilings and other MoE kernels, in one run on this GPU.

    Every work of a shape takes its turn in each round, with L2 flushed before it; docs/bench.md
    says how time is taken and what each peer is.
    """
    given = dict(locals())
    from flashmoe_cli.benching import bench as run
    from flashmoe_cli.render.bench import bench_lines

    report, exit_code = run(given)
    if as_json:
        emit(report)
    else:
        emit(bench_lines(report, terminal(), verbose))
    if exit_code:
        raise typer.Exit(exit_code)

"""From flags to a bench: which shapes, which peers, what to compare with, what to end with."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.digits import whole_number
from flashmoe_cli.request import shape, usage

if TYPE_CHECKING:
    from flashmoe.bench.shapes import Shape

_PAIRS = {"speed": 50, "tracing": 300, "ranks": 50, "skew": 50}
_RANKS = 8
_SHAPE_FLAGS = ("hidden", "intermediate", "experts", "top_k", "activation", "dtype")
#: Tracing is held to its bar, and skew makes sense, from so many tokens up.
_MANY_TOKENS = 4096

EXIT_FAILED = 1
EXIT_REGRESSION = 3


def bench(given: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Runs what the flags ``given`` say: the report, and what the command ends with.

    Raises FlashmoeError for a misuse (2) or where there is no GPU to time (5), before anything
    runs.
    """
    from flashmoe.bench.compare import command_words, compare, parse_limit, read_report
    from flashmoe.bench.machine import gpu_machine, require_gpu
    from flashmoe.bench.pairs import PairOptions
    from flashmoe.bench.peers import PeerOptions, chosen
    from flashmoe.bench.report import Bench, any_failed, run_bench
    from flashmoe.bench.speed import SpeedOptions
    from flashmoe.build_info import require_runner
    from flashmoe_cli.progress import Progress

    mode = str(given["mode"])
    shapes = shapes_of(given)
    _refuse(given)
    peers = tuple(chosen(given["peers"] or "all")) if mode == "speed" else ()
    limit = None if given["fail_over"] is None else parse_limit(given["fail_over"])
    compared = None if given["compare"] is None else read_report(given["compare"], mode)
    resume: Path | None = given["resume"]
    earlier = read_report(resume, mode) if resume is not None and resume.exists() else None
    output: Path | None = given["output"] or resume
    pairs = given["pairs"] or _PAIRS[mode]
    require_runner()
    require_gpu(given["device"])
    options: SpeedOptions | PairOptions
    if mode == "speed":
        options = SpeedOptions(pairs, peers, PeerOptions(given["sglang_wheel"]), given["seed"])
    else:
        options = PairOptions(pairs, given["ranks"] or _RANKS, given["seed"])

    def save(report: dict[str, Any]) -> None:
        if output is not None:
            _write(output, report)

    with Progress(given["quiet"]) as progress:
        whole = Bench(mode, shapes, options, tuple(command_words(sys.argv)))
        opened = functools.partial(gpu_machine, given["device"])
        report = run_bench(whole, opened, progress, save, earlier)
    exit_code = EXIT_FAILED if any_failed(report) else 0
    if compared is not None:
        report["comparison"] = compare(report, compared, str(given["compare"]))
        judged = _judge(report["comparison"], limit)
        exit_code = exit_code or judged
    save(report)
    return report, exit_code


def _judge(comparison: dict[str, Any], limit: float | None) -> int:
    from flashmoe.bench.compare import regressions

    comparison["limit"] = limit
    comparison["regressions"] = []
    if limit is None:
        return 0
    slower = regressions(comparison, limit)
    comparison["regressions"] = [{"preset": s["preset"], "T": s["T"]} for s in slower]
    return EXIT_REGRESSION if slower else 0


def _refuse(given: dict[str, Any]) -> None:
    """Flags that contradict each other, or an output that is there."""
    mode = str(given["mode"])
    if given["fail_over"] is not None and given["compare"] is None:
        raise usage("--fail-over without --compare", "name the earlier result with --compare FILE")
    if mode != "speed":
        for name in ("compare", "peers", "sglang_wheel"):
            if given[name] is not None:
                flag = name.replace("_", "-")
                raise usage(
                    f"--{flag} with --mode {mode}", f"leave --{flag} out, or use --mode speed"
                )
    if given["ranks"] is not None and mode != "ranks":
        raise usage("--ranks without --mode ranks", "bench times one rank; add --mode ranks")
    output: Path | None = given["output"]
    if output is not None and given["resume"] is not None:
        raise usage("--output beside --resume", "leave --output out: --resume writes its file")
    if output is not None and output.exists() and not given["force"]:
        raise usage(f"{output} exists", "add to it with --resume, or pass --force")
    output = output or given["resume"]
    if output is not None and not output.parent.is_dir():
        raise usage(f"no folder {output.parent}", "make it, or choose another place")
    if output is not None and output.is_dir():
        raise usage(f"{output} is a folder", "name a file")


def shapes_of(given: dict[str, Any]) -> tuple[Shape, ...]:
    """The shapes to time: presets, a shape by its sizes, or a suite."""
    from flashmoe.bench.shapes import Shape, suite

    mode = str(given["mode"])
    overrides = {
        name: None if given[name] is None else getattr(given[name], "value", given[name])
        for name in _SHAPE_FLAGS
    }
    names: list[str | None] = list(given["presets"] or [])
    own = any(value is not None for value in overrides.values()) or given["tokens"] is not None
    if given["suite"] is not None and (names or own):
        raise usage("--suite beside other shapes", "leave the preset and its flags out, or --suite")
    if not names and not own:
        chosen = suite(str(given["suite"] or "h200"))
        if given["suite"] is not None or mode == "speed":
            return chosen
        if mode == "skew":
            chosen = tuple(s for s in chosen if s.preset == "qwen3-30b")
        return tuple(s for s in chosen if s.tokens >= _MANY_TOKENS)
    shapes = []
    for name in names or [None]:
        label, config, default = shape(name, overrides)
        shapes += [Shape(label, config, t) for t in tokens_of(given["tokens"], default)]
    return tuple(shapes)


def tokens_of(text: str | None, default: int) -> list[int]:
    """The numbers of ``-T``, or ``default`` alone.  Raises FlashmoeError (2) for anything else."""
    if text is None:
        return [default]
    found = [whole_number(part) for part in text.split(",")]
    numbers = [n for n in found if n]
    if len(numbers) < len(found):
        raise usage(f"-T {text} is not a number of tokens", "use -T 4096, or -T 4096,8192 for both")
    return numbers


def _write(path: Path, report: dict[str, Any]) -> None:
    """The object as ``--json`` prints it: complete, or not there."""
    import os

    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)

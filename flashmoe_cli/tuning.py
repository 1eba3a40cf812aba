"""From flags to a tuning: which layers, with which tokens, and what goes into the table."""

from __future__ import annotations

import functools
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from flashmoe_cli.benching import tokens_of
from flashmoe_cli.output import SCHEMA
from flashmoe_cli.request import shape

if TYPE_CHECKING:
    from flashmoe.bench.machine import Machine
    from flashmoe.bench.phases import Progress
    from flashmoe.bench.report import OpenMachine
    from flashmoe.bench.shapes import Shape
    from flashmoe.bench.tune import TuneOptions


def tune(given: dict[str, Any]) -> dict[str, Any]:
    """Runs what the flags ``given`` say, a process a layer, and writes the table after each.

    Raises FlashmoeError for a misuse (2), where there is no GPU to time (5), and where a layer
    fails: those before it are kept.
    """
    from flashmoe import tuning
    from flashmoe.bench.apart import Lost, apart
    from flashmoe.bench.machine import gpu_machine, require_gpu
    from flashmoe.bench.shapes import Shape
    from flashmoe.bench.tune import TuneOptions
    from flashmoe.build_info import require_runner
    from flashmoe.errors import FlashmoeError
    from flashmoe.world.kernel import ARCH, untuned
    from flashmoe.world.tiles import extension
    from flashmoe_cli.progress import Progress

    layers = [shape(name, {}) for name in given["presets"]]
    tokens = tokens_of(given["tokens"], 0)
    require_runner()
    require_gpu(given["device"])
    opened = functools.partial(gpu_machine, given["device"])
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "verb": "tune",
        "table": None if given["dry_run"] else str(tuning.table_path()),
        "results": [],
    }
    with Progress(given["quiet"]) as progress:
        for label, config, _ in layers:
            options = TuneOptions(
                untuned(config, max(tokens)),
                extension().TILE_ROWS_STEP[config.dtype],
                given["pairs"],
                given["seed"],
            )
            shapes = tuple(Shape(label, config, t) for t in tokens)
            try:
                found = apart(functools.partial(_tune, shapes, options, opened), progress)
            except Lost as exc:
                raise FlashmoeError(f"{label}: {exc}", "see what it printed above") from exc
            found = {"preset": label, "arch": ARCH, **found}
            if not given["dry_run"]:
                tuning.put(_entry(found))
            report["results"].append(found)
    return report


def _tune(
    shapes: tuple[Shape, ...], options: TuneOptions, opened: OpenMachine, progress: Progress
) -> dict[str, Any]:
    """One layer, in the process that this is called in."""
    from flashmoe.bench.tune import tune_layer

    machine: Machine = opened()
    about = machine.environment
    measured = {name: about.get(name) for name in ("gpu", "driver", "flashmoe", "commit")}
    found = tune_layer(shapes[0].config, shapes, machine, options, progress)
    return found | {"measured": measured | {"time": datetime.now(UTC).isoformat("T", "seconds")}}


def _entry(found: dict[str, Any]) -> dict[str, Any]:
    key = {name: found[name] for name in ("arch", "H", "I", "dtype")}
    measured = {**found["measured"], "tokens": found["tokens"], "ratio": found["ratio"]}
    return {**key, **found["chosen"], "measured": measured}

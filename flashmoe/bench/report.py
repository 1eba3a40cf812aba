"""A whole bench: every shape of a run as one object, which ``--json`` prints as it is."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from flashmoe.bench.machine import Machine
from flashmoe.bench.pairs import PairOptions, bench_pair
from flashmoe.bench.shapes import Shape
from flashmoe.bench.speed import (
    PEER_RATIO,
    DeviceLost,
    Progress,
    SpeedOptions,
    bench_shape,
    failed,
)
from flashmoe.bench.statistics import CONFIDENCE, RESAMPLES
from flashmoe.bench.stopwatch import METHOD

SCHEMA = 1
"""Version of the object; ``compare`` reads this and every older one."""

SoFar = Callable[[dict[str, Any]], None]
"""Called with the report after each shape, so that a run that is cut short leaves what it had."""


def _nobody(report: dict[str, Any]) -> None:
    pass


def speed_report(
    shapes: Sequence[Shape],
    machine: Machine,
    options: SpeedOptions,
    command: Sequence[str],
    progress: Progress,
    so_far: SoFar = _nobody,
) -> dict[str, Any]:
    """Ours beside ceilings and peers, a result a shape."""
    method = {
        "times": METHOD,
        "rounds": options.pairs,
        "peers_may_be_off_by": PEER_RATIO,
        "seed": options.seed,
    }
    report = _whole("speed", machine, command, method)
    lost = ""
    for shape in shapes:
        if lost:
            result = failed(shape, options, f"not run: {lost}")
        else:
            try:
                result = bench_shape(shape, machine, options, progress)
            except DeviceLost as exc:
                lost = str(exc)
                result = failed(shape, options, lost)
        report["results"].append(result)
        so_far(report)
    return report


def pair_report(
    kind: str,
    shapes: Sequence[Shape],
    machine: Machine,
    options: PairOptions,
    command: Sequence[str],
    progress: Progress,
    so_far: SoFar = _nobody,
) -> dict[str, Any]:
    """Our kernel against itself, a result a shape; ``kind`` is one of ``KINDS``."""
    method = {
        "times": METHOD,
        "rounds": options.pairs,
        "interval": f"percentile bootstrap over rounds, {RESAMPLES} resamples",
        "confidence": CONFIDENCE,
        "seed": options.seed,
    }
    report = _whole(kind, machine, command, method)
    for shape in shapes:
        report["results"].append(bench_pair(kind, shape, machine, options, progress))
        so_far(report)
    return report


def _whole(
    mode: str,
    machine: Machine,
    command: Sequence[str],
    method: dict[str, Any],
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "verb": "bench",
        "mode": mode,
        "command": shlex.join(command),
        "time": now().isoformat(timespec="seconds"),
        "environment": machine.environment,
        "method": method,
        "results": [],
    }


def any_failed(report: dict[str, Any]) -> bool:
    """Whether some shape of ours was wrong or did not run.  Peers that fail do not count."""
    return any(result["failure"] for result in report["results"])

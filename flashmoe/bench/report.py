"""A whole bench: every shape of a run as one object, which ``--json`` prints as it is."""

from __future__ import annotations

import functools
import shlex
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from flashmoe.bench.apart import Lost, apart
from flashmoe.bench.machine import Machine
from flashmoe.bench.pairs import PairOptions, bench_pair, failed_pair
from flashmoe.bench.phases import Progress
from flashmoe.bench.resume import check_same, take_over
from flashmoe.bench.shapes import Shape, shape_key
from flashmoe.bench.speed import (
    PEER_RATIO,
    DeviceLost,
    SpeedOptions,
    bench_shape,
    failed,
    no_details,
    ratios,
)
from flashmoe.bench.statistics import CONFIDENCE, RESAMPLES
from flashmoe.bench.stopwatch import METHOD

SCHEMA = 1
"""Version of the object; ``compare`` reads this and every older one."""

SoFar = Callable[[dict[str, Any]], None]
"""Called with the report after each shape, so that a run that is cut short leaves what it had."""

OpenMachine = Callable[[], Machine]
"""Opens the machine in the process that is to time on it; picklable (see ``apart``)."""


@dataclass(frozen=True)
class Bench:
    """What a bench times, and how.

    ``mode`` is ``speed``, with SpeedOptions, or one of ``pairs.KINDS``, with PairOptions.
    ``command`` is what a person typed.
    """

    mode: str
    shapes: tuple[Shape, ...]
    options: SpeedOptions | PairOptions
    command: tuple[str, ...] = ("flashmoe", "bench")

    def method(self) -> dict[str, Any]:
        """How times are taken: with another method, figures do not belong into one report."""
        method = {"times": METHOD, "rounds": self.options.pairs, "seed": self.options.seed}
        if isinstance(self.options, PairOptions):
            interval = f"percentile bootstrap over rounds, {RESAMPLES} resamples"
            method |= {"interval": interval, "confidence": CONFIDENCE}
            return method | ({"ranks": self.options.ranks} if self.mode == "ranks" else {})
        wheel = self.options.peer_options.sglang_wheel
        return method | {
            "peers": self.peer_order(),
            "peers_may_be_off_by": PEER_RATIO,
            "sglang_wheel": None if wheel is None else wheel.name,
        }

    def peer_order(self) -> list[str]:
        """The names of the peers to time; none in the other modes."""
        if isinstance(self.options, PairOptions):
            return []
        return [peer.name for peer in self.options.peers]

    def without(self, names: Collection[str]) -> Bench:
        """The same without some peers."""
        if isinstance(self.options, PairOptions) or not names:
            return self
        left = tuple(peer for peer in self.options.peers if peer.name not in names)
        return replace(self, options=replace(self.options, peers=left))

    def time(self, shape: Shape, machine: Machine, progress: Progress) -> dict[str, Any]:
        """The result of one shape.  Raises DeviceLost."""
        if isinstance(self.options, PairOptions):
            return bench_pair(self.mode, shape, machine, self.options, progress)
        return bench_shape(shape, machine, self.options, progress)

    def failed(self, shape: Shape, why: str) -> dict[str, Any]:
        """The result of a shape that was not timed."""
        if isinstance(self.options, PairOptions):
            return failed_pair(shape, why)
        return failed(shape, self.options, why)


def run_bench(
    bench: Bench,
    open_machine: OpenMachine,
    progress: Progress,
    so_far: SoFar = lambda report: None,
    earlier: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Every shape in a process of its own, a result each; what fails is said in its ``error``.

    ``earlier`` is a report to go on with: its results stay, but for those with an ``error``, whose
    shapes are timed again if they are asked for.  Raises FlashmoeError where the machine cannot be
    opened, or where ``earlier`` was measured on another or in another way.
    """
    progress("looking at the GPU", 0, 0)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "verb": "bench",
        "mode": bench.mode,
        "command": shlex.join(bench.command),
        "time": _now(),
        "environment": apart(functools.partial(_environment, open_machine), progress),
        "method": bench.method(),
        "results": [],
    }
    shapes = list(bench.shapes)
    if earlier is not None:
        check_same(report, earlier)
        report["results"], shapes = take_over(earlier["results"], shapes)
    place = {shape_key(result): i for i, result in enumerate(report["results"])}
    for shape in shapes:
        result = _time(bench, shape, open_machine, progress)
        # In the place of the one that failed, so that a report keeps its order.
        at = place.get(shape_key(result), len(report["results"]))
        report["results"][at : at + 1] = [result]
        so_far(report)
    return report


def _time(
    bench: Bench, shape: Shape, open_machine: OpenMachine, progress: Progress
) -> dict[str, Any]:
    began = time.monotonic()
    clashing: dict[str, str] = {}
    while True:
        try:
            result = _time_apart(bench.without(clashing), shape, open_machine, progress, began)
        except (Lost, DeviceLost) as exc:
            if exc.during in bench.peer_order() and exc.during not in clashing:
                clashing[exc.during] = str(exc)
                continue
            result = bench.failed(shape, str(exc))
        break
    for name, why in clashing.items():
        _add_peer(result, name, why, bench, shape, open_machine, progress)
    if clashing:
        result["peers"] = {name: result["peers"][name] for name in bench.peer_order()}
    result["seconds"]["whole"] = time.monotonic() - began
    return result | {"time": _now()}


def _time_apart(
    bench: Bench, shape: Shape, open_machine: OpenMachine, progress: Progress, began: float
) -> dict[str, Any]:
    return apart(functools.partial(_time_here, bench, shape, open_machine, began), progress)


def _add_peer(
    result: dict[str, Any],
    name: str,
    why: str,
    bench: Bench,
    shape: Shape,
    open_machine: OpenMachine,
    progress: Progress,
) -> None:
    """Adds a peer to a shape's result that was left out there since it broke the process.

    It is timed beside ours and the dense GEMMs in a process of its own; where it breaks that, too,
    it has failed.
    """
    details, ms = {**no_details(), "reason": why}, None
    result["peer_details"][name], result["peers"][name] = details, ms
    if result["error"]:
        return
    others = [other for other in bench.peer_order() if other != name]
    try:
        alone = _time_apart(bench.without(others), shape, open_machine, progress, time.monotonic())
    except (Lost, DeviceLost) as exc:
        details["reason"] = str(exc)
    else:
        if not alone["error"]:
            times = {field: alone[field] for field in ("ours_ms", "dense_ms")}
            details = alone["peer_details"][name] | {"apart": {"why": why, **times}}
            ms = alone["peers"][name]
    result["peer_details"][name], result["peers"][name] = details, ms
    result |= ratios(result)


def _time_here(
    bench: Bench, shape: Shape, open_machine: OpenMachine, began: float, progress: Progress
) -> dict[str, Any]:
    """One shape, in the process that this is called in, which was asked for at ``began``."""
    progress(f"{shape.label}: starting", 0, 0)
    machine = open_machine()
    start = time.monotonic() - began
    result = bench.time(shape, machine, progress)
    return result | {"seconds": {"start": start, **result["seconds"]}}


def _environment(open_machine: OpenMachine, progress: Progress) -> dict[str, Any]:
    return open_machine().environment


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def any_failed(report: dict[str, Any]) -> bool:
    """Whether some shape of ours was wrong or did not run.  Peers that fail do not count."""
    return any(result["error"] for result in report["results"])

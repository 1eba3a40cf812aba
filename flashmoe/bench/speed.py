"""One shape: our kernel beside two dense GEMMs, the memory floor, the gate alone and the peers."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from flashmoe.bench.ceilings import DensePair, floor_ms, flop
from flashmoe.bench.gate import Gate, compiled, gate_of
from flashmoe.bench.machine import Clocks, Machine, TimedLayer
from flashmoe.bench.ours import Ours, ok
from flashmoe.bench.peers import Case, Peer, PeerOptions, Unavailable
from flashmoe.bench.phases import Phases, Progress
from flashmoe.bench.shapes import Shape
from flashmoe.bench.statistics import Spread
from flashmoe.bench.stopwatch import Prepared
from flashmoe.config import MoEConfig, MoEWeights
from flashmoe.errors import FlashmoeError, one_line
from flashmoe.numerics import check_output
from flashmoe.tokens import random_tokens
from flashmoe.weights import random_weights

PEER_RATIO = 4.0
"""A peer's result may be so many times our bound away from the reference: peers round gate and up
projections, weighted rows and logits to the dtype too, which the bound leaves no room for.  A row
that is lost or swapped is tens of times beyond it."""


@dataclass(frozen=True)
class SpeedOptions:
    """``pairs``: rounds that count; ``seed`` draws weights and tokens."""

    pairs: int
    peers: tuple[Peer, ...] = ()
    peer_options: PeerOptions = field(default_factory=PeerOptions)
    seed: int = 0


class DeviceLost(Exception):
    """A kernel of somebody's has broken the CUDA context: nothing more can run in this process.

    ``during`` is the phase in which it did, as progress names it; a peer's is the peer's name.
    """

    def __init__(self, what: str, during: str) -> None:
        super().__init__(what, during)  # both, so that it can be pickled
        self.what, self.during = what, during

    def __str__(self) -> str:
        return self.what


def _empty(shape: Shape, options: SpeedOptions) -> dict[str, Any]:
    names = ("ours", "layer", "dense", "floor", "gate")
    ratios = ("dense_over_ours", "floor_over_ours", "over_floor_us", "best_peer_over_ours")
    return {
        **shape.described(),
        **{f"{name}_ms": None for name in names},
        "peers": {peer.name: None for peer in options.peers},
        "error": None,
        "why_no_layer": None,
        "of_bound": None,
        "tiling": None,
        **dict.fromkeys(ratios),
        "best_peer": None,
        "gate_not_compiled": None,
        "experts_hit": None,
        "check": None,
        "spread": {},
        "peer_details": {},
        "clocks": None,
        "copy_gb_per_s": None,
        "seconds": {},
    }


def failed(shape: Shape, options: SpeedOptions, why: str) -> dict[str, Any]:
    """The result of a shape that was not timed."""
    return {**_empty(shape, options), "error": why}


def bench_shape(
    shape: Shape, machine: Machine, options: SpeedOptions, progress: Progress
) -> dict[str, Any]:
    """Times one shape; docs/bench.md names the fields of the result.

    Whatever fails is said in the result.  Raises DeviceLost alone.
    """
    try:
        with torch.no_grad():
            result = _timed(shape, machine, options, Phases(shape.label, progress))
    except FlashmoeError as exc:
        result = failed(shape, options, exc.message)
    except torch.OutOfMemoryError:
        result = failed(shape, options, "the GPU's memory does not hold it")
    except RuntimeError as exc:
        result = failed(shape, options, one_line(exc))
        _settle(machine, result["error"], "")
    return result


def _timed(shape: Shape, machine: Machine, options: SpeedOptions, phase: Phases) -> dict[str, Any]:
    result, config = _empty(shape, options), shape.config
    phase("weights")
    weights = random_weights(config, options.seed, machine.device)
    (x,) = (t.to(machine.device) for t in random_tokens([shape.tokens], config, options.seed))
    machine.settle()
    phase("first launch")
    ours = Ours.build(machine, config, weights, [x])
    try:
        phase("check")
        verdicts = ours.check(config, weights)
        result["check"], result["of_bound"] = verdicts, verdicts["output"]["max_ratio"]
        result["tiling"] = ours.engine.tiling
        phase("gate")
        gate, result["gate_not_compiled"] = _gate(config, weights, x)
        phase("graphs")
        works: dict[str, Prepared] = {
            "ours": ours.prepare(machine),
            "dense": machine.stopwatch.prepare(DensePair(config, shape.rows, machine.device)),
            "gate": machine.stopwatch.prepare(lambda: gate(x)),
        }
        phase("layer")
        layer, result["why_no_layer"] = _layer(machine, config, weights, x)
        if layer is not None:
            works["layer"] = machine.stopwatch.prepare(functools.partial(layer, x))
        case = Case(config, weights, x, gate)
        for peer in options.peers:
            phase(peer.name)
            details, prepared = _prepared(peer, case, machine, options)
            result["peer_details"][peer.name] = details
            if prepared is not None:
                works[f"peer {peer.name}"] = prepared
        phase("timing")
        clocks = Clocks(machine.snapshot)
        times = machine.stopwatch.rounds(list(works.values()), options.pairs, clocks)
        result["clocks"] = clocks.summary()
        _put_times(result, works, times, shape, machine, ours)
        phase("check again")
        wrong = "" if ok(verdicts) else "wrong result"
        again = ours.check_again(machine)
        result["error"] = again or wrong or _layer_again(layer, x, ours) or None
        result["seconds"] = phase.seconds()
        return result
    finally:
        ours.engine.close()


def _gate(config: MoEConfig, weights: MoEWeights, x: torch.Tensor) -> tuple[Gate, str | None]:
    """The peers' gate, and why it could not be compiled, if so: it then runs op by op."""
    gate = gate_of(config, weights)
    fast = compiled(gate)
    try:
        fast(x)
    except Exception as exc:  # no C compiler here, say; ours can be timed without
        return gate, one_line(exc)
    return fast, None


def _layer(
    machine: Machine, config: MoEConfig, weights: MoEWeights, x: torch.Tensor
) -> tuple[TimedLayer | None, str | None]:
    """The layer as a model calls it; or why it cannot be timed here."""
    try:
        return machine.layer(config, weights, len(x)), None
    except FlashmoeError as exc:  # no memory for a second heap, say
        return None, exc.message


def _layer_again(layer: TimedLayer | None, x: torch.Tensor, ours: Ours) -> str:
    """Why the layer's calls are not to be trusted; empty where they are."""
    if layer is None:
        return ""
    try:
        y = layer(x)
        layer.check()
    except FlashmoeError as exc:
        return f"the layer: {exc.message}"
    same = torch.equal(y.view(torch.int16), ours.y.view(torch.int16))
    return "" if same else "the layer's result is not the engine's"


def _prepared(
    peer: Peer, case: Case, machine: Machine, options: SpeedOptions
) -> tuple[dict[str, Any], Prepared | None]:
    """A peer built, warmed up, captured and checked: its details, and the work if it is right."""
    details = no_details()
    try:
        work = peer.build(case, options.peer_options)
        details |= {"version": work.version, "note": work.note, "settings": work.settings}
        prepared = machine.stopwatch.prepare(work.forward, work.why_eager)
        details |= {"graph": prepared.graph, "why_eager": prepared.why_eager}
        check = checked(case, case.weights, prepared.output)
        details |= {"of_bound": check["max_ratio"], "relative_rms": check["relative_rms"]}
        if check["not_finite"] or check["max_ratio"] > PEER_RATIO:
            return details | {"state": "wrong", "reason": _how_wrong(check)}, None
        return details | {"state": "ok"}, prepared
    except Unavailable as exc:
        return details | {"state": "unavailable", "reason": str(exc)}, None
    except Exception as exc:  # somebody else's code may do anything; it must not end the run
        reason = one_line(exc)
        details |= {"reason": reason}
    _settle(machine, f"the peer {peer.name} broke the CUDA context: {reason}", peer.name)
    return details, None


def no_details() -> dict[str, Any]:
    """What is said of a peer of which nothing is known; docs/bench.md names the fields."""
    return {
        "state": "failed", "reason": "", "version": None, "note": "", "settings": {},
        "graph": None, "why_eager": "", "of_bound": None, "relative_rms": None, "apart": None,
    }  # fmt: skip


def _settle(machine: Machine, what: str, during: str) -> None:
    """Waits for the device; raises DeviceLost with ``what`` where it no longer answers."""
    try:
        machine.settle()
    except RuntimeError as exc:
        raise DeviceLost(what, during) from exc


def checked(
    case: Case, weights: MoEWeights, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> dict[str, Any]:
    """The verdict on a peer's (y, ids, weights), on its own ids and weights."""
    y, ids, chosen = output
    return asdict(check_output(y, case.x, weights, case.config, ids, chosen.float()))


def _how_wrong(check: dict[str, Any]) -> str:
    if check["not_finite"]:
        return f"{check['not_finite']} values that are not finite"
    return f"{check['max_ratio']:.3g} times our bound from the reference ({PEER_RATIO:g} allowed)"


def _put_times(
    result: dict[str, Any],
    works: dict[str, Prepared],
    times: list[list[float]],
    shape: Shape,
    machine: Machine,
    ours: Ours,
) -> None:
    """Medians, spreads and ratios of one shape's rounds, into ``result``."""
    for (name, work), ms in zip(works.items(), times, strict=True):
        spread = Spread.of(ms)
        if name.startswith("peer "):
            peer = name.removeprefix("peer ")
            result["peers"][peer] = spread.median
            result["peer_details"][peer] |= _quartiles(spread)
        else:
            result[f"{name}_ms"] = spread.median
            result["spread"][name] = {
                **_quartiles(spread), "graph": work.graph, "why_eager": work.why_eager
            }  # fmt: skip
    hit = int(ours.ids.unique().numel())
    floor = floor_ms(shape.config, hit, machine.copy_bytes_per_s)
    result |= {"experts_hit": hit, "floor_ms": floor}
    result["copy_gb_per_s"] = machine.copy_bytes_per_s / 1e9
    result |= ratios(result)
    dense = result["dense_ms"]
    result["spread"]["dense"]["tflops"] = flop(shape.config, shape.rows) / dense / 1e9


def _quartiles(spread: Spread) -> dict[str, Any]:
    return {"q1_ms": spread.q1, "q3_ms": spread.q3, "rounds": spread.n}


def ratios(result: dict[str, Any]) -> dict[str, Any]:
    """The figures that follow from one shape's medians; above 1 is in our favour.

    A peer that was timed apart is set beside our time of its own process.
    """
    ours, dense, floor = result["ours_ms"], result["dense_ms"], result["floor_ms"]
    ran = {}
    for name, ms in result["peers"].items():
        if ms is not None:
            there = result["peer_details"][name]["apart"]
            ran[name] = ms / (ours if there is None else there["ours_ms"])
    best = min(ran, key=ran.__getitem__, default=None)
    return {
        "dense_over_ours": dense / ours,
        "floor_over_ours": floor / ours,
        "over_floor_us": (ours - floor) * 1e3,
        "best_peer": best,
        "best_peer_over_ours": None if best is None else ran[best],
    }

"""Our kernel against itself, two ways in turn: traced, over virtual ranks, with skewed routing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from flashmoe.bench.machine import Clocks, Machine
from flashmoe.bench.ours import Ours, ok
from flashmoe.bench.phases import Phases, Progress
from flashmoe.bench.shapes import Shape
from flashmoe.bench.statistics import Spread, bootstrap_ratio
from flashmoe.config import MoEConfig, MoEWeights, Routing
from flashmoe.errors import FlashmoeError, one_line
from flashmoe.tokens import random_tokens
from flashmoe.verdict import experts_of_rank
from flashmoe.weights import random_weights


@dataclass(frozen=True)
class PairOptions:
    """``pairs``: rounds that count; ``ranks``: virtual ranks of the run over ranks."""

    pairs: int
    ranks: int = 8
    seed: int = 0


Runner = Callable[[Shape, Machine, PairOptions, Phases], dict[str, Any]]


def bench_pair(
    kind: str, shape: Shape, machine: Machine, options: PairOptions, progress: Progress
) -> dict[str, Any]:
    """Times one shape in the way that ``KINDS`` calls ``kind``; ``error`` says why it could not.

    The result holds ``first_ms`` and ``second_ms`` (medians), their quartiles, ``ratio`` (of the
    medians, second over first; over ranks scaled, see ``scale``) and its 95 % interval.  Over ranks
    it also holds ``copying``: the same of the ranks over one rank that copies its rows as they do.
    """
    phase = Phases(shape.label, progress)
    try:
        with torch.no_grad():
            figures = KINDS[kind](shape, machine, options, phase)
        return {**failed_pair(shape, None), **figures, "seconds": phase.seconds()}
    except FlashmoeError as exc:
        return failed_pair(shape, exc.message)
    except torch.OutOfMemoryError:
        return failed_pair(shape, "the GPU's memory does not hold it")
    except RuntimeError as exc:
        return failed_pair(shape, one_line(exc))


def failed_pair(shape: Shape, why: str | None) -> dict[str, Any]:
    """The result of a shape without any figure."""
    empty = dict.fromkeys(("first_ms", "second_ms", "ratio", "low", "high"))
    return {**shape.described(), **empty, "error": why, "seconds": {}}


def _tracing(shape: Shape, machine: Machine, options: PairOptions, phase: Phases) -> dict[str, Any]:
    """Untraced, then traced.  Rings keep the last records: a full one would cost nothing more."""
    weights, x = _inputs(shape, machine, options, phase)
    first = Ours.build(machine, shape.config, weights, [x])
    second = Ours.build(machine, shape.config, weights, [x], traced=True, ring_mode="keep-last")
    return _in_turn(first, second, shape.config, weights, machine, options, phase)


def _ranks(shape: Shape, machine: Machine, options: PairOptions, phase: Phases) -> dict[str, Any]:
    """One rank on all SMs, then several that share them, with the same tokens in all.

    The one reads its rows where they are, which the several cannot; so one that copies them is
    timed beside both, and what is left of the ratio is not for the copies.
    ``scale`` is what the same work may take longer on the SMs that the ranks use, at the pace of
    the fullest: SMs / SMs used x rows of the fullest rank / mean rows of a rank.
    """
    weights, x = _inputs(shape, machine, options, phase)
    first = Ours.build(machine, shape.config, weights, [x])
    second = Ours.build(machine, shape.config, weights, list(x.tensor_split(options.ranks)))
    copying = Ours.build(machine, shape.config, weights, [x], in_place=False)
    rows = torch.bincount(second.ids.flatten().long(), minlength=shape.config.experts)
    of_rank = [
        int(rows[a:b].sum()) for a, b in experts_of_rank(shape.config.experts, options.ranks)
    ]
    fullest = max(of_rank) * options.ranks / sum(of_rank)
    used = second.engine.sms_per_rank * options.ranks
    scale = first.engine.sms_per_rank / used * fullest
    more = {
        "ranks": options.ranks,
        "sms": first.engine.sms_per_rank,
        "sms_used": used,
        "fullest_over_mean": fullest,
        "scale": scale,
    }
    return more | _in_turn(
        first, second, shape.config, weights, machine, options, phase, scale, copying
    )


def _skew(shape: Shape, machine: Machine, options: PairOptions, phase: Phases) -> dict[str, Any]:
    """Balanced, then one expert that every token chooses; ids from outside, the same rows in all.

    Balanced: token t chooses experts t k to t k + k - 1, modulo E.  Skewed: expert 0, and k - 1 of
    the others in the same way.
    """
    config = dataclasses.replace(shape.config, routing=Routing("external"))
    if config.top_k == config.experts:
        raise FlashmoeError("every token has every expert: nothing can be skewed", exit_code=2)
    weights, x = _inputs(dataclasses.replace(shape, config=config), machine, options, phase)
    balanced, skewed = routed_ids(shape.tokens, config)
    share = torch.full(balanced.shape, 1 / config.top_k, device=machine.device)
    runs = [
        Ours.build(machine, config, weights, [x], ([ids.to(machine.device)], [share]))
        for ids in (balanced, skewed)
    ]
    return _in_turn(runs[0], runs[1], config, weights, machine, options, phase)


KINDS: dict[str, Runner] = {"tracing": _tracing, "ranks": _ranks, "skew": _skew}


def routed_ids(tokens: int, config: MoEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Balanced and skewed expert ids, int32 [T, k] each: see ``_skew``."""
    k, experts = config.top_k, config.experts
    every = torch.arange(tokens * k, dtype=torch.int32).view(tokens, k) % experts
    if k == 1:
        return every, torch.zeros_like(every)
    rest = torch.arange(tokens * (k - 1), dtype=torch.int32).view(tokens, k - 1)
    skewed = torch.cat([rest.new_zeros(tokens, 1), rest % (experts - 1) + 1], dim=1)
    return every, skewed


def _inputs(
    shape: Shape, machine: Machine, options: PairOptions, phase: Phases
) -> tuple[MoEWeights, torch.Tensor]:
    """Weights and tokens on the device; leaves the phase of the first launches begun."""
    phase("weights")
    weights = random_weights(shape.config, options.seed, machine.device)
    (x,) = random_tokens([shape.tokens], shape.config, options.seed)
    x = x.to(machine.device)
    machine.settle()
    phase("first launches")
    return weights, x


def _in_turn(
    first: Ours,
    second: Ours,
    config: MoEConfig,
    weights: MoEWeights,
    machine: Machine,
    options: PairOptions,
    phase: Phases,
    scale: float = 1.0,
    copying: Ours | None = None,
) -> dict[str, Any]:
    """Times and verdicts of two engines, and of ``copying`` beside them.

    Each ``ratio``, of the second's times, and its interval are divided by ``scale``.
    """
    runs = [first, second] if copying is None else [first, second, copying]
    try:
        phase("check")
        verdicts = [run.check(config, weights) for run in runs]
        phase("graphs")
        works = [run.prepare(machine) for run in runs]
        phase("timing")
        clocks = Clocks(machine.snapshot)
        times = machine.stopwatch.rounds(works, options.pairs, clocks)
        phase("check again")
        wrong = None if all(map(ok, verdicts)) else "wrong result"
        error = next(filter(None, (run.check_again(machine) for run in runs)), wrong)
    finally:
        for run in runs:
            run.engine.close()

    def over(base: list[float]) -> dict[str, float]:
        interval = bootstrap_ratio(times[1], base, seed=options.seed)
        return {name: getattr(interval, name) / scale for name in ("ratio", "low", "high")}

    one, other = Spread.of(times[0]), Spread.of(times[1])
    more: dict[str, Any] = {}
    if copying is not None:
        third = Spread.of(times[2])
        more["copying"] = {
            "ms": third.median,
            "quartiles_ms": [third.q1, third.q3],
            **over(times[2]),
        }
    return {
        "first_ms": one.median,
        "second_ms": other.median,
        "first_quartiles_ms": [one.q1, one.q3],
        "second_quartiles_ms": [other.q1, other.q3],
        "pairs": options.pairs,
        **over(times[0]),
        **more,
        "graph": [work.graph for work in works],
        "tiling": second.engine.tiling,
        "of_bound": [v["output"]["max_ratio"] for v in verdicts],
        "clocks": clocks.summary(),
        "error": error,
    }

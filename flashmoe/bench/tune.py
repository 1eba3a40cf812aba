"""Which cut of the tiles is fastest for a layer: candidates in turn, beside the untuned one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flashmoe.bench.machine import Machine
from flashmoe.bench.ours import Ours, ok
from flashmoe.bench.phases import Phases, Progress
from flashmoe.bench.shapes import Shape
from flashmoe.bench.statistics import bootstrap_ratio
from flashmoe.config import MoEConfig
from flashmoe.errors import FlashmoeError
from flashmoe.tokens import random_tokens
from flashmoe.tuning import Tiling
from flashmoe.weights import random_weights

ROWS = (96, 128, 144, 160)
WAVES = (2, 4, 8)


@dataclass(frozen=True)
class TuneOptions:
    """``untuned`` is the cut to beat, ``step`` what a tile's rows are multiples of; ``pairs``:
    rounds that count."""

    untuned: Tiling
    step: int
    pairs: int
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """A cut's medians, ms a shape, over the untuned one's: ``ratio`` is the geometric mean over the
    shapes, ``high`` that of the upper ends of the 95 % intervals."""

    tiling: Tiling
    ratio: float
    high: float
    ms: tuple[float, ...]


def candidates(options: TuneOptions) -> tuple[list[Tiling], list[int]]:
    """Cuts that differ from the untuned one in their rows, and the numbers of waves to try."""
    most = options.untuned
    rows = [r for r in ROWS if r % options.step == 0 and r < most.tile_rows]
    return [Tiling(r, most.waves) for r in rows], [w for w in WAVES if w != most.waves]


def tune_layer(
    config: MoEConfig,
    shapes: Sequence[Shape],
    machine: Machine,
    options: TuneOptions,
    progress: Progress,
) -> dict[str, Any]:
    """Times the candidates on ``shapes``, which are of one layer: first rows, then waves.

    ``chosen`` is the fastest that is surely ahead of the untuned cut, else that one; ``scores``
    says what every one took.  Raises FlashmoeError where a launch fails or a result is wrong.
    """
    untuned = options.untuned
    by_rows, waves = candidates(options)
    scores = _scores([untuned, *by_rows], shapes, machine, options, progress)
    best = choose(scores)
    more = [Tiling(best.tiling.tile_rows, w) for w in waves]
    second = list(dict.fromkeys([untuned, best.tiling, *more]))
    again = _scores(second, shapes, machine, options, progress)
    best = choose(again)
    return {
        "H": config.hidden,
        "I": config.intermediate,
        "dtype": config.dtype,
        "tokens": [shape.tokens for shape in shapes],
        "chosen": {"tile_rows": best.tiling.tile_rows, "waves": best.tiling.waves},
        "ratio": best.ratio,
        "tuned": best.tiling != untuned,
        "scores": [_told(score) for score in (*scores, *again)],
    }


def choose(scores: Sequence[Score]) -> Score:
    """The fastest, where even the upper end of its interval is below 1; else the first, which is
    the untuned one."""
    best = min(scores, key=lambda score: score.ratio)
    return best if best.high < 1 else scores[0]


def _told(score: Score) -> dict[str, Any]:
    cut = {"tile_rows": score.tiling.tile_rows, "waves": score.tiling.waves}
    return {**cut, "ratio": score.ratio, "high": score.high, "ms": list(score.ms)}


def _scores(
    cuts: Sequence[Tiling],
    shapes: Sequence[Shape],
    machine: Machine,
    options: TuneOptions,
    progress: Progress,
) -> list[Score]:
    """All ``cuts``, the untuned one first, in the same rounds of every shape."""
    with torch.no_grad():
        times = [_times(cuts, shape, machine, options, progress) for shape in shapes]
    return [
        score(cut, [of_shape[i] for of_shape in times], [of_shape[0] for of_shape in times])
        for i, cut in enumerate(cuts)
    ]


def score(
    cut: Tiling, times: Sequence[Sequence[float]], untuned: Sequence[Sequence[float]]
) -> Score:
    """A cut's score from its times and the untuned one's, ms [shape][round] each."""
    found = [bootstrap_ratio(a, b) for a, b in zip(times, untuned, strict=True)]
    return Score(
        cut,
        statistics.geometric_mean(interval.ratio for interval in found),
        statistics.geometric_mean(interval.high for interval in found),
        tuple(statistics.median(ms) for ms in times),
    )


def _times(
    cuts: Sequence[Tiling],
    shape: Shape,
    machine: Machine,
    options: TuneOptions,
    progress: Progress,
) -> list[list[float]]:
    phase, config = Phases(shape.label, progress), shape.config
    phase("weights")
    weights = random_weights(config, options.seed, machine.device)
    (x,) = (t.to(machine.device) for t in random_tokens([shape.tokens], config, options.seed))
    runs: list[Ours] = []
    try:
        for cut in cuts:
            phase(f"{cut.tile_rows} rows, {cut.waves} waves")
            run = Ours.build(machine, config, weights, [x], tiling=cut)
            runs.append(run)
            if not ok(run.check(config, weights)):
                raise FlashmoeError(
                    f"{shape.label}: wrong result with {cut}", "please report it: it is a bug"
                )
        works = [run.prepare(machine) for run in runs]
        phase("timing")
        times = machine.stopwatch.rounds(works, options.pairs)
        phase("check again")
        for run in runs:
            if why := run.check_again(machine):
                raise FlashmoeError(f"{shape.label}: {why}", "flashmoe run tells more")
        return times
    finally:
        for run in runs:
            run.engine.close()

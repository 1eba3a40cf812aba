"""The kernel's time beside two plain cuBLAS GEMMs of the same FLOPs, in one run.

    python benchmarks/dense.py [--preset mixtral] [--tokens 4096] [--ranks 1] [--pairs 30]

Both are timed by device events, in turn, with L2 flushed before each; the medians, the quartiles
and the ratio of the medians are printed.  The dense pair multiplies [T k, H] by [H, 2I or I] and
[T k, I] by [I, H], which are the expert layers' FLOPs without routing, padding or moving a row.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch

from flashmoe.presets import PRESETS
from flashmoe.tokens import random_tokens
from flashmoe.weights import random_weights
from flashmoe.world.base import EngineOptions, Status
from flashmoe.world.local import LocalEngine

FLUSH_BYTES = 256 << 20


def timed(work: Callable[[], Any], flush: torch.Tensor) -> float:
    """Milliseconds of one call by device events, after writing more than L2 holds."""
    flush.zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def spread(times: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4)
    return {"median_ms": median, "q1_ms": low, "q3_ms": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mixtral")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=30)
    args = parser.parse_args()
    config = PRESETS[args.preset].config
    weights = random_weights(config, 0, "cuda")
    parts = [p.cuda() for p in random_tokens([args.tokens] * args.ranks, config, 0)]
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    rows = args.tokens * args.ranks * config.top_k
    x = torch.randn(rows, config.hidden, device="cuda", dtype=weights.up.dtype)
    up = torch.randn(config.up_rows, config.hidden, device="cuda", dtype=x.dtype)
    h = torch.randn(rows, config.intermediate, device="cuda", dtype=x.dtype)
    down = torch.randn(config.hidden, config.intermediate, device="cuda", dtype=x.dtype)
    engines = {}
    for traced in (False, True):
        options = EngineOptions(ranks=args.ranks, traced=traced, deadline_s=10.0)
        engine = LocalEngine(config, weights, [args.tokens] * args.ranks, options)
        engine.load(parts)
        assert engine.launch().status is Status.OK
        engines[traced] = engine

    def dense() -> None:
        torch.mm(x, up.t())
        torch.mm(h, down.t())

    times: dict[str, list[float]] = {"ours": [], "traced": [], "dense": []}
    for _ in range(args.pairs + 3):
        times["dense"].append(timed(dense, flush))
        times["ours"].append(timed(engines[False].enqueue, flush))
        times["traced"].append(timed(engines[True].enqueue, flush))
    result: dict[str, Any] = {name: spread(values[3:]) for name, values in times.items()}
    dense_ms = result["dense"]["median_ms"]
    result["dense_over_ours"] = dense_ms / result["ours"]["median_ms"]
    result["traced_over_untraced"] = result["traced"]["median_ms"] / result["ours"]["median_ms"]
    flops = 2 * rows * config.hidden * (config.up_rows + config.intermediate)
    result["dense_tflops"] = flops / dense_ms / 1e9
    about = {"preset": args.preset, "T": args.tokens, "ranks": args.ranks, "pairs": args.pairs}
    print(json.dumps({**about, "device": torch.cuda.get_device_name(), **result}))


if __name__ == "__main__":
    main()

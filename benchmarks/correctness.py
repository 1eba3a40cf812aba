"""The kernel against the float32 reference over presets, ranks and sizes: a table with ok.

    python benchmarks/correctness.py [--presets mixtral,paper] [--tokens 64,4096] [--json FILE]

For each preset and T (tokens per rank) and W = 1, 2, 4, 8 virtual ranks: the largest error as a
share of its bound (docs/numbers.md), the routing's verdict, and the launch's time.  Where a shape
does not fit the GPU's memory the table says how many bytes it needs.  Then, for the same global
batch of 4,096 tokens, whether the bits agree over W and over three runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from flashmoe.config import MoEConfig, MoEWeights
from flashmoe.errors import FlashmoeError
from flashmoe.numerics import check_output, check_routing
from flashmoe.presets import PRESETS
from flashmoe.tokens import random_tokens
from flashmoe.weights import random_weights
from flashmoe.world.base import EngineOptions, Status
from flashmoe.world.local import LocalEngine

PRESET_NAMES = ("mixtral", "qwen3-30b", "olmoe", "deepseek-v3", "paper")
WORLDS = (1, 2, 4, 8)
GLOBAL_BATCH = 4096
RUNS = 3


def launched(
    config: MoEConfig, weights: MoEWeights, parts: list[torch.Tensor], runs: int
) -> dict[str, Any]:
    """Runs the parts as ranks: status, best time in ms; y, ids and weights joined over ranks."""
    options = EngineOptions(ranks=len(parts), deadline_s=10.0)
    engine = LocalEngine(config, weights, [len(p) for p in parts], options)
    try:
        engine.load(parts)
        bits, times = set(), []
        for _ in range(runs):
            launch = engine.launch()
            if launch.status is not Status.OK:
                return {"status": launch.status.name}
            times.append(launch.elapsed_ms)
            outputs = engine.outputs()
            y = torch.cat([o.y for o in outputs])
            bits.add(hash(y.view(torch.int16).numpy().tobytes()))
        ids = torch.cat([o.ids for o in outputs])
        routing = torch.cat([o.weights for o in outputs])
        return {
            "status": "OK",
            "ms": min(times),
            "y": y.cuda(),
            "ids": ids.cuda(),
            "weights": routing.cuda(),
            "bits": bits,
        }
    finally:
        engine.close()


def one(config: MoEConfig, weights: MoEWeights, tokens: int, ranks: int) -> dict[str, Any]:
    """One line of the table."""
    parts = [p.cuda() for p in random_tokens([tokens] * ranks, config, 1)]
    try:
        got = launched(config, weights, parts, 2)
    except FlashmoeError as exc:
        return {"verdict": exc.message}
    if got["status"] != "OK":
        return {"verdict": got["status"]}
    x = torch.cat(parts)
    output = check_output(got["y"], x, weights, config, got["ids"], got["weights"])
    routing = check_routing(x, weights, config, got["ids"], got["weights"])
    return {
        "verdict": "ok" if output.ok and routing.ok and len(got["bits"]) == 1 else "WRONG",
        "of_bound": float(output.max_ratio),
        "max_abs": float(output.max_abs),
        "near_ties": routing.near_ties,
        "wrong_routes": routing.wrong,
        "ms": got["ms"],
    }


def same_bits(config: MoEConfig, weights: MoEWeights) -> bool:
    """Whether W = 1, 2, 4, 8 and three runs of each give one result for the same global batch."""
    (x,) = random_tokens([GLOBAL_BATCH], config, 2)
    seen = set()
    for ranks in WORLDS:
        parts = [p.cuda() for p in x.chunk(ranks)]
        seen |= launched(config, weights, parts, RUNS)["bits"]
    return len(seen) == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", default=",".join(PRESET_NAMES))
    parser.add_argument("--tokens", default="64,4096")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    lines: list[dict[str, Any]] = []
    print(f"{'preset':<12} {'T':>6} {'W':>2}  {'verdict':<8} {'of bound':>8} {'ties':>6} {'ms':>8}")
    for name in args.presets.split(","):
        config = PRESETS[name].config
        weights = random_weights(config, 0, "cuda")
        for tokens in map(int, args.tokens.split(",")):
            for ranks in WORLDS:
                line = one(config, weights, tokens, ranks)
                lines.append({"preset": name, "T": tokens, "W": ranks, **line})
                print(
                    f"{name:<12} {tokens:>6} {ranks:>2}  {line['verdict']:<8} "
                    f"{line.get('of_bound', float('nan')):>8.3f} {line.get('near_ties', 0):>6} "
                    f"{line.get('ms', float('nan')):>8.3f}",
                    flush=True,
                )
                torch.cuda.empty_cache()
        bits = same_bits(config, weights)
        lines.append({"preset": name, "T": GLOBAL_BATCH, "same_bits": bits})
        words = "the same bits" if bits else "DIFFERENT BITS"
        print(f"{name:<12} {GLOBAL_BATCH:>6} over W = 1, 2, 4, 8, {RUNS} runs each: {words}")
        del weights
        torch.cuda.empty_cache()
    if args.json:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        args.json.write_text(
            json.dumps(
                {"command": [Path(word).name for word in sys.argv], **about, "results": lines},
                indent=1,
            )
        )
    good = all(
        line.get("verdict", "ok") != "WRONG" and line.get("same_bits", True) for line in lines
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

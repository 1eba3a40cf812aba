"""What ranks as processes cost: to start, and in the time of a launch.

    python benchmarks/processes.py [--ranks 4] [--starts 5] [--pairs 240] [--json FILE]

Start: seconds from starting the command line, with so many ranks on one GPU, until all ranks have
reached their first launch, and until that has ended on all of them (the first kernel runs between
the two, and the second is held to the bar).  The first start, which reads from disk, is dropped.

Launch: one rank by the ``ipc`` world against the ``local`` world with the same weights and tokens,
both in this process: an engine of either kind, captured in a CUDA graph, takes its turn in every
round, L2 flushed before each.  The interval is of the ratio of medians, by whole rounds.
Exit code 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed import HashStore

from flashmoe.bench.machine import gpu_machine
from flashmoe.bench.statistics import Spread, bootstrap_ratio
from flashmoe.bench.stopwatch import METHOD
from flashmoe.presets import PRESETS
from flashmoe.tokens import random_tokens
from flashmoe.weights import random_weights
from flashmoe.world.base import EngineOptions, Status
from flashmoe.world.board import Board
from flashmoe.world.ipc import pe_engine
from flashmoe.world.local import LocalEngine
from flashmoe.world.peers import Peers
from flashmoe.world.rendezvous import Job, Place

START_BAR_S = 6.0
RATIO_BAR = 1.02
WORKS = (("qwen3-30b", 512), ("qwen3-30b", 4096), ("mixtral", 4096))


def start_once(ranks: int) -> tuple[float, float]:
    """Seconds to all ranks' first launch, and to its end; as the command line's own lines tell."""
    command = [sys.executable, "-P", "-m", "flashmoe_cli", "run", "qwen3-30b", "-T", "64"]
    where = f"--gpus 1 --ranks-per-gpu {ranks} --transport ipc"
    command += [*where.split(), "--no-check", "-n", "1"]
    began = time.monotonic()
    seen: dict[str, float] = {}
    said = []
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            seen.setdefault(line.strip(), time.monotonic() - began)
    if process.returncode != 0 or "running" not in seen:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(said)}")
    return seen["warm-up"], seen["running"]


def starts(ranks: int, count: int) -> dict[str, Any]:
    """``count`` starts after one that is dropped."""
    times = [start_once(ranks) for _ in range(count + 1)][1:]
    first, ended = ([pair[i] for pair in times] for i in (0, 1))
    return {
        "ranks": ranks,
        "first_launch_s": first,
        "first_launch_ended_s": ended,
        "median_s": statistics.median(ended),
        "bar_s": START_BAR_S,
        "ok": statistics.median(ended) <= START_BAR_S,
    }


def pairs(preset: str, tokens: int, count: int) -> dict[str, Any]:
    """One rank by each world in turn."""
    config = PRESETS[preset].config
    machine = gpu_machine(0)
    weights = random_weights(config, 0, "cuda")
    x = random_tokens([tokens], config, 0)
    options = EngineOptions(ranks=1, deadline_s=10.0)
    job = Job(Place(0, 1, 0, 1, 1, "flashmoe", "", 0), HashStore())
    process = pe_engine(config, weights, [tokens], options, Peers(job, Board.make(1)))
    local = LocalEngine(config, weights, [tokens], options)
    outputs = []
    for engine in (process, local):
        engine.load(x)
        assert engine.launch().status is Status.OK
        outputs.append(engine.outputs()[0].y.view(torch.int16))
    assert torch.equal(*outputs), "the two worlds differ in a bit"
    works = [machine.stopwatch.prepare(engine.enqueue) for engine in (process, local)]
    by_process, by_local = machine.stopwatch.rounds(works, count)
    for engine in (process, local):  # an abort is sticky: this one would show it
        assert engine.launch().status is Status.OK
    interval = bootstrap_ratio(by_process, by_local)
    result = {
        "preset": preset,
        "T": tokens,
        "graph": [work.graph for work in works],
        "process_ms": vars(Spread.of(by_process)),
        "local_ms": vars(Spread.of(by_local)),
        "ratio": interval.ratio,
        "low": interval.low,
        "high": interval.high,
        "pairs": interval.pairs,
        "bar": RATIO_BAR,
        "ok": interval.high <= RATIO_BAR,
        "environment": machine.environment,
    }
    del works
    process.close()
    local.close()
    torch.cuda.empty_cache()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--starts", type=int, default=5, help="0: none")
    parser.add_argument("--pairs", type=int, default=240, help="0: none")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    said: dict[str, Any] = {"command": sys.argv, "method": METHOD, "start": None, "launch": []}
    if args.starts:  # before this process has a context of its own
        said["start"] = found = starts(args.ranks, args.starts)
        print(
            f"start, {args.ranks} ranks: first launch ended after {found['median_s']:.2f} s "
            f"(median of {args.starts}; all at it after "
            f"{statistics.median(found['first_launch_s']):.2f} s), bar {START_BAR_S:g} s: "
            f"{'ok' if found['ok'] else 'MISSED'}",
            flush=True,
        )
    for preset, tokens in WORKS if args.pairs else ():
        found = pairs(preset, tokens, args.pairs)
        said["launch"].append(found)
        print(
            f"{preset} T {tokens}: process {found['process_ms']['median']:.4f} ms, local "
            f"{found['local_ms']['median']:.4f} ms, ratio {found['ratio']:.4f} "
            f"({found['low']:.4f} to {found['high']:.4f}), bar {RATIO_BAR:g}: "
            f"{'ok' if found['ok'] else 'MISSED'}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(said, indent=1))
    missed = [part for part in (said["start"], *said["launch"]) if part and not part["ok"]]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

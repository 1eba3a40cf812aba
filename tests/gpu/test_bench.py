"""The bench on a GPU: times that can be, graphs that replay, peers that compute the layer."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import flashmoe
from flashmoe.bench.machine import gpu_machine
from flashmoe.bench.pairs import KINDS, PairOptions, bench_pair
from flashmoe.bench.peers import PEERS, wheel
from flashmoe.bench.shapes import Shape
from flashmoe.bench.speed import SpeedOptions, bench_shape
from flashmoe.bench.stopwatch import CudaStopwatch
from flashmoe.presets import PRESETS

TINY = Shape("tiny", PRESETS["tiny"].config, 64)


def quiet(phase: str, done: int, total: int) -> None:
    """Progress that nobody sees."""


class Doubles:
    """A work that nobody but its graph needs: y = 2 x, both its own."""

    def __init__(self) -> None:
        self.x = torch.ones(1 << 24, device="cuda")
        self.y = torch.empty_like(self.x)

    def __call__(self) -> None:
        torch.mul(self.x, 2, out=self.y)


def test_what_a_graph_works_on_lives_as_long_as_it() -> None:
    work = Doubles()
    seen = weakref.ref(work)
    prepared = CudaStopwatch(torch.device("cuda", 0)).prepare(work)
    del work
    gc.collect()
    torch.cuda.empty_cache()
    kept = seen()
    assert prepared.graph and kept is not None
    kept.y.zero_()
    prepared.run()
    assert (kept.y == 2).all()


def test_a_cut_that_was_tuned_is_what_later_runs_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashmoe import tuning
    from flashmoe.bench.tune import TuneOptions, tune_layer
    from flashmoe.session import Request, run
    from flashmoe.world.kernel import ARCH, untuned

    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "tuning.json"))
    found = tune_layer(
        TINY.config,
        [TINY],
        gpu_machine(0),
        TuneOptions(untuned(TINY.config, TINY.tokens), 16, 3),
        quiet,
    )
    assert len(found["scores"]) >= 5 + 3
    cut = {"tile_rows": 32, "waves": 2}  # whatever was chosen: one that is told from the untuned
    tuning.put({**tuning.key_of(TINY.config, ARCH), **cut, "measured": {}})
    out = tmp_path / "a.fmoe"
    config = PRESETS["tiny"].config
    request = Request("tiny", "tiny", config, (200, 200), 2, "local", traced=True, out=out)
    result = run(request, quiet)
    assert result.exit_code == 0
    meta = json.loads((out / "run.json").read_text())["world"]["tiling"]
    assert (meta["tile_rows"], meta["waves"], len(meta["tuned"])) == (32, 2, 64)
    from flashmoe.trace.rundir import open_run

    assert max(open_run(out).plan["height"].to_pylist()) == 32


def test_bench_tiny_from_the_command_line(tmp_path: Path) -> None:
    place = str(Path(flashmoe.__file__).parents[1])
    script = (
        f"import sys; sys.path.insert(0, {place!r}); from flashmoe_cli.main import main; main()"
    )
    args = ["bench", "tiny", "-n", "3", "--json", "-o", str(tmp_path / "a.json")]
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "a.json").read_text())
    (result,) = report["results"]
    assert result["error"] is None
    assert result["copy_gb_per_s"] > 500
    assert result["of_bound"] <= 1
    assert set(result["seconds"]) >= {"start", "weights", "check", "timing", "whole"}
    assert 0 < result["floor_ms"] < result["ours_ms"] < 5
    assert 0 < result["dense_ms"] < 5
    assert result["spread"]["ours"]["graph"], result["spread"]["ours"]["why_eager"]
    for name in ("grouped-mm", "grouped-mm-compiled"):
        details = result["peer_details"][name]
        assert details["state"] == "ok", details
        assert result["peers"][name] > 0
    assert set(result["peers"]) == set(PEERS)
    assert result["best_peer"] in result["peers"]


@pytest.mark.parametrize("preset", ["qwen3-30b", "paper"])
def test_peers_are_right_where_they_run(preset: str) -> None:
    shape = Shape(preset, PRESETS[preset].config, 96)
    options = SpeedOptions(2, tuple(PEERS.values()))
    result = bench_shape(shape, gpu_machine(0), options, quiet)
    assert result["error"] is None
    needed = {"grouped-mm", "grouped-mm-compiled"}
    if os.environ.get(wheel.VARIABLE):
        needed |= {"vllm-triton", "vllm-triton-tuned"}
    for name, details in result["peer_details"].items():
        states = ("ok",) if name in needed else ("ok", "unavailable")
        assert details["state"] in states, (name, details)
    assert result["layer_ms"] > 0, result["why_no_layer"]
    assert result["spread"]["layer"]["graph"], result["spread"]["layer"]["why_eager"]


def test_nothing_of_use_is_in_l2_before_a_work() -> None:
    # 32 MB fit any Hopper GPU's L2, from which a sum takes half the time that it takes from memory.
    watch = CudaStopwatch(torch.device("cuda", 0))
    x = torch.ones(1 << 23, device="cuda")
    work = watch.prepare(lambda: x.sum())
    (cold,) = watch.rounds([work], 31)
    warm = []
    for _ in range(31):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        work.run()
        torch.cuda._sleep(1 << 20)  # half a millisecond: all that follows is enqueued meanwhile
        begin.record()
        work.run()
        end.record()
        end.synchronize()
        warm.append(begin.elapsed_time(end))
    assert statistics.median(cold) > 1.2 * statistics.median(warm)


def test_sorting_rows_on_the_gpu() -> None:
    pytest.importorskip("triton")
    from flashmoe.bench.peers.align import Aligner

    for tokens, k, experts, block in [(8, 8, 128, 16), (4096, 8, 128, 64), (8192, 2, 8, 128)]:
        generator = torch.Generator(device="cuda").manual_seed(tokens)
        scores = torch.rand(tokens, experts, generator=generator, device="cuda")
        ids = scores.topk(k).indices.to(torch.int32)
        aligner = Aligner(tokens * k, experts, block, ids.device)
        for _ in range(2):
            out = aligner(ids)
            counts = torch.bincount(ids.flatten(), minlength=experts)
            total = int(((counts + block - 1) // block * block).sum())
            assert int(out.total) == total
            used = out.sorted_rows[:total].long()
            real = used < tokens * k
            assert torch.equal(used[real].sort().values, torch.arange(tokens * k, device="cuda"))
            of_block = out.expert_of[torch.arange(total, device="cuda") // block]
            assert torch.equal(ids.flatten()[used[real]], of_block[real])


def test_what_no_graph_holds_runs_eagerly_and_says_why() -> None:
    watch = CudaStopwatch(torch.device("cuda", 0))
    x = torch.ones(8, device="cuda")
    held = watch.prepare(lambda: x.add_(1))
    asks = watch.prepare(lambda: x.sum().item())
    assert held.graph
    assert not asks.graph
    assert "cannot be captured" in asks.why_eager
    times = watch.rounds([held, asks], 4)
    assert [len(t) for t in times] == [4, 4]
    assert min(map(min, times)) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_our_kernel_against_itself(kind: str) -> None:
    result = bench_pair(kind, TINY, gpu_machine(0), PairOptions(3, ranks=2), quiet)
    assert result["error"] is None
    assert result["graph"] == [True] * (3 if kind == "ranks" else 2)
    assert result["low"] <= result["ratio"] <= result["high"]

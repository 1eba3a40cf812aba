"""A whole bench: a process a shape, what it costs when one dies, and going on with a report."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import flashmoe
from flashmoe.bench.apart import Lost, apart
from flashmoe.bench.pairs import PairOptions
from flashmoe.bench.phases import Progress
from flashmoe.bench.report import Bench, any_failed, run_bench
from flashmoe.bench.resume import check_same, take_over
from flashmoe.bench.shapes import Shape
from flashmoe.bench.speed import SpeedOptions
from flashmoe.errors import FlashmoeError
from flashmoe.presets import PRESETS

from .conftest import ROOT
from .fakes import dying_gpu, opened, peers, quiet, spoilt_gpu

TINY = PRESETS["tiny"].config


def shapes(*tokens: int) -> tuple[Shape, ...]:
    return tuple(Shape("tiny", TINY, t) for t in tokens)


def bench(*tokens: int, names: tuple[str, ...] = (), pairs: int = 1) -> Bench:
    return Bench("speed", shapes(*tokens), SpeedOptions(pairs, peers(*names)))


def test_a_report_says_how_and_where() -> None:
    saved: list[Any] = []
    told: list[str] = []
    whole = Bench("speed", shapes(24, 8), SpeedOptions(2, peers("good")), ("flashmoe", "a b"))
    report = run_bench(
        whole,
        opened,
        lambda phase, done, total: told.append(phase),
        lambda report: saved.append(json.loads(json.dumps(report, allow_nan=False))),
    )
    assert (report["schema"], report["verb"], report["mode"]) == (1, "bench", "speed")
    assert report["command"] == "flashmoe 'a b'"
    assert report["environment"]["torch"] == torch.__version__
    assert report["method"]["rounds"] == 2
    assert report["method"]["peers"] == ["good"]
    assert "L2" in report["method"]["times"]
    assert [r["T"] for r in report["results"]] == [24, 8]
    assert [len(s["results"]) for s in saved] == [1, 2]
    assert saved[-1] == json.loads(json.dumps(report))
    assert not any_failed(report)
    for name in ("preset", "T", "ours_ms", "dense_ms", "floor_ms", "peers", "error", "time"):
        assert all(name in result for result in report["results"])
    assert "tiny 24: good" in told


def test_seconds_add_up_to_no_more_than_the_whole() -> None:
    (result,) = run_bench(bench(8, names=("good",)), opened, quiet)["results"]
    seconds = result["seconds"]
    whole = seconds.pop("whole")
    assert list(seconds)[:2] == ["start", "weights"]
    assert 0 < sum(seconds.values()) <= whole


def test_each_shape_has_a_process_of_its_own() -> None:
    pids = {apart(_pid, quiet) for _ in range(2)}
    assert len(pids) == 2
    assert os.getpid() not in pids


def _pid(progress: Progress) -> int:
    return os.getpid()


@pytest.mark.parametrize("mode", ["speed", "tracing"])
def test_a_shape_that_kills_its_process_costs_itself(mode: str) -> None:
    options = SpeedOptions(1) if mode == "speed" else PairOptions(1)
    report = run_bench(Bench(mode, shapes(8, 13, 16), options), dying_gpu, quiet)
    errors = [result["error"] for result in report["results"]]
    launch = "first launch" if mode == "speed" else "first launches"
    assert errors == [None, f"its process was ended by SIGSEGV during {launch}", None]
    assert report["results"][1]["T"] == 13
    assert any_failed(report)


def test_a_peer_that_always_breaks_the_context_costs_nobody_else() -> None:
    report = run_bench(bench(8, 16, names=("breaks-the-context", "good")), opened, quiet)
    for result in report["results"]:
        assert result["error"] is None
        assert list(result["peers"]) == ["breaks-the-context", "good"]
        assert result["peers"]["breaks-the-context"] is None
        details = result["peer_details"]["breaks-the-context"]
        assert details["state"] == "failed"
        assert details["reason"] == (
            "the peer breaks-the-context broke the CUDA context: ValueError: shapes do not fit"
        )
        assert result["best_peer"] == "good"
        assert "whole" in result["seconds"]


def test_a_peer_that_bears_no_other_is_timed_by_itself() -> None:
    report = run_bench(bench(8, names=("good", "bears-no-other")), opened, quiet)
    (result,) = report["results"]
    assert result["error"] is None
    assert list(result["peers"]) == ["good", "bears-no-other"]
    details = result["peer_details"]["bears-no-other"]
    assert details["state"] == "ok"
    there = details["apart"]
    assert there["why"] == "its process was ended by SIGSEGV during bears-no-other"
    assert there["dense_ms"] > 0
    assert result["peer_details"]["good"]["apart"] is None
    ratios = {
        "good": result["peers"]["good"] / result["ours_ms"],
        "bears-no-other": result["peers"]["bears-no-other"] / there["ours_ms"],
    }
    assert result["best_peer"] == min(ratios, key=ratios.__getitem__)
    assert result["best_peer_over_ours"] == pytest.approx(min(ratios.values()))
    json.dumps(report, allow_nan=False)


def test_a_peer_is_not_timed_apart_where_ours_is_wrong() -> None:
    report = run_bench(
        bench(8, names=("good", "breaks-the-context")), functools.partial(spoilt_gpu, 0), quiet
    )
    (result,) = report["results"]
    assert result["error"] == "wrong result"
    assert result["peers"]["breaks-the-context"] is None
    assert result["peer_details"]["breaks-the-context"]["state"] == "failed"


def test_a_process_that_says_nothing_is_ended() -> None:
    said_s: list[float] = []

    def note(phase: str, done: int, total: int) -> None:
        said_s.append(time.monotonic())

    with pytest.raises(Lost, match="said nothing for 4 s during hanging"):
        apart(_hang, note, patience_s=4)  # time to start in, where the machine is busy
    assert time.monotonic() - said_s[-1] < 10


def _hang(progress: Progress) -> None:
    progress("tiny 8: hanging", 0, 0)
    time.sleep(60)


def test_what_is_interrupted_leaves_no_process() -> None:
    told: list[int] = []

    def interrupt(phase: str, done: int, total: int) -> None:
        told.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apart(_tell_pid_and_hang, interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(told[0], 0)


def _tell_pid_and_hang(progress: Progress) -> None:
    progress("hanging", os.getpid(), 0)
    time.sleep(60)


def test_what_cannot_be_opened_is_said_as_ever() -> None:
    with pytest.raises(FlashmoeError, match="no driver") as caught:
        run_bench(bench(8), _no_gpu, quiet)
    assert (caught.value.hint, caught.value.exit_code) == ("install one", 5)


def _no_gpu() -> Any:
    raise FlashmoeError("no driver", "install one", 5)


def test_a_bug_is_an_error_whose_traceback_is_seen_and_stdout_is_the_results() -> None:
    # A process of its own, since the server keeps the stderr that it was born with.
    place = str(Path(flashmoe.__file__).parents[1])
    script = f"""
import sys
sys.path.insert(0, {place!r})
sys.path.append({ROOT!r})
from {__package__}.test_report import bug_of_a_noisy_process, quiet
from flashmoe.bench.apart import Lost, apart
if __name__ == "__main__":
    try:
        apart(bug_of_a_noisy_process, quiet)
    except Lost as exc:
        print(exc)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "its process ended with exit code 1 during starting\n", done.stderr
    assert "printed by somebody" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def bug_of_a_noisy_process(progress: Progress) -> float:
    print("printed by somebody", flush=True)
    return 1 / 0


# -- going on with a report ---------------------------------------------------------------------


def earlier(*results: tuple[int, str | None]) -> list[dict[str, Any]]:
    return [{**Shape("tiny", TINY, t).described(), "error": error} for t, error in results]


def test_what_is_kept_and_what_is_run() -> None:
    results = earlier((8, None), (16, "wrong result"), (64, None))
    kept, todo = take_over(results, shapes(8, 16, 32))
    assert kept == results
    assert [shape.tokens for shape in todo] == [16, 32]


def test_a_shape_that_failed_is_run_again_in_its_place() -> None:
    whole = bench(8, 13, 16)
    first = json.loads(json.dumps(run_bench(whole, dying_gpu, quiet)))
    before = json.loads(json.dumps(first))
    saved: list[int] = []
    after = run_bench(
        whole, opened, quiet, lambda report: saved.append(len(report["results"])), before
    )
    after = json.loads(json.dumps(after))
    assert [(r["T"], r["error"]) for r in after["results"]] == [(8, None), (13, None), (16, None)]
    assert after["results"][0] == first["results"][0]
    assert after["results"][2] == first["results"][2]
    assert saved == [3]  # one shape was run


@pytest.mark.parametrize(
    ("part", "name", "then"),
    [
        ("environment", "gpu", "NVIDIA H100"),
        ("environment", "commit", "abc"),
        ("environment", "torch", "2.10"),
        ("environment", "driver", "580.1"),
        ("method", "rounds", 50),
        ("method", "peers", ["liger"]),
        ("method", "seed", 1),
    ],
)
def test_another_environment_or_method_is_refused(part: str, name: str, then: Any) -> None:
    now = {"environment": {"gpu": "none", "commit": "x"}, "method": bench(8).method()}
    was = json.loads(json.dumps(now))
    check_same(now, was)
    was[part][name] = then
    with pytest.raises(FlashmoeError, match=f"{name} .* then, .* now") as caught:
        check_same(now, was)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("commit", "same"), [("abc", True), ("abc+dirty", False), ("unknown", False)]
)
def test_other_kernels_are_refused_where_the_commit_does_not_tell_them(
    commit: str, same: bool
) -> None:
    def report(digest: str) -> dict[str, Any]:
        kernels = {"moe_p2p_sm90a.cubin": digest}
        return {"environment": {"commit": commit, "kernels": kernels}, "method": {}}

    if same:
        check_same(report("a"), report("b"))
        return
    with pytest.raises(FlashmoeError, match=r"kernels .* then, .* now"):
        check_same(report("a"), report("b"))

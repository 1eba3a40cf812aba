"""The tables, and the command around them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashmoe.bench.machine import Machine
from flashmoe.bench.pairs import PairOptions
from flashmoe.bench.report import Bench, run_bench
from flashmoe.bench.shapes import Shape
from flashmoe.bench.speed import SpeedOptions
from flashmoe.errors import FlashmoeError
from flashmoe.presets import PRESETS
from flashmoe_cli import benching
from flashmoe_cli.output import Terminal
from flashmoe_cli.render.bench import bench_lines

from .fakes import dying_gpu, opened, opened_gpu, quiet, spoilt_gpu

WIDE = Terminal(100, False, True)


def result(preset: str, tokens: int, **more: Any) -> dict[str, Any]:
    """One shape's result with made-up round figures."""
    quartiles = {"q1_ms": 0.99, "q3_ms": 1.01, "rounds": 50, "graph": True, "why_eager": ""}
    ok = {"state": "ok", "graph": True, "reason": ""}
    missing = {"state": "unavailable", "graph": None, "reason": "not installed"}
    return {
        "preset": preset, "T": tokens,
        "ours_ms": 1.0, "layer_ms": 1.002, "dense_ms": 0.9, "floor_ms": 0.25, "gate_ms": 0.05,
        "of_bound": 0.4,
        "peers": {"grouped-mm": 2.5, "vllm-triton": 1.5, "liger": None},
        "peer_details": {
            "grouped-mm": {**ok, "graph": False}, "liger": missing,
            "vllm-triton": ok | {"apart": {"why": "", "ours_ms": 1.0, "dense_ms": 0.9}},
        },
        "best_peer": "vllm-triton", "best_peer_over_ours": 1.5,
        "dense_over_ours": 0.9, "floor_over_ours": 0.25, "over_floor_us": 750.0,
        "spread": {"ours": quartiles},
        "clocks": {
            "sm_clock_mhz": 1755, "memory_clock_mhz": 3201, "power_w": 690.0,
            "temperature_c": 61, "throttle": ["software power cap"],
        },
        "gate_not_compiled": None, "error": None, "copy_gb_per_s": 4300.0,
        "seconds": {"start": 2.0, "check": tokens / 64, "whole": 12.5}, **more,
    }  # fmt: skip


def report(*results: dict[str, Any], mode: str = "speed", **more: Any) -> dict[str, Any]:
    return {
        "mode": mode,
        "environment": {
            "gpu": "NVIDIA H200", "driver": "580.1", "torch": "2.11", "triton": "3.6.0",
            "commit": "abc",
        },
        "method": {"rounds": 50},
        "results": list(results),
        **more,
    }  # fmt: skip


EXPECTED = """\
NVIDIA H200, driver 580.1, torch 2.11, triton 3.6.0, flashmoe abc
median of 50 rounds in turn, L2 flushed before each; copies at 4300 GB/s

ms, our gate included
  shape      T   ours  spread  layer  dense  floor   gate  best peer  which
  mixtral   64  1.000    2.0%  1.002  0.900  0.250  0.050      1.500  vllm-triton
  paper    128      -       -      -      -      -      -          -  -

above 1 is in our favour
  shape      T  dense/ours  floor/ours  peer/ours  over floor  of bound
  mixtral   64       0.900       0.250      1.500    750.0 us     0.400
  paper    128           -           -          -           -         -

peers, ms (e: eager, no graph; a: in a process of its own)
  shape      T  grouped-mm  vllm-triton
  mixtral   64     2.500 e      1.500 a
  paper    128      failed       failed

  liger: unavailable: not installed (mixtral 64)

clocks while timing: SM 1755 to 1755 MHz, up to 690 W, 61 C, held down by software power cap

  FAILED paper 128: our launch ended with HANG"""


def test_the_tables_of_speed() -> None:
    broken = result("paper", 128) | dict.fromkeys(
        (
            "ours_ms",
            "layer_ms",
            "dense_ms",
            "floor_ms",
            "gate_ms",
            "of_bound",
            "best_peer",
            "clocks",
        ),
    )
    broken |= dict.fromkeys(
        ("dense_over_ours", "floor_over_ours", "best_peer_over_ours", "over_floor_us")
    )
    broken |= {
        "peers": {"grouped-mm": None, "vllm-triton": None, "liger": None},
        "peer_details": {},
        "spread": {},
        "error": "our launch ended with HANG",
        "copy_gb_per_s": None,
    }
    lines = bench_lines(report(result("mixtral", 64), broken), WIDE)
    assert "\n".join(lines) == EXPECTED


def test_what_the_bench_took_is_said_where_asked() -> None:
    lines = bench_lines(report(result("mixtral", 64), result("paper", 128)), WIDE, verbose=True)
    assert (
        "\n".join(lines[-4:])
        == """\
  what the bench took  s in all  at most  for
  start                     4.0      2.0  mixtral 64
  check                     3.0      2.0  paper 128
  whole                    25.0     12.5  mixtral 64"""
    )


def test_copy_rates_of_several_shapes() -> None:
    two = report(result("mixtral", 64), result("paper", 64, copy_gb_per_s=4200.0))
    assert bench_lines(two, WIDE)[1].endswith("; copies at 4200 to 4300 GB/s")


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_tables_keep_to_the_terminal(width: int) -> None:
    lines = bench_lines(report(result("mixtral", 64)), Terminal(width, False, True))
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("mode", ["tracing", "ranks", "skew"])
def test_the_tables_of_pairs(mode: str) -> None:
    line = {
        "preset": "mixtral", "T": 64, "first_ms": 1.0, "second_ms": 1.005, "ratio": 1.005,
        "low": 1.004, "high": 1.0061, "error": None,
    }  # fmt: skip
    if mode == "ranks":
        line |= {"ranks": 8, "sms": 132, "sms_used": 128, "scale": 1.1, "fullest_over_mean": 1.07}
        line |= {"copying": {"ms": 1.02, "ratio": 1.0123, "low": 1.0111, "high": 1.0135}}
    text = "\n".join(bench_lines(report(line, mode=mode), WIDE))
    assert "1.0050" in text
    assert "1.0040 to 1.0061" in text
    assert ("fullest rank 1.0700" in text) == (mode == "ranks")
    assert ("1.0123 (1.0111 to 1.0135) beside one rank that copies" in text) == (mode == "ranks")


def test_a_comparison_says_what_is_slower() -> None:
    line = {
        "preset": "mixtral", "T": 64, "before_ms": 1.0, "now_ms": 1.1, "ratio": 1.1,
        "spread_before": 0.02, "spread_now": 0.03, "dense_ratio": 1.0, "beyond_spread": True,
    }  # fmt: skip
    comparison = {
        "file": "old.json", "gpu": "NVIDIA H100", "same_gpu": False, "same_device": False,
        "commit": "old",
        "results": [line], "limit": 0.05, "regressions": [{"preset": "mixtral", "T": 64}],
    }  # fmt: skip
    text = "\n".join(bench_lines(report(result("mixtral", 64), comparison=comparison), WIDE))
    assert "beside old.json (flashmoe old, on another GPU (NVIDIA H100))" in text
    assert "1.100  2.0%, 3.0%" in text
    assert "slower by more than 5.0%: mixtral 64" in text
    comparison |= {"gpu": "NVIDIA H200", "same_gpu": True}
    text = "\n".join(bench_lines(report(result("mixtral", 64), comparison=comparison), WIDE))
    assert "beside old.json (flashmoe old, on another NVIDIA H200)" in text
    comparison["same_device"] = True
    text = "\n".join(bench_lines(report(result("mixtral", 64), comparison=comparison), WIDE))
    assert "beside old.json (flashmoe old)" in text


def test_a_layer_that_was_not_timed_is_said() -> None:
    lines = bench_lines(report(result("mixtral", 64, layer_ms=None, why_no_layer="no room")), WIDE)
    assert "the layer of a model is not timed: no room" in lines


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to write to, and a machine of fakes in the place of a GPU."""
    from flashmoe import build_info
    from flashmoe.bench import machine as module

    monkeypatch.setattr(module, "require_gpu", lambda device: None)
    monkeypatch.setattr(module, "gpu_machine", opened_gpu)
    monkeypatch.setattr(build_info, "require_runner", lambda: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str) -> Any:
    from typer.testing import CliRunner

    from flashmoe_cli.main import app

    return CliRunner().invoke(app, ["bench", *args], prog_name="flashmoe")


def test_json_is_the_object_that_o_writes(here: Path) -> None:
    done = run("tiny", "-T", "8,16", "-n", "2", "--peers", "none", "--json", "-o", "a.json")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed == json.loads((here / "a.json").read_text())
    assert [r["T"] for r in printed["results"]] == [8, 16]
    assert printed["results"][0]["peers"] == {}


def test_compare_ends_with_3_where_something_is_slower(here: Path) -> None:
    assert run("tiny", "-T", "8", "-n", "2", "--peers", "none", "-o", "a.json").exit_code == 0
    earlier = json.loads((here / "a.json").read_text())
    earlier["results"][0]["ours_ms"] /= 1000
    (here / "fast.json").write_text(json.dumps(earlier))
    args = ("tiny", "-T", "8", "-n", "2", "--peers", "none", "--compare", "fast.json")
    assert run(*args).exit_code == 0
    done = run(*args, "--fail-over", "5%", "--json")
    assert done.exit_code == 3
    assert json.loads(done.stdout)["comparison"]["regressions"] == [{"preset": "tiny", "T": 8}]
    assert run(*args, "--fail-over", "99999999%").exit_code == 0


def use(monkeypatch: pytest.MonkeyPatch, opened: Callable[[int], Machine]) -> None:
    """``opened`` in the place of a GPU."""
    from flashmoe.bench import machine as module

    monkeypatch.setattr(module, "gpu_machine", opened)


def test_a_wrong_result_ends_with_1(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, spoilt_gpu)
    done = run("tiny", "-T", "8", "-n", "1", "--peers", "none", "-v")
    assert done.exit_code == 1
    assert "FAILED tiny 8: wrong result" in done.stdout
    assert "what the bench took" in done.stdout


def test_a_wrong_result_is_compared_all_the_same(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("tiny", "-T", "8", "-n", "1", "--peers", "none")
    use(monkeypatch, opened_gpu)
    assert run(*args, "-o", "a.json").exit_code == 0
    use(monkeypatch, spoilt_gpu)
    done = run(*args, "--compare", "a.json", "--fail-over", "5%")
    assert done.exit_code == 1
    assert "FAILED tiny 8: wrong result" in done.stdout
    assert "beside a.json" in done.stdout


def test_a_file_is_gone_on_with(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("tiny", "-n", "1", "--peers", "none", "--resume", "a.json")
    use(monkeypatch, dying_gpu)
    first = run(*args, "-T", "8,13", "--json")
    assert first.exit_code == 1
    before = json.loads((here / "a.json").read_text())
    assert json.loads(first.stdout) == before
    assert [bool(r["error"]) for r in before["results"]] == [False, True]
    use(monkeypatch, opened_gpu)
    assert run(*args, "-T", "8,13,16").exit_code == 0
    after = json.loads((here / "a.json").read_text())
    assert [(r["T"], r["error"]) for r in after["results"]] == [(8, None), (13, None), (16, None)]
    assert after["results"][0] == before["results"][0]
    other = run(*args, "-T", "8", "--seed", "3")
    assert other.exit_code == 2
    assert "seed 0 then, 3 now" in other.stderr
    assert json.loads((here / "a.json").read_text()) == after


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("tiny", "--fail-over", "5%"), "--fail-over without --compare"),
        (("tiny", "--compare", "absent.json"), "can't be read"),
        (("tiny", "--mode", "skew", "--peers", "all"), "--peers with --mode skew"),
        (("tiny", "--ranks", "2"), "--ranks without --mode ranks"),
        (("tiny", "--suite", "h200"), "--suite beside other shapes"),
        (("tiny", "-T", "none"), "-T none is not a number"),
        (("tiny", "-T", "0"), "-T 0 is not a number"),
        (("mixtrl",), "no preset 'mixtrl'"),
        (("tiny", "--resume", "a.json", "-o", "b.json"), "--output beside --resume"),
        (("tiny", "--resume", "nowhere/a.json"), "no folder nowhere"),
        (("tiny", "--peers", "vllm"), "no peer 'vllm'"),
        (("tiny", "-o", "nowhere/a.json"), "no folder nowhere"),
        (("tiny", "-f", "-o", "."), ". is a folder"),
    ],
)
def test_misuse_ends_with_2_before_anything_runs(
    here: Path, args: tuple[str, ...], says: str
) -> None:
    done = run(*args)
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stdout == ""


def test_an_existing_file_is_kept(here: Path) -> None:
    (here / "a.json").write_text("mine")
    args = ("tiny", "-T", "8", "-n", "1", "--peers", "none", "-o", "a.json")
    assert run(*args).exit_code == 2
    assert (here / "a.json").read_text() == "mine"
    assert run(*args, "-f").exit_code == 0
    assert json.loads((here / "a.json").read_text())["verb"] == "bench"


def given(**more: Any) -> dict[str, Any]:
    flags = ("hidden", "intermediate", "experts", "top_k", "activation", "dtype")
    rest = ("tokens", "suite", "presets")
    return {**dict.fromkeys((*flags, *rest)), "mode": "speed", **more}


@pytest.mark.parametrize(
    ("more", "shapes"),
    [
        ({"presets": ["paper", "olmoe"]}, [("paper", 4096), ("olmoe", 4096)]),
        ({"presets": ["paper"], "tokens": "8,16"}, [("paper", 8), ("paper", 16)]),
        ({"mode": "skew"}, [("qwen3-30b", t) for t in (16384, 8192, 4096)]),
        ({"presets": ["paper"], "experts": 4}, [("paper", 4096)]),
    ],
)
def test_which_shapes(more: dict[str, Any], shapes: list[tuple[str, int]]) -> None:
    found = benching.shapes_of(given(**more))
    assert [(s.preset, s.tokens) for s in found] == shapes
    if "experts" in more:
        assert found[0].config.experts == 4


def test_without_a_word_it_is_the_whole_suite() -> None:
    from flashmoe.bench.shapes import SUITES

    assert benching.shapes_of(given()) == SUITES["h200"]
    assert benching.shapes_of(given(suite="latency")) == SUITES["latency"]
    assert all(s.tokens >= 4096 for s in benching.shapes_of(given(mode="tracing")))


def test_without_a_gpu_it_is_5_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashmoe import build_info, session

    def none(*args: Any) -> Any:
        raise FlashmoeError("no driver", "install a driver; or run with --world host", 5)

    monkeypatch.setattr(session, "choose_world", none)
    monkeypatch.setattr(build_info, "require_runner", lambda: None)
    done = run("tiny")
    assert done.exit_code == 5
    assert done.stderr.splitlines() == [
        "error: there is no GPU to time: no driver",
        "hint:  install a driver",
    ]


def test_both_reports_can_be_drawn_as_they_are(here: Path) -> None:
    shape = Shape("tiny", PRESETS["tiny"].config, 8)
    speed = run_bench(Bench("speed", (shape,), SpeedOptions(1)), opened, quiet)
    ranks = run_bench(Bench("ranks", (shape,), PairOptions(2, 2)), opened, quiet)
    assert any("tiny" in line for line in bench_lines(speed, WIDE, verbose=True))
    assert any("tiny x 2" in line for line in bench_lines(ranks, WIDE, verbose=True))

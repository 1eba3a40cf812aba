"""A result beside an earlier one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashmoe.bench.compare import (
    command_words,
    compare,
    parse_limit,
    read_report,
    regressions,
)
from flashmoe.errors import FlashmoeError


def result(preset: str, ours: float | None, spread: float = 0.01, **more: Any) -> dict[str, Any]:
    shape = {"preset": preset, "T": 64, "H": 64, "I": 96, "E": 8, "k": 2}
    kind = {"activation": "swiglu", "dtype": "bf16", "routing": "softmax"}
    times: dict[str, Any] = {"ours_ms": ours, "dense_ms": 1.0, "spread": {}}
    if ours is not None:
        quartiles = {"q1_ms": ours * (1 - spread / 2), "q3_ms": ours * (1 + spread / 2)}
        times["spread"] = {"ours": quartiles}
    return {**shape, **kind, **times, **more}


def report(*results: dict[str, Any], gpu: str = "NVIDIA H200") -> dict[str, Any]:
    return {
        "schema": 1,
        "verb": "bench",
        "mode": "speed",
        "environment": {"gpu": gpu, "uuid": "GPU-1", "commit": "abc"},
        "method": {},
        "results": list(results),
    }


def test_ratios_and_spreads() -> None:
    now = report(result("a", 1.1), result("b", 0.9), result("new", 1.0))
    before = report(result("a", 1.0, 0.04), result("b", 1.0), result("gone", 1.0))
    found = compare(now, before, "old.json")
    assert found["same_gpu"]
    a, b = found["results"]
    assert a["ratio"] == pytest.approx(1.1)
    assert a["spread_before"] == pytest.approx(0.04)
    assert a["spread_now"] == pytest.approx(0.01)
    assert a["beyond_spread"]
    assert b["ratio"] == pytest.approx(0.9)
    assert a["dense_ratio"] == 1.0


def test_a_change_within_the_quartiles_is_said_to_be() -> None:
    found = compare(report(result("a", 1.01, 0.05)), report(result("a", 1.0, 0.05)), "o")
    assert not found["results"][0]["beyond_spread"]


def test_regressions_over_the_limit() -> None:
    before = report(result("a", 1.0), result("b", 1.0), result("c", 1.0))
    now = report(result("a", 1.06), result("b", 1.04), result("c", None))
    found = compare(now, before, "o")
    assert [r["preset"] for r in regressions(found, 0.05)] == ["a", "c"]
    assert [r["preset"] for r in regressions(found, 0.10)] == ["c"]


def test_what_did_not_run_before_or_is_another_shape_is_left_out() -> None:
    before = report(result("a", None), result("b", 1.0, E=16))
    assert compare(report(result("a", 1.0), result("b", 1.0)), before, "o")["results"] == []


def test_another_gpu_is_said() -> None:
    before = report(result("a", 1.0), gpu="NVIDIA H100")
    assert not compare(report(result("a", 1.0)), before, "o")["same_gpu"]


@pytest.mark.parametrize(("uuid", "same"), [("GPU-1", True), ("GPU-2", False), (None, None)])
def test_another_one_of_the_same_model_is_told_from_the_same(
    uuid: str | None, same: bool | None
) -> None:
    before = report(result("a", 1.0))
    before["environment"]["uuid"] = uuid
    found = compare(report(result("a", 1.0)), before, "o")
    assert found["same_gpu"]
    assert found["same_device"] is same


def test_a_command_names_the_wheel_without_its_folders() -> None:
    command = ["/usr/bin/flashmoe", "bench", "--sglang-wheel", "here/or/there/a.whl", "-n", "3"]
    assert command_words(command) == ["flashmoe", "bench", "--sglang-wheel", "a.whl", "-n", "3"]
    assert command_words(["f", "--sglang-wheel=x/a.whl"]) == ["flashmoe", "--sglang-wheel=a.whl"]
    assert command_words(["f", "bench", "--sglang-wheel"])[-1] == "--sglang-wheel"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no json", "is no JSON"),
        ("[]", "is no result of a bench"),
        (json.dumps({"schema": 1, "verb": "run"}), "is no result of a bench"),
        (json.dumps(report() | {"environment": None}), "is no result of a bench"),
        (json.dumps(report() | {"results": {}}), "is no result of a bench"),
        (json.dumps(report() | {"schema": 2}), "of version 2"),
        (json.dumps(report() | {"mode": "skew"}), "the mode skew"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(FlashmoeError, match=says) as caught:
        read_report(path, "speed")
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlashmoeError, match="can't be read"):
        read_report(tmp_path / "absent.json", "speed")


@pytest.mark.parametrize(("text", "limit"), [("5%", 0.05), ("0.05", 0.05), ("0", 0.0)])
def test_limits(text: str, limit: float) -> None:
    assert parse_limit(text) == pytest.approx(limit)


@pytest.mark.parametrize("text", ["", "%", "five", "-1%", "nan", "inf"])
def test_what_is_no_limit(text: str) -> None:
    with pytest.raises(FlashmoeError, match="is no share"):
        parse_limit(text)

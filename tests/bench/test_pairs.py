"""Our kernel against itself: ranks, skew, tracing."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from flashmoe.bench.pairs import KINDS, PairOptions, bench_pair, routed_ids
from flashmoe.bench.shapes import Shape
from flashmoe.config import MoEConfig
from flashmoe.presets import PRESETS

from .fakes import TorchEngine, machine, quiet

TINY = Shape("tiny", PRESETS["tiny"].config, 24)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_gives_a_ratio_and_its_interval(kind: str) -> None:
    options = PairOptions(pairs=5, ranks=2)
    result = bench_pair(kind, TINY, machine(), options, quiet)
    assert result["error"] is None
    assert result["low"] <= result["ratio"] <= result["high"]
    assert result["pairs"] == 5
    scale = result.get("scale", 1.0)
    assert result["ratio"] * scale == pytest.approx(result["second_ms"] / result["first_ms"])
    assert ("copying" in result) == (kind == "ranks")
    phases = ["weights", "first launches", "check", "graphs", "timing", "check again"]
    assert list(result["seconds"]) == phases
    json.dumps(result, allow_nan=False)


def test_ranks_are_held_to_one_that_copies_too() -> None:
    built: list[tuple[int, bool]] = []

    def build(*args: Any) -> TorchEngine:
        engine = TorchEngine(*args)
        built.append((engine.options.ranks, engine.options.in_place))
        return engine

    result = bench_pair(
        "ranks", TINY, replace(machine(), build=build), PairOptions(5, ranks=4), quiet
    )
    assert built == [(1, True), (4, True), (1, False)]
    copying = result["copying"]
    assert copying["low"] <= copying["ratio"] <= copying["high"]
    wanted = result["second_ms"] / copying["ms"]
    assert copying["ratio"] * result["scale"] == pytest.approx(wanted)
    assert len(result["graph"]) == len(result["of_bound"]) == 3


def test_there_are_as_many_ranks_as_were_asked_for_whatever_the_tokens() -> None:
    engines: list[TorchEngine] = []

    def build(*args: Any) -> TorchEngine:
        engines.append(TorchEngine(*args))
        return engines[-1]

    nine = replace(TINY, tokens=9)
    result = bench_pair(
        "ranks", nine, replace(machine(), build=build), PairOptions(1, ranks=4), quiet
    )
    assert result["error"] is None
    assert [len(x) for x in engines[1].x] == [3, 2, 2, 2]


def test_the_scale_over_ranks_is_sms_and_the_fullest_rank() -> None:
    result = bench_pair("ranks", TINY, machine(), PairOptions(2, ranks=4), quiet)
    assert (result["sms"], result["sms_used"]) == (132, 128)
    assert 1 <= result["fullest_over_mean"] <= 4
    assert result["scale"] == pytest.approx(132 / 128 * result["fullest_over_mean"])


@pytest.mark.parametrize("config", [MoEConfig(64, 64, 16, 4), MoEConfig(64, 64, 8, 1)])
def test_balanced_and_skewed_ids(config: MoEConfig) -> None:
    balanced, skewed = routed_ids(64, config)
    for ids in (balanced, skewed):
        assert ids.dtype == torch.int32
        assert ids.shape == (64, config.top_k)
        assert ids.min() >= 0
        assert ids.max() < config.experts
        assert (ids.sort(dim=1).values.diff(dim=1) != 0).all()
    rows = torch.bincount(balanced.flatten().long(), minlength=config.experts)
    assert rows.max() - rows.min() <= 1
    assert (skewed == 0).any(dim=1).all()
    others = torch.bincount(skewed.flatten().long(), minlength=config.experts)[1:]
    assert others.max() - others.min() <= 1


def test_skew_needs_an_expert_to_leave_out() -> None:
    every = Shape("all", MoEConfig(64, 64, 2, 2), 8)
    result = bench_pair("skew", every, machine(), PairOptions(2), quiet)
    assert "nothing can be skewed" in result["error"]
    assert result["ratio"] is None


def test_a_wrong_result_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchEngine, "spoil", "wrong")
    result = bench_pair("tracing", TINY, machine(), PairOptions(2), quiet)
    assert result["error"] == "wrong result"

"""The performance page's table is what the committed bench wrote, and that is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashmoe.bench.shapes import suite

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    text = (ROOT / "benchmarks" / "results" / "h200.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.fixture(scope="module")
def rows() -> dict[str, list[str]]:
    """The first table whose head names a fastest peer: its cells by shape."""
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    table = page[page.index("| shape | ours, ms") :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {cell[0]: cell[1:] for cell in cells}


def test_every_shape_was_timed_untuned_and_right(report: dict[str, Any]) -> None:
    wanted = [(s.preset, s.tokens) for s in suite("h200")]
    assert [(r["preset"], r["T"]) for r in report["results"]] == wanted
    assert report["environment"]["gpu"] == "NVIDIA H200"
    assert "+dirty" not in report["environment"]["commit"]
    for result in report["results"]:
        assert result["error"] is None
        assert 0 < result["of_bound"] <= 1
        assert result["tiling"]["tuned"] is None
        for peer in ("grouped-mm", "grouped-mm-compiled", "vllm-triton", "vllm-triton-tuned"):
            assert result["peers"][peer] > 0, (result["preset"], result["T"], peer)


def test_the_table_is_of_the_committed_run(
    report: dict[str, Any], rows: dict[str, list[str]]
) -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert report["environment"]["commit"][:7] in page
    assert list(rows) == [f"{r['preset']} {r['T']}" for r in report["results"]]
    for result in report["results"]:
        spread, best = result["spread"]["ours"], result["best_peer"]
        assert rows[f"{result['preset']} {result['T']}"] == [
            f"{result['ours_ms']:.3f}",
            f"{spread['q1_ms']:.3f} to {spread['q3_ms']:.3f}",
            f"{result['layer_ms']:.3f}",
            f"{result['dense_ms']:.3f}",
            f"{result['floor_ms']:.3f}",
            f"{result['dense_over_ours']:.3f}",
            f"{result['floor_over_ours']:.3f}",
            f"{result['peers'][best]:.3f}",
            f"`{best}`",
            f"{result['best_peer_over_ours']:.3f}",
        ]

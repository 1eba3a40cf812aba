"""Made-up runs for the tests of what reads traces."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import synthetic


@pytest.fixture(scope="session")
def shape() -> synthetic.Shape:
    return synthetic.Shape(
        ranks=2,
        sms=3,
        tokens=200,
        hidden=64,
        intermediate=96,
        experts=8,
        top_k=2,
        iterations=3,
        wall_us=40,
    )


@pytest.fixture(scope="session")
def run_path(tmp_path_factory: pytest.TempPathFactory, shape: synthetic.Shape) -> Path:
    path = tmp_path_factory.mktemp("runs") / "made-up.fmoe"
    synthetic.write(path, shape)
    return path

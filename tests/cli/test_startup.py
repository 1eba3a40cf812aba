"""``flashmoe --help`` is quick: nothing heavy is imported, and little time passes."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time

import pytest

HEAVY = {"torch", "numpy", "pyarrow", "safetensors", "rich", "nvtx", "cuda"}


def imported(*args: str) -> set[str]:
    """Top-level modules that a command imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "flashmoe_cli", *args],
        capture_output=True,
        text=True,
        check=True,
    )
    names = re.findall(r"\|\s+([\w.]+)$", done.stderr, re.MULTILINE)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["trace", "--help"], ["presets"]])
def test_light_commands_import_nothing_heavy(args: list[str]) -> None:
    modules = imported(*args)
    assert "typer" in modules  # else the list was not read
    assert not modules & HEAVY


def seconds(*command: str) -> float:
    """Wall time of one run of a Python command."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return time.perf_counter() - began


def test_help_takes_little_more_than_importing_typer() -> None:
    # In turn, since a busy machine slows both; the absolute bar is benchmarks/cli.py's.
    ours, typer = [], []
    for _ in range(7):
        typer.append(seconds("-c", "import typer"))
        ours.append(seconds("-m", "flashmoe_cli", "--help"))
    assert statistics.median(ours) <= 2.5 * statistics.median(typer)

"""How long a person waits: ``flashmoe --help``, and ``flashmoe timeline`` on a saved run.

    python benchmarks/cli.py [--events 1000000] [--runs 7]

Wall time of whole processes, the median and range of ``--runs``; importing typer is timed in turn
with the help, since both feel the same load.  Bars: help 0.3 s and 2.5 times importing typer;
timeline of a million events 1.5 s.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import synthetic

HELP_S, HELP_RATIO, TIMELINE_S = 0.3, 2.5, 1.5


def seconds(*command: str) -> float:
    """Wall time of one run of a Python command."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return time.perf_counter() - began


def said(times: list[float]) -> str:
    """Median and range, in words."""
    return f"{statistics.median(times):.3f} s ({min(times):.3f} to {max(times):.3f})"


def main() -> None:
    """Measures, prints, and ends with 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=7)
    given = parser.parse_args()
    ours, typer, timeline = [], [], []
    for _ in range(given.runs):
        typer.append(seconds("-c", "import typer"))
        ours.append(seconds("-m", "flashmoe_cli", "--help"))
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run.fmoe"
        synthetic.write(run, synthetic.shape_for(given.events))
        for _ in range(given.runs):
            timeline.append(seconds("-m", "flashmoe_cli", "timeline", str(run)))
    help_s, timeline_s = statistics.median(ours), statistics.median(timeline)
    ratio = help_s / statistics.median(typer)
    print(f"import typer      {said(typer)}")
    print(f"flashmoe --help   {said(ours)}, {ratio:.2f} x importing typer")
    print(f"flashmoe timeline {said(timeline)} on {given.events} events")
    missed = help_s > HELP_S or ratio > HELP_RATIO
    missed = missed or (given.events >= 1_000_000 and timeline_s > TIMELINE_S)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()

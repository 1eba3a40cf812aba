"""How fast a run is read, in events a second: rings.bin to Arrow, then the timeline's figures.

    python benchmarks/reading.py --events 5000000 --repeat 7 [--json]

Makes up a run and times, each repeat from the start: opening it and decoding rings.bin into the
table of events; then, from that, every figure of `flashmoe timeline --json`, reading plan and
counts and making the text included.  The column `flow`, which no figure needs, is left 0.  The
files have just been written, so that they come from memory.
The figure is the median over the repeats; the spread is the least and the greatest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import synthetic

from flashmoe.trace.analysis import timeline_summary
from flashmoe.trace.decode import decode, require_known
from flashmoe.trace.rundir import open_run


def read_once(path: Path) -> tuple[int, float, float]:
    """Events, seconds from rings.bin to the table, seconds from that to the figures' text."""
    begin = time.perf_counter()
    run = open_run(path)
    events = decode(run.rings)
    require_known(events)
    decoded = time.perf_counter()
    run.events = events  # in place of events.parquet
    json.dumps(timeline_summary(run))
    return len(events), decoded - begin, time.perf_counter() - decoded


def spread(events: int, seconds: list[float]) -> dict[str, Any]:
    """Median, least and greatest of a repeated step."""
    return {
        "seconds": [round(t, 3) for t in seconds],
        "million_events_per_second": round(events / statistics.median(seconds) / 1e6, 2),
        "least": round(events / max(seconds) / 1e6, 2),
        "greatest": round(events / min(seconds) / 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=5_000_000)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made-up.fmoe"
        synthetic.write(path, synthetic.shape_for(given.events))
        read_once(path)  # first touch of the file's pages and of the code
        found = [read_once(path) for _ in range(given.repeat)]
    events = found[0][0]
    steps = {
        "decode": spread(events, [decoded for _, decoded, _ in found]),
        "figures": spread(events, [figures for _, _, figures in found]),
        "both": spread(events, [decoded + figures for _, decoded, figures in found]),
    }
    result = {"cpus": os.cpu_count(), "events": events, "steps": steps}
    if given.json:
        print(json.dumps(result))
        return
    print(f"{os.cpu_count()} CPUs, {events} events; median of {given.repeat} (least to greatest)")
    for name, step in steps.items():
        print(
            f"{name:8} {step['million_events_per_second']:5.2f} M events/s "
            f"({step['least']:.2f} to {step['greatest']:.2f}), "
            f"{statistics.median(step['seconds']):.3f} s"
        )


if __name__ == "__main__":
    main()

"""How fast a run is exported, in slices a second.

    python benchmarks/export.py --events 5000000 --repeat 5 [--json]

Makes up a run, opens it, and times the export from the tables in memory to the finished file:
finding flows, laying out tracks, packing, writing.  Reading events.parquet is apart.
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

from flashmoe.trace.export import FORMATS, export
from flashmoe.trace.rundir import Run, open_run


def measure(run: Run, format: str, path: Path, repeat: int) -> dict[str, Any]:
    """Exports ``repeat`` times and says how long that took, in seconds and slices a second."""
    times = []
    done = export(run, format, path, force=True)  # first touch of the tables and the file's pages
    for _ in range(repeat):
        begin = time.perf_counter()
        done = export(run, format, path, force=True)
        times.append(time.perf_counter() - begin)
    median = statistics.median(times)
    return {
        "format": format,
        "slices": done.slices,
        "flows": done.flows,
        "bytes": done.size,
        "seconds": [round(t, 3) for t in times],
        "million_slices_per_second": round(done.slices / median / 1e6, 2),
        "least": round(done.slices / max(times) / 1e6, 2),
        "greatest": round(done.slices / min(times) / 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=5_000_000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--format", choices=[*FORMATS, "all"], default="perfetto")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    formats = list(FORMATS) if given.format == "all" else [given.format]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made-up.fmoe"
        synthetic.write(path, synthetic.shape_for(given.events))
        run = open_run(path)
        begin = time.perf_counter()
        _ = run.events, run.plan, run.counts
        read = time.perf_counter() - begin
        found = [measure(run, f, Path(folder) / "out", given.repeat) for f in formats]
    result = {"cpus": os.cpu_count(), "read_seconds": round(read, 3), "exports": found}
    if given.json:
        print(json.dumps(result))
        return
    print(f"{os.cpu_count()} CPUs; reading the run took {read:.2f} s and is not counted below")
    for one in found:
        spread = f"median of {given.repeat}; {one['least']:.2f} to {one['greatest']:.2f}"
        print(
            f"{one['format']}: {one['million_slices_per_second']:.2f} M slices/s ({spread}), "
            f"{one['slices']} slices, {one['flows']} flows, {one['bytes'] / 1e6:.0f} MB"
        )


if __name__ == "__main__":
    main()

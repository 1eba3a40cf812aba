"""How long the traces of several ranks take to become one run.

    python benchmarks/merging.py --ranks 4 --events 1000000 [--repeat 5] [--json]

Makes up the parts of ranks with so many events each, as PEs hand them to the launcher, and times
what the launcher does with them: reading the parts, putting clocks on one (each rank's is made to
be off and to drift), and writing the run directory with everything in it.  Nothing else is timed.
The files have just been written, so that they come from memory.
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

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import synthetic

from flashmoe.config import MoEConfig
from flashmoe.merge import Outcome, conclude
from flashmoe.part import Part, read_part, write_part
from flashmoe.session import Request
from flashmoe.trace.rings import from_dump, held
from flashmoe.trace.rundir import open_run


def parts_of(shape: synthetic.Shape) -> tuple[list[Part], MoEConfig]:
    """Each rank's part of a made-up run."""
    dump, routed, about = synthetic.make(shape)
    rings = from_dump(dump)
    config = MoEConfig(shape.hidden, shape.intermediate, shape.experts, shape.top_k)
    each = len(rings.headers) // shape.ranks
    parts = []
    for rank in range(shape.ranks):
        mine = slice(rank * each, (rank + 1) * each)
        begin = int(rings.headers["begin_ns"].min())
        start = {"at_ns": begin, "offset_ns": 1000 * rank, "bound_ns": 500}
        end = {"at_ns": begin + 10**9, "offset_ns": 4000 * rank, "bound_ns": 500}
        report = {
            "rank": rank, "pid": 1, "exit_code": 0, "message": "ok", "status": 0,
            "launch_ms": about["timing"]["launch_ms"], "rows_needed": 0, "check": None,
            "nvlink": None,
            "clock": {"start": start, "end": end},
            "inputs": {"name": "made-up", "config": config.to_dict(), "remarks": [],
                       "tokens": [shape.tokens] * shape.ranks, "shared_expert": False},
            "engine": {"world": "host", "sms_per_rank": shape.sms, "deadline_s": 10.0,
                       "first_deadline_s": 40.0, "clock": about["clock"],
                       "shape": _core_shape(shape), "family": "made-up"},
        }  # fmt: skip
        arrays = {"ring_headers": rings.headers[mine]}
        arrays |= {f"ring{i}": records for i, records in enumerate(rings.stored[mine])}
        arrays["counts"] = np.stack([routed.chunk_counts[rank]] * shape.iterations)
        parts.append(Part(report, arrays))
    return parts, config


def _core_shape(shape: synthetic.Shape) -> dict[str, Any]:
    """The fields of csrc/core/shape.h that give the made-up run's tiles."""
    owned = -(-shape.experts // shape.ranks)
    return {
        "world": shape.ranks, "experts": shape.experts, "top_k": shape.top_k,
        "hidden": shape.hidden, "inter": shape.intermediate, "max_tokens": shape.tokens,
        "pool_rows": 1, "chunks": shape.sms, "tile_m": shape.tile_m, "tile_step": shape.tile_step,
        "tile_n1": shape.tile_n // 2, "tile_n2": shape.tile_n,
        "wave_experts": max(1, -(-owned // shape.waves)), "activation": "swiglu",
        "routing": "softmax", "renormalize": True, "scale": 1.0, "groups": 1, "top_groups": 1,
    }  # fmt: skip


def merge_once(files: list[Any], request: Request) -> float:
    """Seconds from the parts as they lie to the run directory."""
    begin = time.perf_counter()
    parts = {rank: read_part(file) for rank, file in enumerate(files)}
    whole = {rank: part for rank, part in parts.items() if part is not None}
    assert len(whole) == len(files)
    conclude(request, Outcome(whole), "", lambda *_: None)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--events", type=int, default=1_000_000, help="of each rank")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    shape = synthetic.shape_for(given.events * given.ranks, ranks=given.ranks)
    parts, config = parts_of(shape)
    records = sum(int(held(part.arrays["ring_headers"]).sum()) for part in parts)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "merged.fmoe"
        request = Request(
            name="made-up", preset=None, config=config, tokens=(shape.tokens,) * shape.ranks,
            ranks=shape.ranks, world="host", traced=True, check=False, out=out, force=True,
            iterations=shape.iterations, processes=True,
        )  # fmt: skip
        files = []
        for part in parts:
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            write_part(file, part)
            files.append(file)
        del parts
        seconds = [merge_once(files, request) for _ in range(given.repeat)]
        events = open_run(out).events.num_rows
    result = {
        "cpus": os.cpu_count(), "ranks": given.ranks, "events": events, "records": records,
        "launches": shape.iterations, "seconds": [round(s, 2) for s in seconds],
        "median_s": round(statistics.median(seconds), 2),
    }  # fmt: skip
    if given.json:
        print(json.dumps(result))
        return
    print(
        f"{result['cpus']} CPUs, {given.ranks} ranks, {events} events ({records} records, "
        f"{shape.iterations} launches): {result['median_s']:.2f} s "
        f"({min(seconds):.2f} to {max(seconds):.2f}, {given.repeat} times)"
    )


if __name__ == "__main__":
    main()

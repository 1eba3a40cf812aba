"""A session's run directory: what goes into run.json, and the rings, plan and counts beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashmoe.inputs import Inputs
    from flashmoe.session import Record, Request, Result
    from flashmoe.world.base import Engine


def save_run(
    path: Path, request: Request, engine: Engine, inputs: Inputs, record: Record, result: Result
) -> Path:
    """Writes the run directory and gives its path; raises FlashmoeError as ``RunWriter`` does."""
    from flashmoe.trace.rundir import RunWriter

    with RunWriter(path, force=request.force) as writer:
        writer.meta |= metadata(request, engine, inputs, record, result)
        if request.traced:
            writer.add_rings(engine.rings())
        for i, routing in enumerate(record.routings):
            writer.add_routing(i, routing)
        if result.hang is not None:
            assert result.flight is not None
            writer.add_flight(result.flight)
    return path


def metadata(
    request: Request, engine: Engine, inputs: Inputs, record: Record, result: Result
) -> dict[str, Any]:
    """run.json but for what ``RunWriter`` adds: see docs/trace-format.md."""
    return metadata_of(
        request,
        result,
        deadline_s=engine.options.deadline_s,
        launches=len(record.launches),
    )


def metadata_of(
    request: Request,
    result: Result,
    *,
    deadline_s: float | None,
    launches: int,
) -> dict[str, Any]:
    """The same from a result alone, whoever ran it; ``launches`` measured ones were begun."""
    from flashmoe.build_info import build_info
    from flashmoe.trace.schema import LANE_NAME
    from flashmoe.verdict import experts_of_rank

    build = build_info()
    config = result.config
    return {
        "tool": {"version": build.version, "commit": build.commit, "dirty": build.dirty},
        "command": request.command,
        "config": {
            **config.to_dict(),
            "name": result.name,
            "preset": request.preset,
            "seed": request.seed,
            "skew": request.skew,
            "checkpoint": None if request.checkpoint is None else str(request.checkpoint),
            "layer": request.layer,
            "tokens_file": None if request.tokens_file is None else str(request.tokens_file),
            "shared_expert": result.shared_expert,
        },
        "world": {
            "kind": result.world,
            "why": result.why_world,
            "ranks": request.ranks,
            "sms_per_rank": result.sms_per_rank,
            "lanes": list(LANE_NAME.values()),
            "experts_of_rank": experts_of_rank(config.experts, request.ranks),
            "tokens": list(result.tokens),
            "row_bytes": config.row_bytes,
            "topology": result.topology,
            "processes": result.processes,
            "tiling": result.tiling,
        },
        "device": result.device,
        "clock": result.clock,
        "traced": request.traced,
        "iterations": launches,
        "warmup": request.warmup,
        "deadline_s": deadline_s,
        "faults": [fault.kind for fault in request.faults],
        "timing": {"launch_ms": result.launch_ms},
        "nvlink": result.nvlink,
        "check": result.check,
        "status": {"code": result.exit_code, "message": result.message},
        "hang": None if result.hang is None else result.hang.as_dict(),
    }


def topology(world: str, ranks: int, processes_per_gpu: int = 0) -> str:
    """What the ranks share; on ``shared-gpu`` no transfer rate is a link rate.

    ``processes_per_gpu``: of ranks that are processes; 0 where they are none.
    """
    if world == "host":
        return "host-processes" if processes_per_gpu else "host-threads"
    if processes_per_gpu == 1 and ranks > 1:
        return "several-gpus"
    return "shared-gpu" if ranks > 1 else "one-gpu"

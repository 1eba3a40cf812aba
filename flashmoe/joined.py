"""A PE that torchrun, srun or mpirun started: every one runs the command line, rank 0 speaks.

Each rank writes its part into a folder beside the run, which all nodes must see; rank 0 makes the
run of them, and the others wait for it, since launchers end a job when one of its processes ends
with an error.  A rank that dies is the launcher's to see; what the others find is its silence: in
the store, which names it, or in the kernel, by the deadline.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import traceback
import uuid
from pathlib import Path
from typing import Any

from flashmoe.errors import FlashmoeError
from flashmoe.merge import Outcome, conclude
from flashmoe.part import Part, read_part, write_part
from flashmoe.pe import Ended, run_pe, strike
from flashmoe.session import (
    EXIT_WRONG,
    Progress,
    Request,
    Result,
    choose_world,
    refuse_existing,
)
from flashmoe.trace.place import runs_folder
from flashmoe.world.board import Board
from flashmoe.world.processes import choose_transport
from flashmoe.world.rendezvous import Job, Place, rendezvous

#: How long rank 0 waits for the parts of ranks that had come to the end of a launch it saw fail.
PARTS_S = 10.0


def join(request: Request, place: Place, progress: Progress) -> tuple[Result | None, int]:
    """Runs this process's rank: (the result, at rank 0 alone; the exit code of the whole).

    Raises FlashmoeError at rank 0 for what went wrong, at whatever rank.
    """
    world, why_world = choose_world(request.world, request.device)
    transport, why_transport = choose_transport(
        request.transport,
        world,
        no_pointers=request.no_pointers,
        nodes=place.nodes,
        gpus=place.local_world,
    )
    strike(request, place.rank, "start")
    job = rendezvous(place)
    board = Board.make(place.world, shared=False)
    out = request.out or request.hang_out
    base = runs_folder() if out is None else out.absolute().parent
    # Made by rank 0's word, so that all name one folder whatever their clocks and numbers are.
    said = job.gather("folder", str(base / f".flashmoe-{uuid.uuid4().hex[:12]}.pes").encode())
    folder = Path(said[0].decode())
    if place.rank == 0:
        # Not before all have met: the store may be this process's, and would be gone with it.
        try:
            refuse_existing(request)
        except FlashmoeError as exc:
            job.fail(f"rank 0: {exc.message}")
            _verdict(job, exc.exit_code)
            raise
    failed: Ended | None = None
    try:
        pe = run_pe(request, job, board, progress, transport)
    except Ended as ended:
        failed, pe = ended, ended.pe
        if not isinstance(ended.cause, FlashmoeError):
            traceback.print_exception(ended.cause)
    if place.rank > 0:
        with contextlib.suppress(FlashmoeError):
            _leave(pe.part(), folder, job)
            return None, int(job.get("verdict", 0, despite_failure=True))
        # Rank 0 is gone, and will not tidy up.
        shutil.rmtree(folder, ignore_errors=True)
        return None, pe.exit_code or EXIT_WRONG
    try:
        parts = _collect(pe.part(), folder, job)
        if failed is not None:
            raise failed.cause
        outcome = Outcome(parts, {}, None, pe.interrupted, {}, set(), place.by, place.nodes,
                          transport, why_transport)  # fmt: skip
        silent = [r for r in range(place.world) if r not in parts]
        outcome.gone = dict.fromkeys(silent, f"it left no word ({place.by} may say more)")
        result = conclude(request, outcome, why_world, progress)
        _verdict(job, result.exit_code)
        return result, result.exit_code
    except BaseException as exc:
        _verdict(job, getattr(exc, "exit_code", EXIT_WRONG))
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _leave(part: Part, folder: Path, job: Job) -> None:
    """Writes a part whole, under a name that says so, and tells rank 0."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"rank-{job.rank}.unfinished"
    with unfinished.open("wb") as file:
        write_part(file, part)
    os.replace(unfinished, folder / f"rank-{job.rank}")
    job.set(f"part/{job.rank}", b"written")


def _collect(own: Part, folder: Path, job: Job) -> dict[int, Part]:
    """The parts of all ranks that leave one; after a failure those that come in ``PARTS_S``."""
    parts = {job.rank: own}
    until = time.monotonic() + (PARTS_S if own.report["exit_code"] else job.timeout_s)
    while len(parts) < job.world and time.monotonic() < until:
        for rank in range(job.world):
            if rank not in parts and job.has(f"part/{rank}"):
                parts[rank] = _read(folder / f"rank-{rank}", rank)
                if parts[rank].report["exit_code"]:
                    until = min(until, time.monotonic() + PARTS_S)
        time.sleep(0.01)
    return parts


def _read(path: Path, rank: int) -> Part:
    part = None
    for _ in range(50):  # a network's file system may show it later
        with contextlib.suppress(OSError), path.open("rb") as file:
            part = read_part(file)
        if part is not None:
            return part
        time.sleep(0.1)
    raise FlashmoeError(
        f"rank {rank} wrote its part to {path}, which rank 0 does not see",
        "-o must name a place that all nodes share",
    )


def _verdict(job: Job, code: Any) -> None:
    with contextlib.suppress(FlashmoeError):
        job.set("verdict", str(code).encode())
        # The store is this process's where torchrun has none: let the others read first.
        time.sleep(0.3)

"""A PE that torchrun, srun or mpirun started: every one runs the command line, rank 0 speaks.

Each rank writes its part into a folder beside the run, which all nodes must see; rank 0 makes the
run of them, and the others wait for it, since launchers end a job when one of its processes ends
with an error.  A rank that dies is the launcher's to see; what the others find is its silence: in
the store, which names it, or in the kernel, by the deadline.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import traceback
import uuid
from pathlib import Path
from typing import Any

from flashmoe.errors import EXIT_STOPPED, EXIT_WRONG, FlashmoeError, one_line
from flashmoe.merge import Outcome, conclude
from flashmoe.part import Part, read_part, refused_by_disk, write_part
from flashmoe.pe import Ended, Pe, run_pe, strike
from flashmoe.session import Progress, Request, Result, choose_world, refuse_existing
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
    out = request.out or request.hang_out
    base = runs_folder() if out is None else out.absolute().parent
    # Made by rank 0's word, so that all name one folder whatever their clocks and numbers are.
    said = job.gather("folder", str(base / f".flashmoe-{uuid.uuid4().hex[:12]}.pes").encode())
    folder = Path(said[0].decode())
    if place.rank > 0:
        return None, _follow(request, job, folder, progress, transport)
    try:
        _refuse_existing(request, job)
        pe, failed = _run(request, job, progress, transport)
        parts, without = _collect(_own_part(pe, failed), folder, job)
        if failed is not None:
            raise failed.cause
        _raise_unwritten(parts, without)
        outcome = Outcome(parts, {}, None, pe.interrupted, {}, list(without), place.by, place.nodes,
                          transport, why_transport)  # fmt: skip
        silent = [r for r in range(place.world) if r not in parts and r not in without]
        outcome.gone = dict.fromkeys(silent, f"it left no word ({place.by} may say more)")
        result = conclude(request, outcome, why_world, progress)
        _verdict(job, result.exit_code)
        return result, result.exit_code
    except BaseException as exc:
        stopped = isinstance(exc, KeyboardInterrupt)
        _verdict(job, EXIT_STOPPED if stopped else getattr(exc, "exit_code", EXIT_WRONG))
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_existing(request: Request, job: Job) -> None:
    # Not before all have met: the store may be this process's, and would be gone with it.
    try:
        refuse_existing(request)
    except FlashmoeError as exc:
        job.fail(f"rank 0: {exc.message}")
        raise


def _run(request: Request, job: Job, progress: Progress, transport: str) -> tuple[Pe, Ended | None]:
    """This process's rank, and its failure, whose traceback is printed where nobody foresaw it."""
    board = Board.make(job.world, shared=False)
    try:
        return run_pe(request, job, board, progress, transport), None
    except Ended as ended:
        if not isinstance(ended.cause, FlashmoeError):
            traceback.print_exception(ended.cause)
        return ended.pe, ended


def _own_part(pe: Pe, failed: Ended | None) -> Part:
    """Rank 0's part; where what it failed of took it along, that failure is raised."""
    try:
        return pe.part()
    except Exception as exc:
        if failed is None:
            raise
        traceback.print_exception(exc)
        raise failed.cause from exc


def _follow(request: Request, job: Job, folder: Path, progress: Progress, transport: str) -> int:
    """Any rank but 0: the exit code that rank 0 finds for all."""
    pe, _ = _run(request, job, progress, transport)
    with contextlib.suppress(FlashmoeError):
        _leave(pe, folder, job)
        return int(job.get("verdict", 0, despite_failure=True))
    # Rank 0 is gone, and will not tidy up.
    shutil.rmtree(folder, ignore_errors=True)
    return pe.exit_code or EXIT_WRONG


_WRITTEN, _NOTHING = b"written", b""
"""What a rank says under ``part/RANK``; or, as JSON, the error why its part is not written."""


def _leave(pe: Pe, folder: Path, job: Job) -> None:
    """Writes the part whole, under a name that says so, and tells rank 0.

    One that another's failure ended before it had an engine has nothing to tell, and writes
    nothing: rank 0 may have tidied up by then, as it may once it has given its verdict.
    """
    word = _NOTHING

    def lacks(why: str, hint: str, code: int) -> bytes:
        message = f"rank {job.rank}: {why}"
        job.fail(message)
        return json.dumps([message, hint, code]).encode()

    told = pe.engine is not None or pe.interrupted or pe.exit_code != EXIT_STOPPED
    if told and not job.has("verdict"):
        try:
            with refused_by_disk(folder):
                folder.mkdir(parents=True, exist_ok=True)
                unfinished = folder / f"rank-{job.rank}.unfinished"
                with unfinished.open("wb") as file:
                    write_part(file, pe.part())
                os.replace(unfinished, folder / f"rank-{job.rank}")
            word = _WRITTEN
        except FlashmoeError as exc:
            word = lacks(exc.message, exc.hint, exc.exit_code)
        except Exception as exc:  # what it failed of may have taken along what it had
            traceback.print_exception(exc)
            why = pe.message if pe.exit_code else one_line(exc)
            word = lacks(why, "", pe.exit_code or EXIT_WRONG)
    job.set(f"part/{job.rank}", word)


def _collect(
    own: Part, folder: Path, job: Job
) -> tuple[dict[int, Part], dict[int, FlashmoeError | None]]:
    """The parts of the ranks that leave one; after a failure those that come in ``PARTS_S``.

    And the ranks that say that they leave none, with the error where one could not be written.
    """
    parts = {job.rank: own}
    without: dict[int, FlashmoeError | None] = {}
    until = time.monotonic() + (PARTS_S if own.report["exit_code"] else job.timeout_s)
    while len(parts) + len(without) < job.world and time.monotonic() < until:
        for rank in range(job.world):
            if rank in parts or rank in without or not job.has(f"part/{rank}"):
                continue
            word = job.get(f"part/{rank}", rank, despite_failure=True)
            if word == _WRITTEN:
                parts[rank] = _read(folder / f"rank-{rank}", rank)
            else:
                without[rank] = FlashmoeError(*json.loads(word)) if word else None
            if rank in without or parts[rank].report["exit_code"]:
                until = min(until, time.monotonic() + PARTS_S)
        time.sleep(0.01)
    return parts, without


def _raise_unwritten(parts: dict[int, Part], without: dict[int, FlashmoeError | None]) -> None:
    """Raises why a part could not be written, where no rank has anything worse to tell."""
    errors = [error for error in without.values() if error is not None]
    codes = {part.report["exit_code"] for part in parts.values()}
    if errors and codes <= {0, EXIT_STOPPED}:
        raise errors[0]


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

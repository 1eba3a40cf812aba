"""A piece of work in a process of its own: what breaks a CUDA context, or crashes, costs only it.

The processes are forked off a server that has imported torch and has never touched a GPU: each
starts with a context of its own, and without the seconds that the import takes.  What torch and
Triton compile they keep in their caches on disk, which all processes share.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from flashmoe.bench.phases import Progress
from flashmoe.bench.speed import DeviceLost
from flashmoe.errors import FlashmoeError

T = TypeVar("T")
Work = Callable[[Progress], T]
"""Something to do, which must be picklable: a function of a module, or a partial of one."""

PATIENCE_S = 300.0
"""A process that has said nothing for so long hangs: no phase of a shape takes that long."""

_PR_SET_PDEATHSIG = 1
_END_S = 5.0


class Lost(Exception):
    """A process that ended, or was ended, without a result, in the phase ``during``."""

    def __init__(self, what: str, during: str) -> None:
        super().__init__(f"its process {what} during {during}")
        self.during = during


def apart(work: Work[T], progress: Progress, patience_s: float = PATIENCE_S) -> T:
    """``work(progress)``, done by a process of its own; it prints to stderr alone.

    Raises Lost where the process ends before it has answered, or is silent for ``patience_s``; and
    FlashmoeError or DeviceLost where the work does.
    """
    context = multiprocessing.get_context("forkserver")
    # torch alone: the server may stand in a folder that holds another flashmoe than this one.
    context.set_forkserver_preload(["torch"])
    ours, its = context.Pipe(duplex=False)
    process = context.Process(target=_do, args=(its, work))
    process.start()
    its.close()
    phase, answered = "starting", False
    try:
        while ours.poll(patience_s):
            what, value = ours.recv()
            answered = what != "progress"
            if what == "done":
                return value  # type: ignore[no-any-return]
            if what == "raised":
                raise value
            phase = value[0]
            progress(*value)
        raise Lost(f"said nothing for {patience_s:.0f} s", _bare(phase))
    except EOFError:
        process.join()
        raise Lost(_ended(process.exitcode), _bare(phase)) from None
    finally:
        # The GPU is the next one's when this returns.
        if answered:
            process.join(_END_S)
        process.kill()
        process.join()
        ours.close()


def _bare(phase: str) -> str:
    return phase.rpartition(": ")[2]


def _ended(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"was ended by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was ended by signal {-exit_code}"


def _do(end: Connection, work: Work[Any]) -> None:
    """The process: does the work, says what came of it, and ends."""
    # A Ctrl-C reaches the whole group; the parent ends us, once it has tidied up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Our parent is the server, which ends when the bench does, however that ends.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(2, 1)  # whatever a peer prints must not stand in the result

    def progress(phase: str, done: int, total: int) -> None:
        end.send(("progress", (phase, done, total)))

    try:
        answer = ("done", work(progress))
    except (FlashmoeError, DeviceLost) as exc:
        answer = ("raised", exc)
    with contextlib.suppress(BrokenPipeError):
        end.send(answer)

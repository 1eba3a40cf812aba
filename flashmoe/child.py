"""A PE as the launcher's child: ``python -m flashmoe.child FD``; nobody else starts this.

``FD`` is a socket to the launcher.  It brings the task, then one word, ``stop``; it carries back a
JSON object a line: progress, errors, and that the part is written.  Its end means that the launcher
is gone: the child stops, and is gone within ``LAST_S``, whatever it was at.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import json
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.errors import EXIT_STOPPED, FlashmoeError

if TYPE_CHECKING:
    from flashmoe.part import Part
    from flashmoe.pe import Ended, Pe

_PR_SET_PDEATHSIG = 1
LAST_S = 2.0


@dataclass(frozen=True)
class Task:
    """What a child is to do: the request, its place, and the descriptors it was born with."""

    request: Any
    place: Any
    board_fd: int
    part_fd: int
    transport: str
    parent: int


class Line:
    """The child's end of the socket."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._file = self._socket.makefile("rb")
        self._lock = threading.Lock()

    def task(self) -> Task:
        length = int.from_bytes(self._file.read(8), "little")
        task: Task = pickle.loads(self._file.read(length))
        return task

    def say(self, **what: Any) -> None:
        """One message; silent once the launcher is gone."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(what).encode() + b"\n")

    def watch(self) -> None:
        """Stops the main thread on ``stop``, and the process if the launcher goes away."""
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        with contextlib.suppress(OSError):
            for word in self._file:
                if word == b"bye\n":
                    return
                _thread.interrupt_main()
        _thread.interrupt_main()
        time.sleep(LAST_S)
        os._exit(1)


def _die_with(parent: int) -> None:
    """SIGTERM when the launcher ends, however it does."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)


def _wake_driver() -> None:
    """Starts the CUDA driver, and MPS's server with it, while the main thread loads torch.

    It makes no context, so it does not matter which GPU will be used; what fails here fails again
    where torch reports it.
    """
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuInit(0)


def main() -> None:
    """Runs one PE; the exit code is that of its part of the run."""
    line = Line(int(sys.argv[1]))
    task = line.task()
    _die_with(task.parent)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    code = EXIT_STOPPED
    try:
        line.watch()
        if task.transport != "host":
            threading.Thread(target=_wake_driver, daemon=True).start()
        code = _run(line, task)
    except KeyboardInterrupt:
        # It is ending; the word to stop may come once more, and is not to end it in another way.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    sys.stdout.flush()
    # No atexit handlers, no joining of threads: everything that matters has been handed over.
    os._exit(code)


def _run(line: Line, task: Task) -> int:
    from flashmoe.pe import Ended, raises, run_pe, strike
    from flashmoe.world.board import Board
    from flashmoe.world.rendezvous import JobFailed, rendezvous

    rank = task.place.rank
    signal.signal(signal.SIGUSR1, raises)

    def progress(phase: str, done: int, total: int) -> None:
        line.say(progress=[phase, done, total])

    part: Part | None = None
    code = 1
    try:
        strike(task.request, rank, "start")
        job = rendezvous(task.place)
        skew_clock(rank)
        board = Board(task.board_fd, task.place.world)
        try:
            pe = run_pe(task.request, job, board, progress, task.transport)
        finally:
            # The word to stop may come after another rank's abort has ended this one's run: then it
            # has nothing to end but what is being handed over.  SIGTERM still does.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        part, code = _gather(pe, line), pe.exit_code
    except Ended as ended:
        code = ended.pe.exit_code
        _say_failure(line, ended)
        try:
            part = _gather(ended.pe, line)
        except Exception as exc:  # what it failed of may have taken along what it had
            traceback.print_exception(exc)
    except JobFailed:
        return EXIT_STOPPED
    except FlashmoeError as exc:
        line.say(error=[exc.message, exc.hint, exc.exit_code])
        return exc.exit_code
    if part is not None:
        code = _hand_over(line, task, part) or code
    return code


def _hand_over(line: Line, task: Task, part: Part) -> int:
    """Writes the part; where the disk refuses it, says so and gives the exit code of that, which
    stands before how the run ended: of it nothing is left to be told."""
    from flashmoe.part import refused_by_disk, write_part

    out = task.request.out
    folder = Path(tempfile.gettempdir()) if out is None else out.absolute().parent
    try:
        with refused_by_disk(folder), os.fdopen(task.part_fd, "wb", closefd=False) as file:
            write_part(file, part)
    except FlashmoeError as exc:
        line.say(error=[exc.message, exc.hint, exc.exit_code])
        return exc.exit_code
    line.say(part=True)
    return 0


def _say_failure(line: Line, ended: Ended) -> None:
    """Why it failed: said before the part is gathered, which may fail as well."""
    cause, message = ended.cause, ended.pe.message
    if isinstance(cause, FlashmoeError):
        line.say(error=[cause.message, cause.hint, cause.exit_code])
    else:
        traceback.print_exception(cause)
        line.say(error=[message, "its traceback is above", 1], crash=message)


def _gather(pe: Pe, line: Line) -> Part:
    """What this PE hands over; fetching full rings from a GPU that others use takes seconds.

    Said first: by then nothing of it waits for another rank, and the launcher gives it the time.
    """
    line.say(writing=True)
    return pe.part()


def skew_clock(rank: int) -> None:
    """Makes this rank's clock wrong where a test asks for it: RANK:OFFSET_NS:DRIFT,..."""
    for entry in filter(None, os.environ.get("FLASHMOE_TEST_CLOCK", "").split(",")):
        which, offset, drift = entry.split(":")
        if int(which) == rank:
            from flashmoe.world.tiles import extension

            extension().skew_clock(int(offset), float(drift))


if __name__ == "__main__":
    main()

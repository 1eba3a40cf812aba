"""Starts a job's PEs as direct children, watches them, and makes one run of what they leave.

Nothing it uses has a name in a file system (the board, the parts, the heaps), but for the folder of
a private MPS, and a keeper tidies up should it be killed itself: whoever dies when, nothing is left
behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import flashmoe
from flashmoe.child import Task
from flashmoe.errors import EXIT_HANG, EXIT_STOPPED, FlashmoeError
from flashmoe.keeper import Keeper
from flashmoe.kernels import select
from flashmoe.merge import Outcome, conclude
from flashmoe.part import read_part
from flashmoe.pe import stopped_text
from flashmoe.session import Progress, Request, Result, choose_world, refuse_existing
from flashmoe.world import nvshmem
from flashmoe.world.base import DEADLINE_S
from flashmoe.world.board import Board
from flashmoe.world.processes import choose_transport, surroundings
from flashmoe.world.rendezvous import Place

Say = Callable[[str], None]

LOCALHOST = "127.0.0.1"

#: Those that a dead rank leaves waiting get so long to come to their waits, which the report names.
LINGER_S = 0.5
#: From the word to stop to SIGTERM, and on to SIGKILL; from then on nothing is waited for.
TERM_S, KILL_S = 1.5, 1.0
#: A PE that gathers or writes its part gets this long to end.
WRITE_S = 60.0


def run(request: Request, progress: Progress, say: Say) -> Result:
    """Runs ``request`` with a process a rank, and gives the result of all.

    ``say`` prints a line: what a PE prints comes with its rank before it.  Raises FlashmoeError as
    ``flashmoe.session.run`` does, and where a rank dies before anything ran.
    """
    refuse_existing(request)
    # Each PE asks torch itself; to import it here first would take as long as all of them do.
    world, why_world = choose_world(request.world, request.device, import_torch=False)
    if request.gpus is not None and world == "host":
        raise FlashmoeError(
            f"--gpus {request.gpus}: no GPU can be used here: {why_world or 'the world is host'}",
            "on CPUs: --world host --processes --ranks N",
            exit_code=5,
        )
    gpus = -(-request.ranks // request.ranks_per_gpu)
    transport, why_transport = choose_transport(
        request.transport, world, no_pointers=request.no_pointers, gpus=gpus
    )
    if world != "host":
        require_gpus(gpus)
    launch = Launch(request, transport, progress, say)
    try:
        outcome = launch.outcome()
        outcome.transport, outcome.why_transport = transport, why_transport
        return conclude(request, outcome, why_world, progress)
    finally:
        launch.close()


def require_gpus(count: int) -> None:
    """Raises FlashmoeError (exit code 5) where the ranks' ``count`` GPUs are not there."""
    for gpu in range(count):
        try:
            select(gpu)
        except FlashmoeError as exc:
            raise FlashmoeError(
                f"these ranks need {count} GPUs: {exc.message}",
                "several ranks share one with --gpus 1 --ranks-per-gpu N",
                exc.exit_code,
            ) from exc


class Child:
    """One PE's process, and the launcher's ends of what connects them."""

    def __init__(self, rank: int, task: Task, folder: Path | None, env: dict[str, str]) -> None:
        self.rank = rank
        self.part = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.line, theirs = socket.socketpair()
        fds = (theirs.fileno(), task.board_fd, self.part.fileno())
        self.process = subprocess.Popen(
            # The rank is for those who look with ps.
            [sys.executable, "-P", "-m", "flashmoe.child", str(theirs.fileno()), f"rank={rank}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=fds,
            env=env,
            start_new_session=True,  # Ctrl-C is the launcher's, which tells the children
        )
        theirs.close()
        data = pickle.dumps(replace(task, part_fd=self.part.fileno()))
        with contextlib.suppress(OSError):  # dead already: its end tells
            self.line.sendall(len(data).to_bytes(8, "little") + data)
        self.pidfd = os.pidfd_open(self.process.pid)
        self.code: int | None = None
        self.phase = (0, "starting", 0, 0)
        self.error: tuple[str, str, int] | None = None
        self.crash = ""  # the exception that nobody foresaw
        self.writing = False
        self.whole = False
        self.stopped_since: float | None = None  # by SIGSTOP
        self.sent: set[int] = set()  # signals of ours
        self._rest = {"line": b"", "out": b""}

    @property
    def out(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def read(self, which: str) -> list[bytes] | None:
        """The whole lines that came by ``line`` or ``out``; None at its end."""
        source = self.line if which == "line" else self.out
        try:
            data = os.read(source.fileno(), 1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            rest, self._rest[which] = self._rest[which], b""
            return [rest] if rest else None
        *lines, self._rest[which] = (self._rest[which] + data).split(b"\n")
        return lines

    def take(self, message: dict[str, Any]) -> None:
        """One message of the child's."""
        if "progress" in message:
            phase, done, total = message["progress"]
            number = self.phase[0] + (phase != self.phase[1])
            self.phase = (number, phase, done, total)
        if "error" in message and self.error is None:  # what comes after it may come of it
            self.error = tuple(message["error"])
        self.crash = message.get("crash", self.crash)
        self.writing = self.writing or "writing" in message
        self.whole = self.whole or "part" in message

    def stop(self) -> None:
        """Asks it to end: a launch is aborted, and what there is is kept."""
        self.sent.add(signal.SIGINT)  # as which the word reaches its main thread
        with contextlib.suppress(OSError):
            self.line.sendall(b"stop\n")

    def signal(self, number: int) -> None:
        self.sent.add(number)
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self.pidfd, number)

    def is_writing(self) -> bool:
        """Whether it gathers or writes its part."""
        return self.writing and not self.whole and not self.is_stopped()

    def is_stopped(self) -> bool:
        """Whether its process is stopped (SIGSTOP, a debugger)."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in ("T", "t")

    def ended(self) -> str:
        """How it ended, in words; its exit code must be known."""
        assert self.code is not None
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}"
        return f"exited with code {self.code}"

    def close(self) -> None:
        for thing in (self.line, self.out, self.part):
            thing.close()
        os.close(self.pidfd)


class Launch:
    """All PEs of a run, from start to the last one's end."""

    def __init__(self, request: Request, transport: str, progress: Progress, say: Say) -> None:
        self.request, self.progress, self.say = request, progress, say
        self.transport = transport
        self.deadline_s = request.deadline_s or DEADLINE_S
        self.keeper = Keeper()
        self.board = Board.make(request.ranks)
        self.gone: dict[int, str] = {}
        self.halted: list[int] = []
        self.flight: Any = None
        self.stopped = False
        self._store: Any = None
        self._stop_at = self._term_at = self._kill_at = float("inf")
        self._selector = selectors.DefaultSelector()
        self.children: list[Child] = []
        self._tidy_orders()
        self._around = contextlib.ExitStack()
        try:
            extra = self._around.enter_context(surroundings(transport, request, self.keeper))
            self._start(extra)
        except BaseException:
            self.close()
            raise

    def _tidy_orders(self) -> None:
        """What the keeper shall remove, should this process be killed: see ``RunWriter``."""
        pid, request = os.getpid(), self.request
        for out in filter(None, (request.out, request.hang_out)):
            path = out.absolute()
            self.keeper.order(remove=str(path.with_name(f".{path.name}.{pid}.part")))
            old = str(path.with_name(f".{path.name}.{pid}.old"))
            self.keeper.order(restore=[old, str(path)])
            self.keeper.order(remove=str(path.with_name(f".latest.{pid}")))
        if request.save_output is not None:
            path = request.save_output.absolute()
            self.keeper.order(remove=str(path.with_name(f".{path.name}.{pid}")))

    def _start(self, extra: dict[str, str]) -> None:
        request = self.request
        listener = socket.create_server((LOCALHOST, 0), backlog=256)
        env = child_environment(request.ranks) | extra
        folder = None if request.out is None else request.out.absolute().parent
        port = listener.getsockname()[1]
        self.progress(f"starting {request.ranks} processes", 0, 0)
        for rank in range(request.ranks):
            place = Place(rank, request.ranks, rank, request.ranks, 1, "flashmoe", LOCALHOST, port)
            task = Task(request, place, self.board.fd, -1, self.transport, os.getpid())
            child = Child(rank, task, folder, env)
            self.children.append(child)
            self.keeper.order(watch=child.process.pid)
            for which, source in (("line", child.line), ("out", child.out), ("end", child.pidfd)):
                self._selector.register(source, selectors.EVENT_READ, (child, which))
        # The children load torch while this process does.
        from torch.distributed import PrefixStore, TCPStore

        store = TCPStore(
            LOCALHOST, port, is_master=True, wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )  # fmt: skip
        self._store = PrefixStore("flashmoe", store)

    # ------------------------------------------------------------------------------ watching

    def outcome(self) -> Outcome:
        """Waits until every PE has ended, and gathers what they left."""
        while any(child.code is None for child in self.children):
            try:
                self._turn()
            except KeyboardInterrupt:
                if self.stopped:  # asked twice: at once
                    self._kill_at = 0.0
                self.stopped = True
                self.progress("stopping", 0, 0)
                self._fail("stopped by Ctrl-C")
                self._stop_at = 0.0
        self._drain()
        actors = max(int(self.board.header(c.rank)["actors"][0]) for c in self.children)
        if self.flight is None and actors:
            self.flight = self.board.flight(actors)
        parts = {}
        for child in self.children:
            part = read_part(child.part) if child.whole else None
            if part is not None:
                parts[child.rank] = part
        pids = {child.rank: child.process.pid for child in self.children}
        if not self.stopped:
            self._refuse_early_end(bool(actors))
        return Outcome(parts, self.gone, self.flight, self.stopped, pids, self.halted)

    def _refuse_early_end(self, built: bool) -> None:
        """Raises where a rank ended before the launches began: there is no result to speak of."""
        begun = built and any(
            bool((self.board.slots(child.rank)["epoch"] > 0).any()) for child in self.children
        )
        if self.gone and not begun:
            rank, how = next(iter(self.gone.items()))
            phase = self.children[rank].phase[1]
            raise FlashmoeError(
                f"rank {rank} is gone: {how} while {phase}, before any launch; "
                f"{self._others(rank)}",
                "its own lines, if it printed any, are above",
            )
        if self.gone or any(child.code == EXIT_HANG for child in self.children):
            return
        for child in self.children:
            if child.error is not None:
                message, hint, code = child.error
                raise FlashmoeError(f"rank {child.rank}: {message}", hint, code)

    def _others(self, rank: int) -> str:
        """What the other ranks were at, in words."""
        at: dict[str, list[str]] = {}
        for child in self.children:
            if child.rank != rank:
                at.setdefault(child.phase[1], []).append(str(child.rank))
        said = [
            f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)} at {phase}"
            for phase, ranks in at.items()
        ]
        return f"the others waited for it ({'; '.join(said)})"

    def _turn(self) -> None:
        """One round: what came in, and what is due."""
        for key, _ in self._selector.select(timeout=0.05):
            child, which = key.data
            if which != "end":
                self._read(child, which)
            elif child.code is not None:
                self._selector.unregister(key.fileobj)
        # Ctrl-C may come between any two steps: a child's end is asked for until it is known.
        for child in self._alive():
            child.code = child.process.poll()
            if child.code is not None:
                self._left(child)
        now = time.monotonic()
        self._end_stopped(now)
        if now > self._stop_at:
            self._stop_at = float("inf")
            self._snapshot()
            for child in self._alive():
                child.stop()
            self._term_at = min(self._term_at, now + TERM_S)
        if now > min(self._term_at, self._kill_at):
            kill = now > self._kill_at
            for child in self._alive():
                if kill or not child.is_writing():
                    child.signal(signal.SIGKILL if kill else signal.SIGTERM)
            self._term_at = float("inf")
            writing = any(child.is_writing() for child in self._alive())
            self._kill_at = now + (WRITE_S if writing else KILL_S)

    def _end_stopped(self, now: float) -> None:
        """One that is stopped when others have ended well has the time that a wait may last.

        Before that the others' own deadlines, in the store and in the kernel, see to it.
        """
        if not any(child.code == 0 for child in self.children):
            return
        for child in self._alive():
            if not child.is_stopped():
                child.stopped_since = None
                continue
            child.stopped_since = child.stopped_since or now
            if now - child.stopped_since > self.deadline_s:
                if not child.whole:
                    self.gone.setdefault(child.rank, "it was stopped, and not continued")
                child.signal(signal.SIGKILL)

    def _alive(self) -> list[Child]:
        return [child for child in self.children if child.code is None]

    def _read(self, child: Child, which: str) -> None:
        lines = child.read(which)
        if lines is None:
            self._selector.unregister(child.line if which == "line" else child.out)
            return
        for text in lines:
            if which == "out":
                self.say(f"[rank {child.rank}] {text.decode(errors='replace')}")
                continue
            child.take(json.loads(text))
        if which == "line" and not self.stopped:
            _, phase, done, total = min(c.phase for c in self.children)
            if phase != "starting":
                self.progress(phase, done, total)

    def _left(self, child: Child) -> None:
        """A child has ended: does that concern the others?"""
        while (lines := child.read("line")) is not None:
            for text in lines:
                child.take(json.loads(text))
        assert child.code is not None
        if child.code == 0 or self.stopped:
            return
        if child.code == EXIT_STOPPED:  # it may have ended before it could say so itself
            self.halted.append(child.rank)
            self._fail(stopped_text(child.rank))
        # One that a signal ended which we did not send was gone before we told it anything: a PE
        # on a GPU takes its time to go, and its neighbours under MPS may be quicker.
        told = self._term_at != float("inf") or self._kill_at != float("inf")
        ours = -child.code in child.sent if child.code < 0 else told
        # Killed or not, one that has handed over its part has done all that was wanted of it.
        died = child.code not in (EXIT_STOPPED, EXIT_HANG) and child.error is None
        died = died and not ours and not child.whole
        if died or child.crash:
            how = f"it failed with {child.crash}" if child.crash else child.ended()
            self.gone.setdefault(child.rank, how)
            self._fail(f"rank {child.rank} is gone: {how}")
        grace = LINGER_S
        if child.code == EXIT_HANG:
            # One that does not leave with the others is looked at first: see diagnosis._stopped.
            grace = min(max(LINGER_S, self.deadline_s / 4 + 0.2), 2.0)
        self._stop_at = min(self._stop_at, time.monotonic() + grace)

    def _snapshot(self) -> None:
        """Keeps the slots as they are before those that hang are made to leave."""
        hung = any(child.code == EXIT_HANG for child in self.children)
        actors = max(int(self.board.header(c.rank)["actors"][0]) for c in self.children)
        if hung and actors:
            self.flight = self.board.flight(actors)

    def _fail(self, reason: str) -> None:
        """Ends every wait in the store."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.compare_set("failed", "", reason)

    def _drain(self) -> None:
        """What the children printed last."""
        for child in self.children:
            os.set_blocking(child.out.fileno(), False)
            with contextlib.suppress(BlockingIOError):
                while (lines := child.read("out")) is not None:
                    for text in lines:
                        self.say(f"[rank {child.rank}] {text.decode(errors='replace')}")

    def close(self) -> None:
        """Ends what is still there, and everything else that this made."""
        for child in self._alive():
            child.signal(signal.SIGKILL)
            child.code = child.process.wait()
        for child in self.children:
            child.close()
        if self.transport == "nvshmem":
            nvshmem.tidy({child.process.pid for child in self.children})
        self._selector.close()
        self._store = None
        self._around.close()
        os.close(self.board.fd)
        self.keeper.done()


def child_environment(ranks: int) -> dict[str, str]:
    """The children's: this very flashmoe, and their share of the cores for torch."""
    env = dict(os.environ)
    place = str(Path(flashmoe.__file__).resolve().parents[1])
    paths = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p and p != place]
    env["PYTHONPATH"] = os.pathsep.join([place, *paths])
    cores = len(os.sched_getaffinity(0))
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    env["PYTHONUNBUFFERED"] = "1"
    return env

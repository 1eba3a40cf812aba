"""One PE: a process that runs one rank of a job, and leaves its part of the run.

Under our own launcher it is ``python -m flashmoe.child``, a direct child that is told everything
over one socket.  Under torchrun, srun or mpirun the command line itself becomes one.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmoe.errors import EXIT_HANG, EXIT_STOPPED, EXIT_WRONG, FlashmoeError
from flashmoe.part import Part
from flashmoe.session import Progress, Request, describe_device, engine_options, status_error
from flashmoe.world.base import DeviceLost, Launch, Status
from flashmoe.world.rendezvous import JobFailed

if TYPE_CHECKING:
    from flashmoe.inputs import Inputs
    from flashmoe.trace.align import Exchange
    from flashmoe.world.board import Board
    from flashmoe.world.processes import PeEngine
    from flashmoe.world.rendezvous import Job


@dataclass
class Pe:
    """One rank's run as it goes: what is known so far is what its part will hold."""

    request: Request
    job: Job
    inputs: Inputs | None = None
    engine: PeEngine | None = None
    launches: list[Launch] = field(default_factory=list)
    counts: list[np.ndarray] = field(default_factory=list)
    status: Status = Status.OK
    check: dict[str, Any] | None = None
    output: dict[str, np.ndarray] = field(default_factory=dict)
    exchanges: list[Exchange] = field(default_factory=list)
    nvlink: dict[str, Any] | None = None
    exit_code: int = 0
    message: str = "ok"
    interrupted: bool = False  # by a signal, and for no failure of another rank

    def part(self) -> Part:
        """Report and arrays of what there is; see ``flashmoe.merge`` for who reads it."""
        report: dict[str, Any] = {
            "rank": self.job.rank,
            "pid": os.getpid(),
            "exit_code": self.exit_code,
            "message": self.message,
            "interrupted": self.interrupted,
            "status": int(self.status),
            "launch_ms": [launch.elapsed_ms for launch in self.launches],
            "rows_needed": max((launch.rows_needed for launch in self.launches), default=0),
            "check": self.check,
            "nvlink": self.nvlink,
            "clock": {"start": None, "end": None},
        }
        arrays: dict[str, np.ndarray] = dict(self.output)
        if self.inputs is not None:
            report["inputs"] = {
                "name": self.inputs.name,
                "config": self.inputs.config.to_dict(),
                "tokens": list(self.inputs.tokens),
                "remarks": self.inputs.remarks,
                "shared_expert": self.inputs.shared is not None,
            }
        for name, exchange in zip(("start", "end"), self.exchanges, strict=False):
            report["clock"][name] = asdict(exchange)
        if self.counts:
            arrays["counts"] = np.stack(self.counts)
        if self.engine is not None:
            self._add_engine(self.engine, report, arrays)
        return Part(report, arrays)

    def _add_engine(
        self, engine: PeEngine, report: dict[str, Any], arrays: dict[str, np.ndarray]
    ) -> None:
        options, readable = engine.options, not (self.exit_code and engine.lost)
        report["engine"] = {
            "world": engine.world,
            "sms_per_rank": engine.sms_per_rank,
            "deadline_s": options.deadline_s,
            "first_deadline_s": options.first_s,
            "shape": engine.shape,
            "family": engine.family,
            "tiling": engine.tiling,
            "clock": asdict(engine.clock()) if self.request.traced else None,
        }
        if engine.world != "host":
            report["device"] = describe_device(options.device)
        arrays["flight"] = engine.flight()
        if not readable:
            return
        if self.status is Status.HANG or self.exit_code:
            arrays["counts_seen"] = engine.counts_seen()
            arrays["chunk_counts"] = engine.chunk_counts()
        if self.request.traced:
            from flashmoe.trace.rings import from_dump

            rings = from_dump(engine.rings())
            arrays["ring_headers"] = rings.headers
            for i, records in enumerate(rings.stored):
                arrays[f"ring{i}"] = records


def run_pe(request: Request, job: Job, board: Board, progress: Progress, transport: str) -> Pe:
    """Runs this process's rank from inputs to verdict; the failure goes into what is returned.

    Raises KeyboardInterrupt never: a PE that is stopped leaves a part that says so.  The engine is
    never closed: that is collective, so that a rank which is gone by then would be waited for with
    the result already there, and the process's end, which is near, frees all of it.
    """
    pe = Pe(request, job)
    try:
        _run(pe, board, progress, transport)
    except KeyboardInterrupt:
        pe.exit_code, pe.message = EXIT_STOPPED, "stopped"
        pe.status = Status.HOST_ABORT if pe.status is Status.OK else pe.status
        # One that is stopped because another failed finds that rank's reason there.
        reason = stopped_text(job.rank)
        with contextlib.suppress(FlashmoeError, KeyboardInterrupt):
            pe.interrupted = job.fail(reason) == reason
    except JobFailed as exc:
        # The rank that failed says why; this one only says that it ended for it.
        pe.exit_code, pe.message = EXIT_STOPPED, f"stopped: {exc.message}"
    except FlashmoeError as exc:
        pe.exit_code, pe.message = exc.exit_code, exc.message
        _tell(pe, exc)
        raise Ended(pe, exc) from exc
    except Exception as exc:
        if pe.engine is not None and pe.engine.lost:
            # Whatever it was at: the first who asked the GPU for something was told.
            lost = DeviceLost(exc)
            pe.exit_code, pe.message = lost.exit_code, lost.message
            _tell(pe, lost)
            raise Ended(pe, lost) from exc
        pe.exit_code, pe.message = EXIT_WRONG, f"{type(exc).__name__}: {exc}"
        _tell(pe, exc)
        raise Ended(pe, exc) from exc
    return pe


def stopped_text(rank: int) -> str:
    """How it is called that a signal ended a rank which nothing was wrong with."""
    return f"rank {rank} was stopped"


class Ended(Exception):
    """A PE that failed: ``pe`` holds what it had, ``cause`` why."""

    def __init__(self, pe: Pe, cause: Exception) -> None:
        super().__init__(str(cause))
        self.pe = pe
        self.cause = cause


def _tell(pe: Pe, exc: Exception) -> None:
    """The other ranks must not wait for this one: neither in the store nor in the kernel."""
    with contextlib.suppress(FlashmoeError):
        first = str(exc).partition("\n")[0] or type(exc).__name__
        pe.job.fail(f"rank {pe.job.rank} failed: {first}")


def _run(pe: Pe, board: Board, progress: Progress, transport: str) -> None:
    from flashmoe.inputs import prepare
    from flashmoe.world.peers import Peers
    from flashmoe.world.processes import builder

    request, job = pe.request, pe.job
    progress("preparing weights and tokens", 0, 0)
    gpu = job.place.local_rank // max(request.ranks_per_gpu, 1)
    device = "cpu" if transport == "host" else f"cuda:{gpu}"
    if transport != "host":
        from flashmoe.world.gpu_pe import require_device

        require_device(gpu)
    sharing = job.place.local_world if device == "cpu" else request.ranks_per_gpu
    pe.inputs = inputs = prepare(request, device=device, sharing=sharing)
    strike(request, job.rank, "joined")
    progress("building the engine", 0, 0)
    options = engine_options(request, gpu)
    pe.engine = engine = builder(transport)(
        inputs.config, inputs.weights, list(inputs.tokens), options, Peers(job, board)
    )
    engine.load([inputs.x[job.rank]])
    _compare_clocks(pe, board)
    _launch_all(pe, engine, progress)
    if pe.status is Status.HANG:
        pe.exit_code, pe.message = EXIT_HANG, "a wait passed its deadline"
        # Ranks that had left the launch before wait for this one in the store.
        job.fail(f"rank {job.rank}: {pe.message}")
        return
    if pe.status is Status.HOST_ABORT:
        pe.exit_code, pe.message = EXIT_STOPPED, "stopped"
        return
    if pe.status is not Status.OK:
        raise status_error(pe.launches[-1])
    _compare_clocks(pe, board)
    _judge(pe, engine, inputs, progress)


def _compare_clocks(pe: Pe, board: Board) -> None:
    from flashmoe.world.clocks import compare

    assert pe.engine is not None
    found = compare(pe.job, board, pe.engine.now_ns)
    if found is not None:
        pe.exchanges.append(found)


def _launch_all(pe: Pe, engine: PeEngine, progress: Progress) -> None:
    """Warm-up, then the measured launches; stops at the first that fails.

    NVLink's bytes are counted over both; where they are too few, over some launches more, but never
    of a traced run, whose rings these would fill.
    """
    from flashmoe.world.links import LinkBytes

    request = pe.request
    links = LinkBytes(pe.job, engine.options.device, engine.gpus)
    links.begin()
    with _struck(request, pe.job.rank):
        for i in range(request.warmup):
            progress("warm-up", i, request.warmup)
            if not _launch(pe, engine, measured=False):
                return
        if request.warmup:
            engine.reset_rings()
        for i in range(request.iterations):
            progress("running", i, request.iterations)
            if not _launch(pe, engine, measured=True):
                return
            pe.counts.append(engine.chunk_counts()[0].copy())
        more = links.more(
            request.warmup + request.iterations,
            engine.config,
            pe.counts[-1].sum(axis=0),
            pe.launches[-1].elapsed_ms,
            may_run=not request.traced,
        )
        for i in range(more):
            progress("counting NVLink's bytes", i, more)
            if not _launch(pe, engine, measured=False):
                return
    links.end()
    pe.nvlink = links.report


def _launch(pe: Pe, engine: PeEngine, *, measured: bool) -> bool:
    """One launch; whether it ended well.  One that did not is kept though nobody measures it."""
    launch = engine.launch()
    if measured or launch.status is not Status.OK:
        pe.launches.append(launch)
    if launch.status is not Status.OK:
        pe.status = launch.status
    return launch.status is Status.OK


def _judge(pe: Pe, engine: PeEngine, inputs: Inputs, progress: Progress) -> None:
    from flashmoe import verdict

    rank = pe.job.rank
    own = replace(inputs, x=[inputs.x[rank]], tokens=(inputs.tokens[rank],))
    outputs = engine.outputs()
    if pe.request.check:
        progress("checking against the float32 reference", 0, 0)
        pe.check = verdict.check(own, outputs, lambda *_: None)["ranks"][0]
    if pe.request.save_output is not None:
        import torch

        (y,) = verdict.with_shared(own, outputs)
        pe.output = {
            "y": y.cpu().view(torch.uint16).numpy(),
            "ids": outputs[0].ids.numpy(),
            "weights": outputs[0].weights.numpy(),
        }


def strike(request: Request, rank: int, point: str) -> None:
    """Does what an injected fault of the process asks for at this point: start, joined, kernel."""
    for fault in request.faults:
        if fault.rank == rank and fault.point == point:
            if fault.kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault.kind == "raises":
                raise Injected(f"injected at {point}")


@contextlib.contextmanager
def _struck(request: Request, rank: int) -> Iterator[None]:
    """A fault at the point ``kernel`` strikes ``seconds`` after the first launch has begun."""
    import threading

    mine = [f for f in request.faults if f.rank == rank and f.point == "kernel"]
    timers = [threading.Timer(f.seconds, _strike_later, (f.kind,)) for f in mine]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def _strike_later(kind: str) -> None:
    # An exception in this thread would be nobody's: the main thread raises it, in its launch.
    os.kill(os.getpid(), signal.SIGKILL if kind == "killed" else signal.SIGUSR1)


def raises(*_: object) -> None:
    """The handler of the signal by which ``raises`` strikes in the kernel."""
    raise Injected("injected at kernel")


class Injected(Exception):
    """What the fault ``raises`` raises."""

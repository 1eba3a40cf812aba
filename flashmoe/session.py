"""One run from request to saved result: pick a world, launch, check, gather, write; no printing.

The command line hands over a ``Request`` and a progress callback and draws the ``Result``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import runpy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe import gpu, saving
from flashmoe.errors import EXIT_HANG, EXIT_NO_GPU, EXIT_STOPPED, EXIT_WRONG, FlashmoeError
from flashmoe.world.base import (
    DEADLINE_S,
    PROCESS_FAULTS,
    EngineOptions,
    Fault,
    Launch,
    RingMode,
    Status,
)

if TYPE_CHECKING:
    import numpy as np

    from flashmoe.config import MoEConfig
    from flashmoe.inputs import Inputs
    from flashmoe.trace.diagnosis import HangReport
    from flashmoe.world.base import Engine, Routing

#: Called with the phase's name, steps done and steps in all (0, 0 where it has no steps).
Progress = Callable[[str, int, int], None]
Say = Callable[[str], None]

#: On the host engine, more arithmetic than this a launch is worth a word beforehand.
MUCH_FLOP = 10**11


@dataclass(frozen=True)
class Request:
    """What to run, where, and what to keep.

    ``config`` is None where ``checkpoint`` says it.  ``tokens`` is the T of each rank; with
    ``tokens_file`` it follows from the file.  ``world`` may be ``auto``.  ``out`` is the run
    directory; None keeps nothing unless the run hangs, and then ``hang_out`` is used.
    ``deadline_s`` None is ``DEADLINE_S``; the host engine adds the time of its arithmetic.

    ``processes``: each rank is a process of its own; with ``gpus``, ``ranks_per_gpu`` of them on
    each of so many GPUs, joined by ``transport`` (auto, ipc, nvshmem).  ``no_pointers``: rows and
    signals go by put-with-signal, though pointers reach.
    """

    name: str
    preset: str | None
    config: MoEConfig | None
    tokens: tuple[int, ...]
    ranks: int = 1
    world: str = "auto"
    sms_per_rank: int | None = None
    device: int = 0
    seed: int = 0
    skew: float = 0.0
    iterations: int = 1
    warmup: int = 1
    deadline_s: float | None = None
    traced: bool = False
    ring_capacity: int | None = None
    ring_mode: RingMode = "keep-first"
    check: bool = True
    checkpoint: Path | None = None
    layer: int | None = None
    dtype: str | None = None
    tokens_file: Path | None = None
    save_output: Path | None = None
    out: Path | None = None
    hang_out: Path | None = None
    force: bool = False
    faults: tuple[Fault, ...] = ()
    command: str = ""
    processes: bool = False
    gpus: int | None = None
    ranks_per_gpu: int = 1
    transport: str = "auto"
    no_pointers: bool = False


@dataclass
class Result:
    """What came of a run.  Times in ms; ``traffic`` is payload bytes [W, W], from row to column.

    ``check`` holds the verdicts on output and routing (None: not checked), ``device`` what NVML
    said after the last launch (None: no GPU), ``why_world`` why ``auto`` chose as it did.
    ``message`` says in a few words how it ended, ``unsaved`` why the output or the run that was
    asked for is not there.  ``processes`` tells of ranks that are processes:
    see ``world.processes`` in docs/trace-format.md, and there ``world.tiling``,
    ``world.topology`` and ``nvlink``.
    """

    name: str
    config: MoEConfig
    world: str
    why_world: str
    tokens: tuple[int, ...]
    sms_per_rank: int
    launch_ms: list[float]
    status: Status
    traffic: np.ndarray
    rows: np.ndarray
    shared_expert: bool
    remarks: list[str]
    check: dict[str, Any] | None = None
    device: dict[str, Any] | None = None
    clock: dict[str, Any] | None = None
    path: Path | None = None
    saved_output: Path | None = None
    hang: HangReport | None = None
    flight: np.ndarray | None = None
    exit_code: int = 0
    message: str = "ok"
    processes: dict[str, Any] | None = None
    tiling: dict[str, Any] | None = None
    topology: str = ""
    nvlink: dict[str, Any] | None = None
    unsaved: FlashmoeError | None = None

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """What cannot be written inside is said in ``unsaved``: a full disk costs no verdict."""
        try:
            yield
        except FlashmoeError as exc:
            self.unsaved = self.unsaved or exc
            if not self.exit_code:
                self.exit_code, self.message = exc.exit_code, exc.message


def choose_world(asked: str, device: int, import_torch: bool = True) -> tuple[str, str]:
    """The world to use and, where ``auto`` settled for the host engine, why.

    Without ``import_torch``, which takes seconds, torch is only looked at.  Raises FlashmoeError
    with exit code 5 where a GPU was asked for and none is usable.
    """
    if asked == "host":
        return "host", ""
    try:
        _require_gpu(device, import_torch)
    except FlashmoeError as exc:
        if asked == "local":
            raise
        return "host", exc.message
    return "local", ""


def _require_gpu(device: int, import_torch: bool) -> None:
    """Raises FlashmoeError (exit code 5) where the ``local`` world cannot run on GPU ``device``."""
    from flashmoe.kernels import select

    select(device)
    if import_torch:
        import torch

        usable = torch.cuda.is_available()
    else:
        usable = _torch_has_cuda()
    if not usable:
        raise FlashmoeError(
            "this torch is a CPU build, or sees no GPU",
            "install torch for CUDA: pip install torch; or run with --world host",
            exit_code=EXIT_NO_GPU,
        )


def _torch_has_cuda() -> bool:
    """Whether the torch that is installed was built for CUDA, by the file that says so."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    said = runpy.run_path(str(Path(found.origin).with_name("version.py")))
    return said.get("cuda") is not None


def flop(inputs: Inputs) -> int:
    """Floating-point operations of both GEMMs of one launch, all ranks together."""
    config = inputs.config
    rows = sum(inputs.tokens) * config.top_k
    return 2 * rows * config.hidden * (config.up_rows + config.intermediate)


def engine_options(request: Request, device: int) -> EngineOptions:
    """What a request says of how its engines run, on GPU ``device``."""
    return EngineOptions(
        ranks=request.ranks,
        sms_per_rank=request.sms_per_rank,
        traced=request.traced,
        deadline_s=request.deadline_s or DEADLINE_S,
        ring_capacity=request.ring_capacity,
        ring_mode=request.ring_mode,
        device=device,
        no_pointers=request.no_pointers,
        faults=tuple(f for f in request.faults if f.kind not in PROCESS_FAULTS),
    )


def build_engine(world: str, request: Request, inputs: Inputs) -> Engine:
    """The engine of ``world``, with weights loaded; raises FlashmoeError where it does not fit."""
    options = engine_options(request, request.device)
    if world == "host":
        from flashmoe.world.host import HostEngine

        return HostEngine(inputs.config, inputs.weights, list(inputs.tokens), options)
    from flashmoe.world.local import LocalEngine

    return LocalEngine(inputs.config, inputs.weights, list(inputs.tokens), options)


@contextlib.contextmanager
def _phase(progress: Progress, name: str) -> Iterator[None]:
    """One phase of the host: reported, and an NVTX range for those who watch with nsys."""
    import nvtx

    progress(name, 0, 0)
    with nvtx.annotate(name, domain="flashmoe"):
        yield


@dataclass
class Record:
    """What the launches leave: an entry a measured one, or the warm-up launch that failed."""

    launches: list[Launch] = field(default_factory=list)
    routings: list[Routing] = field(default_factory=list)
    status: Status = Status.OK


def _launch_all(engine: Engine, request: Request, record: Record, progress: Progress) -> None:
    """Warm-up, then the measured launches, into ``record``; stops at the first that fails."""
    with _phase(progress, "warm-up"):
        for i in range(request.warmup):
            progress("warm-up", i, request.warmup)
            launch = engine.launch()
            if launch.status is not Status.OK:
                record.launches.append(launch)
                record.status = launch.status
                return
        if request.warmup:
            engine.reset_rings()
    with _phase(progress, "running"):
        for i in range(request.iterations):
            progress("running", i, request.iterations)
            launch = engine.launch()
            record.launches.append(launch)
            if launch.status is not Status.OK:
                record.status = launch.status
                return
            record.routings.append(engine.routing())


def run(request: Request, progress: Progress, say: Say = print) -> Result:
    """Runs what ``request`` says; ``say`` prints a line that a rank's own process printed.

    Raises FlashmoeError for what can be known beforehand: bad shapes, too little memory, no GPU,
    an output that exists.  A wrong result or a hang is no exception: see ``Result.exit_code``.
    """
    from flashmoe.build_info import require_runner
    from flashmoe.inputs import prepare

    require_runner()
    if request.processes:
        from flashmoe import launcher

        return launcher.run(request, progress, say)
    refuse_existing(request)
    world, why_world = choose_world(request.world, request.device)
    with _phase(progress, "preparing weights and tokens"):
        inputs = prepare(request, device=f"cuda:{request.device}" if world == "local" else "cpu")
    with _phase(progress, f"building the {world} engine"):
        engine = build_engine(world, request, inputs)
    if world == "host" and flop(inputs) > MUCH_FLOP:
        tera = flop(inputs) / 1e12
        much = f"{tera:.1f} TFLOP a launch on CPU threads takes a while; -T makes it less"
        inputs.remarks.append(much)
        progress(much, 0, 0)
    record = Record()
    try:
        engine.load(inputs.x)
        try:
            _launch_all(engine, request, record, progress)
            result = _begun(request, engine, inputs, record, why_world)
            _judge(result, request, engine, inputs, record, progress)
        except BaseException as exc:
            # What the launches left so far is kept, and the failure goes on.
            with contextlib.suppress(Exception):
                _keep(exc, _begun(request, engine, inputs, record, why_world), request, engine,
                      inputs, record)  # fmt: skip
            raise
        out = request.out or (request.hang_out if result.hang is not None else None)
        if out is not None:
            with _phase(progress, "writing the run"), result.keeping():
                result.path = saving.save_run(out, request, engine, inputs, record, result)
        return result
    finally:
        engine.close()


def _begun(
    request: Request, engine: Engine, inputs: Inputs, record: Record, why_world: str
) -> Result:
    """What the launches left, not judged yet."""
    from flashmoe import verdict

    rows, traffic = verdict.traffic_of(record.routings[-1:], inputs.config, request.ranks)
    return Result(
        name=inputs.name,
        config=inputs.config,
        world=engine.world,
        why_world=why_world,
        tokens=inputs.tokens,
        sms_per_rank=engine.sms_per_rank,
        launch_ms=[x.elapsed_ms for x in record.launches],
        status=record.status,
        traffic=traffic,
        rows=rows,
        shared_expert=inputs.shared is not None,
        remarks=list(inputs.remarks),
        device=describe_device(request.device) if engine.world != "host" else None,
        clock=asdict(engine.clock()) if request.traced else None,
        tiling=engine.tiling,
        topology=saving.topology(engine.world, request.ranks),
    )


def describe_device(device: int) -> dict[str, Any]:
    """The GPU by torch, and what NVML says of it right after the last launch, where it answers."""
    import torch

    found = torch.cuda.get_device_properties(device)
    known = {
        "name": found.name,
        "cc": f"{found.major}.{found.minor}",
        "sms": found.multi_processor_count,
        "memory_total": found.total_memory,
    }
    return known | (gpu.snapshot(device) or {})


def _judge(
    result: Result,
    request: Request,
    engine: Engine,
    inputs: Inputs,
    record: Record,
    progress: Progress,
) -> None:
    """Holds the outputs against the reference and saves them, or says why the launch hung."""
    from flashmoe import verdict

    if record.status is Status.HANG:
        with _phase(progress, "diagnosing the hang"):
            result.flight = engine.flight()
            result.hang = verdict.diagnose_hang(engine, result.flight)
        result.exit_code, result.message = EXIT_HANG, "a wait passed its deadline"
        return
    if record.status is not Status.OK:
        raise status_error(record.launches[-1])
    outputs = engine.outputs()
    if request.check:
        with _phase(progress, "checking against the float32 reference"):
            result.check = verdict.check(inputs, outputs, progress)
        if not result.check["ok"]:
            result.exit_code, result.message = EXIT_WRONG, "wrong result"
    else:
        result.message = "ok, not checked"
    if request.save_output is not None:
        with _phase(progress, "writing the output"), result.keeping():
            result.saved_output = verdict.save_output(request, inputs, outputs)


def _keep(
    exc: BaseException,
    result: Result,
    request: Request,
    engine: Engine,
    inputs: Inputs,
    record: Record,
) -> None:
    """Saves a run that ``exc`` ended, where a run directory was asked for."""
    if request.out is None or not record.routings:
        return
    stopped = isinstance(exc, KeyboardInterrupt)
    result.exit_code = EXIT_STOPPED if stopped else getattr(exc, "exit_code", EXIT_WRONG)
    result.message = "interrupted" if stopped else str(exc).partition("\n")[0]
    saving.save_run(request.out, request, engine, inputs, record, result)


def refuse_existing(request: Request) -> None:
    """Says that an output cannot be written before the work, not after it."""
    if request.out is not None:
        from flashmoe.trace.rundir import refuse_existing

        refuse_existing(request.out, request.force)
    path = request.save_output
    if path is not None and (path.exists() or path.is_symlink()):
        if path.is_dir():
            raise FlashmoeError(f"{path} is a directory", "name a file", exit_code=2)
        if not request.force:
            raise FlashmoeError(
                f"{path} exists already",
                "choose another name, or replace it with -f",
                exit_code=2,
            )
    for path in (request.out, request.save_output):
        if path is not None and not path.absolute().parent.is_dir():
            raise FlashmoeError(
                f"there is no directory {path.absolute().parent}", "create it first", exit_code=2
            )


def status_error(launch: Launch) -> FlashmoeError:
    """A launch that ended by neither success nor hang, as an error."""
    if launch.status is Status.OVERFLOW:
        return FlashmoeError(
            f"the routed rows do not fit the pool: {launch.rows_needed} rows are needed",
            "use fewer tokens (-T) or more ranks (--ranks)",
        )
    if launch.status is Status.BAD_IDS:
        return FlashmoeError(
            "an expert id is out of range, or stands twice in one token",
            "give k distinct ids from 0 to E - 1 for each token",
        )
    return FlashmoeError("the launch was stopped from outside", "run it again")

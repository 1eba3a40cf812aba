"""What ``run`` and ``trace`` have in common: flags to a request, the run, the result as JSON."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import os
import shlex
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import typer

from flashmoe.config import MoEConfig
from flashmoe.session import Request, Result, run
from flashmoe.trace.links import link_figures
from flashmoe.trace.place import SUFFIX, run_path, runs_folder
from flashmoe.world.rendezvous import Place, find_place
from flashmoe_cli import request as parse
from flashmoe_cli.output import SCHEMA, emit, note, show_error, terminal
from flashmoe_cli.progress import Progress

_HELD = ".held"


def default_run_path(name: str) -> Path:
    """NAME-DATE-TIME.fmoe in the runs folder, with a number where that one is taken."""
    path = runs_folder() / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}{SUFFIX}"
    return next(p for p in _numbered(path) if not p.exists())


def _numbered(path: Path) -> Iterator[Path]:
    """``path``, then the same with -2, -3, ... before its suffix."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


@contextmanager
def _own_name(request: Request) -> Iterator[Request]:
    """The request, its default name changed where a trace that began in the same second has it.

    A hidden file beside it, locked by whoever comes first, holds a name until its run is written.
    Only then is it looked whether the run is there: a name that became free was used.
    """
    if request.out is None or request.out != request.hang_out:
        yield request
        return
    _sweep(request.out.parent)
    for path in _numbered(request.out):
        held = path.with_name(f".{path.name}{_HELD}")
        with ExitStack() as stack:
            try:
                stack.enter_context(_locked(held, os.O_CREAT | os.O_RDWR))
            except BlockingIOError:
                continue
            except OSError:  # a folder that cannot be written: the writer says so better
                yield request
                return
            stack.callback(held.unlink, missing_ok=True)
            if not path.exists():
                yield dataclasses.replace(request, out=path, hang_out=path)
                return


@contextmanager
def _locked(file: Path, flags: int) -> Iterator[None]:
    """The file, locked; it is free again when the process ends, however it does."""
    descriptor = os.open(file, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Files that hold a name for nobody any more: who was killed could not take them away."""
    for held in folder.glob(f".*{SUFFIX}{_HELD}"):
        with suppress(OSError), _locked(held, os.O_RDWR):
            held.unlink(missing_ok=True)


def make_request(options: dict[str, Any], *, traced: bool, place: Place | None = None) -> Request:
    """The request that a verb's options make; raises FlashmoeError (exit code 2) on nonsense.

    ``options`` are the parameters of ``run`` and ``trace`` by name; ``place`` is this process's
    among those that torchrun, srun or mpirun started.
    """
    get = options.get
    overrides = {
        name: getattr(get(name), "value", get(name))
        for name in ("hidden", "intermediate", "experts", "top_k", "activation", "dtype")
    }
    parse.checkpoint_args(get("checkpoint"), get("layer"), get("preset"), overrides)
    ranks, processes = parse.processes(options, place)
    checkpoint: Path | None = get("checkpoint")
    name: str
    config: MoEConfig | None
    if checkpoint is not None:
        name, config, default_tokens = f"{checkpoint.resolve().name}-layer{get('layer')}", None, 512
    else:
        name, config, default_tokens = parse.shape(get("preset"), overrides)
    tokens = parse.tokens_per_rank(get("tokens_per_rank"), ranks, default_tokens)
    if get("tokens_file") is not None and get("tokens_per_rank") is not None:
        raise parse.usage(
            "both -T and --tokens", "leave -T out: the file says how many tokens there are"
        )
    if get("tokens_file") is not None and options["skew"] > 0:
        raise parse.usage("both --skew and --tokens", "--skew shapes random tokens: leave it out")
    default = default_run_path(name)
    world, device = options["world"].value, get("device")
    if world == "auto" and device is not None:
        world = "local"  # who names a GPU is not served by the CPU
    return Request(
        name=name,
        preset=name if config is not None and name != "custom" else None,
        config=config,
        tokens=tokens,
        ranks=ranks,
        world=world,
        sms_per_rank=get("sms_per_rank"),
        device=device or 0,
        seed=options["seed"],
        skew=options["skew"],
        iterations=get("iterations") or (1 if traced else 5),
        warmup=1 if get("warmup") is None else options["warmup"],
        deadline_s=options["deadline"],
        traced=traced,
        ring_capacity=get("ring_capacity"),
        ring_mode=options["ring_mode"].value if traced else "keep-first",
        check=not options["no_check"],
        checkpoint=checkpoint,
        layer=get("layer"),
        dtype=overrides["dtype"],
        tokens_file=get("tokens_file"),
        save_output=get("save_output"),
        out=_named(get("output")) or (default if traced else None),
        hang_out=default,
        force=options["force"],
        faults=parse.faults(get("fault"), ranks, processes["processes"], _experts(options, config)),
        command=shlex.join(["flashmoe", *sys.argv[1:]]),
        **processes,
    )


def _experts(options: dict[str, Any], config: MoEConfig | None) -> int | None:
    """How many experts the layer has, where a fault may name one; a checkpoint is asked."""
    if config is None and options.get("fault"):
        from flashmoe.checkpoint import layer_config

        config = layer_config(options["checkpoint"], options["layer"], "bf16")
    return None if config is None else config.experts


def _named(output: Path | None) -> Path | None:
    return None if output is None else run_path(output)


def record(options: dict[str, Any], *, traced: bool) -> Result:
    """Runs what the options say, with progress on stderr.

    SIGTERM, by which batch systems end a job, stops it as Ctrl-C does: what had run is saved.
    """
    place = find_place(os.environ)
    request = make_request(options, traced=traced, place=place)
    if options.get("dry_run"):
        from flashmoe_cli.render.dry_run import dry_run_json, dry_run_lines

        verb, argv = "trace" if traced else "run", sys.argv[1:]
        as_json = options["as_json"]
        if as_json:
            emit(dry_run_json(verb, request, argv))
        else:
            emit(dry_run_lines(request, argv, terminal()))
        raise typer.Exit(0)
    with ExitStack() as held:
        if place is None or place.rank == 0:
            request = held.enter_context(_own_name(request))
        if place is not None:
            return _join(request, place, options)
        return _run(request, options)


def _run(request: Request, options: dict[str, Any]) -> Result:
    """The run, by this process or by those that it starts."""
    before = _saved(request)
    with Progress(quiet=options["quiet"] or options["as_json"]) as progress, _stopped_by_sigterm():
        try:
            return run(request, progress, progress.say)
        except BaseException:
            if _saved(request) != before and not options["as_json"]:
                note(f"saved what had run: {request.out}")
            raise


def _join(request: Request, place: Place, options: dict[str, Any]) -> Result:
    """This process as one of those that another launcher started; only rank 0 says anything."""
    from flashmoe.joined import join

    quiet = options["quiet"] or options["as_json"] or place.rank > 0
    with Progress(quiet=quiet) as progress, _stopped_by_sigterm():
        result, code = join(request, place, progress)
    if result is None:
        raise typer.Exit(code)
    return result


def _saved(request: Request) -> int | None:
    """When the request's run directory was written; None where there is none."""
    try:
        return None if request.out is None else (request.out / "run.json").stat().st_mtime_ns
    except OSError:
        return None


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def result_json(verb: str, result: Result) -> dict[str, Any]:
    """A result as the object that ``--json`` prints."""
    times = result.launch_ms
    return {
        "schema": SCHEMA,
        "verb": verb,
        "name": result.name,
        "world": result.world,
        "why_world": result.why_world,
        "topology": result.topology,
        "config": result.config.to_dict(),
        "ranks": len(result.tokens),
        "tokens": list(result.tokens),
        "sms_per_rank": result.sms_per_rank,
        "launch_ms": times,
        "time_ms": {"median": statistics.median(times), "min": min(times), "max": max(times)}
        if times
        else None,
        "time_source": time_source(result.world),
        "check": result.check,
        "payload_bytes": result.traffic.tolist(),
        "nvlink": link_figures(result.nvlink),
        "rows_per_expert": result.rows.tolist(),
        "shared_expert": "added by torch, outside the kernel" if result.shared_expert else None,
        "device": result.device,
        "clock": result.clock,
        "processes": result.processes,
        "run": None if result.path is None else str(result.path),
        "saved_output": None if result.saved_output is None else str(result.saved_output),
        "unsaved": None if result.unsaved is None else result.unsaved.message,
        "hang": None if result.hang is None else result.hang.as_dict(),
        "status": {"code": result.exit_code, "message": result.message},
    }


def end(result: Result, as_json: bool) -> None:
    """Ends a verb whose result has been printed: says what is not saved, and with which code."""
    unsaved = result.unsaved
    if unsaved is not None and not as_json:
        show_error(unsaved.message, unsaved.hint, unsaved.exit_code, as_json=False)
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def time_source(world: str) -> str:
    """By what a launch was timed."""
    return "the host's wall clock" if world == "host" else "CUDA events"

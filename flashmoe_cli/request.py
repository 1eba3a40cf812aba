"""From flags to a request: a preset or a checkpoint, its overrides, tokens per rank, faults."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from flashmoe.config import MoEConfig
from flashmoe.digits import whole_number
from flashmoe.errors import FlashmoeError
from flashmoe.presets import preset
from flashmoe.world.base import Fault
from flashmoe.world.rendezvous import Place

_SHAPE_FLAGS = ("hidden", "intermediate", "experts", "top_k")
DEFAULT_PRESET = "tiny"


def usage(message: str, hint: str) -> FlashmoeError:
    """A misuse of the command line, as an error with exit code 2."""
    return FlashmoeError(message, hint, exit_code=2)


def shape(name: str | None, overrides: dict[str, Any]) -> tuple[str, MoEConfig, int]:
    """The layer to run: (its name, its configuration, default tokens per rank).

    ``overrides`` are the shape flags, None where not given.  They change the preset; without a
    preset, all four sizes together make a shape of their own, named ``custom``.
    """
    given = {k: v for k, v in overrides.items() if v is not None}
    if name is None and all(k in given for k in _SHAPE_FLAGS):
        config = MoEConfig(**given)
        config.validate()
        return "custom", config, 64
    if name is None and any(k in given for k in _SHAPE_FLAGS):
        lacking = [f"--{k.replace('_', '-')}" for k in _SHAPE_FLAGS if k not in given]
        raise usage(
            "a shape without a preset needs all four sizes",
            f"add {' '.join(lacking)}, or name a preset to change: flashmoe presets lists them",
        )
    found = preset(name or DEFAULT_PRESET)
    config = dataclasses.replace(found.config, **given)
    config.validate()
    return name or DEFAULT_PRESET, config, found.tokens


def tokens_per_rank(text: str | None, ranks: int, default: int) -> tuple[int, ...]:
    """``-T`` for each rank: one number for all, or a list with one number a rank."""
    if text is None:
        return (default,) * ranks
    found = [whole_number(part) for part in text.split(",")]
    numbers = tuple(n for n in found if n is not None)
    if len(numbers) < len(found):
        raise usage(f"-T {text} is not a number of tokens", "use -T 512, or -T 512,0,64 by rank")
    if len(numbers) == 1:
        return numbers * ranks
    if len(numbers) != ranks:
        raise usage(
            f"-T lists {len(numbers)} ranks, but there are {ranks}",
            f"give one number for all, or use --ranks {len(numbers)}",
        )
    return numbers


def processes(options: dict[str, Any], place: Place | None = None) -> tuple[int, dict[str, Any]]:
    """The number of ranks, and the request's fields about ranks that are processes.

    ``--gpus N`` with ``--ranks-per-gpu R`` are N x R processes.  ``place`` is this process's, where
    torchrun, srun or mpirun started it as one of several: then they say how many there are.
    """
    ranks: int | None = options.get("ranks")
    if place is not None:
        if ranks is not None and ranks != place.world:
            raise usage(
                f"--ranks {ranks}, but {place.by} started {place.world} processes",
                "leave --ranks out",
            )
        ranks, options = place.world, options | {"processes": True, "gpus": None}
    gpus: int | None = options.get("gpus")
    each: int | None = options.get("ranks_per_gpu")
    wanted = bool(options.get("processes")) or gpus is not None
    if each is not None and gpus is None:
        raise usage("--ranks-per-gpu without --gpus", "say how many GPUs: --gpus 1")
    if gpus is not None:
        number = gpus * (each or 1)
        if ranks is not None and ranks != number:
            raise usage(
                f"--ranks {ranks}, but --gpus {gpus} x {each or 1} ranks a GPU make {number}",
                "leave --ranks out",
            )
        ranks = number
    device: int | None = options.get("device")
    if device is not None and wanted:
        raise usage(
            f"--device {device} names one GPU, and ranks that are processes take GPUs by their "
            "numbers, from 0",
            f"leave --device out, and choose GPUs by CUDA_VISIBLE_DEVICES={device}",
        )
    transport = getattr(options.get("transport"), "value", None) or "auto"
    if transport != "auto" and not wanted:
        raise usage(
            f"--transport {transport} joins processes, and the ranks are to be none",
            "add --gpus N",
        )
    fields = {
        "processes": wanted,
        "gpus": gpus,
        "ranks_per_gpu": each or 1,
        "transport": transport,
        "no_pointers": bool(options.get("no_pointers")),
    }
    return ranks or 1, fields


def faults(
    specs: list[str] | None,
    ranks: int,
    in_processes: bool = False,
    experts: int | None = None,
) -> tuple[Fault, ...]:
    """The faults that ``--fault`` asks for, in a layer of ``experts`` (None: not known yet)."""
    found = tuple(_fault(spec, ranks, experts) for spec in specs or ())
    for fault in found:
        if fault.point and not in_processes:
            raise usage(
                f"--fault {fault.kind} strikes a rank's process, and ranks are no processes here",
                "add --processes",
            )
    return found


#: A fault that takes as long as this never ends for whoever waits.
_MOST_SECONDS = 3600
_POINTS = ("start", "joined", "kernel")


def _fault(spec: str, ranks: int, experts: int | None) -> Fault:
    kind, *rest = spec.split(":")
    fields = {
        "never-starts": ("rank",),
        "lost-signal": ("rank", "expert"),
        "wrong-count": ("rank", "peer", "expert"),
        "slow": ("rank", "seconds"),
        "killed": ("rank", "point"),
        "raises": ("rank", "point"),
    }.get(kind)
    if fields is None:
        raise usage(
            f"no fault '{kind}'",
            "use never-starts, lost-signal, wrong-count, slow, killed or raises; see --help",
        )
    form = ":".join((kind, *(f.upper() for f in fields)))
    point = ""
    if "point" in fields:
        # At the kernel, how long after its begin may follow.
        point, fields = (rest.pop(1) if len(rest) > 1 else ""), fields[:1]
        if point == "kernel" and len(rest) == 2:
            fields = ("rank", "seconds")
        if point not in _POINTS:
            raise usage(f"--fault {spec}: no point '{point}'", "it is start, joined or kernel")
    if len(rest) != len(fields):
        raise usage(f"--fault {spec} is incomplete", f"write it as {form}")
    try:
        values = {
            f: float(v) if f == "seconds" else int(v) for f, v in zip(fields, rest, strict=True)
        }
    except ValueError as exc:
        raise usage(
            f"--fault {spec} has something that is no number", f"write it as {form}"
        ) from exc
    for field in ("rank", "peer"):
        if not 0 <= values.get(field, 0) < ranks:
            raise usage(
                f"--fault {spec}: there is no rank {values[field]}",
                f"ranks are 0 to {ranks - 1}",
            )
    if not 0 <= values.get("expert", 0) < (math.inf if experts is None else experts):
        there = "" if experts is None else f" to {experts - 1}"
        raise usage(
            f"--fault {spec}: there is no expert {values['expert']}",
            f"experts are 0{there or ' and up'}",
        )
    if not 0 <= values.get("seconds", 0) < _MOST_SECONDS:
        raise usage(
            f"--fault {spec}: {values['seconds']:g} s is no time to wait",
            f"seconds are from 0 to below {_MOST_SECONDS}",
        )
    return Fault(kind, **values, point=point)  # type: ignore[arg-type]


def checkpoint_args(
    folder: Path | None, layer: int | None, preset_name: str | None, overrides: dict[str, Any]
) -> None:
    """Refuses flags that contradict ``--checkpoint``."""
    if folder is None:
        if layer is not None:
            raise usage("--layer without --checkpoint", "name the checkpoint with --checkpoint DIR")
        return
    if layer is None:
        raise usage("--checkpoint without --layer", "name the layer with --layer N, from 0")
    if preset_name is not None:
        raise usage(
            f"both the preset {preset_name} and --checkpoint",
            "leave the preset out: the checkpoint says its shape",
        )
    fixed = [
        f"--{k.replace('_', '-')}" for k, v in overrides.items() if v is not None and k != "dtype"
    ]
    if fixed:
        raise usage(f"{fixed[0]} with --checkpoint", "leave it out: the checkpoint says its shape")

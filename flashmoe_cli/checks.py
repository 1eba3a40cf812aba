"""What ``flashmoe doctor`` looks at: one function a subject, each giving ok, warn or fail."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from flashmoe.errors import FlashmoeError

State = Literal["ok", "warn", "fail"]

_MIN_PYTHON = (3, 11)
_ROOMY = 4e9


@dataclass(frozen=True)
class Check:
    """One line of the doctor: what was looked at, how it is, and what to do where it is not ok."""

    name: str
    state: State
    found: str
    remedy: str = ""


def all_checks(device: int = 0) -> Iterator[Check]:
    """Every check, one after the other; a check that itself breaks is a failure, not a crash."""
    from flashmoe.gpu import snapshot
    from flashmoe_cli import gpu_checks

    seen = snapshot(device)
    for name, check in (
        ("python", _python),
        ("platform", _platform),
        ("flashmoe", _flashmoe),
        ("host engine", _host_engine),
        ("GPU kernels", _kernels),
        ("torch", lambda: _torch(seen)),
        ("driver", _driver),
        ("GPU", lambda: _gpu(seen, device)),
        ("NVML", lambda: _nvml(seen)),
        ("GPU memory", lambda: _gpu_memory(seen)),
        ("co-residency", lambda: gpu_checks.residency(device)),
        ("P2P", gpu_checks.p2p),
        ("NVLink", lambda: gpu_checks.nvlink(device)),
        ("MPS", lambda: gpu_checks.mps(device)),
        ("MIG", lambda: gpu_checks.mig(device)),
        ("NVSHMEM", gpu_checks.nvshmem),
        ("memory", _memory),
        ("disk", _disk),
        ("terminal", _terminal),
    ):
        yield from _guarded(name, check)


def _guarded(name: str, check: Callable[[], Check | None]) -> Iterator[Check]:
    try:
        found = check()
    except Exception as exc:  # the doctor must get to its last line
        yield Check(
            name, "fail", f"{type(exc).__name__}: {exc}", "report this with the whole output"
        )
        return
    if found is not None:
        yield found


def _python() -> Check:
    version = platform.python_version()
    if sys.version_info < _MIN_PYTHON:
        return Check("python", "fail", version, "install Python 3.11 or newer")
    return Check("python", "ok", version)


def _platform() -> Check:
    found = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        return Check("platform", "ok", found)
    return Check("platform", "warn", found, "this machine reads runs; recording needs Linux x86_64")


def _flashmoe() -> Check:
    from flashmoe.build_info import build_info

    info = build_info()
    if info.built is None:
        return Check(
            "flashmoe", "warn", f"{info.version}, a source tree not built", "run: pip install ."
        )
    return Check("flashmoe", "ok", f"{info.version}, commit {info.revision}, built {info.built}")


def _host_engine() -> Check:
    from flashmoe.build_info import build_info

    why = build_info().why_no_host_engine
    if why:
        return Check(
            "host engine", "fail", why, "install a C++ compiler (g++), then pip install . again"
        )
    return Check("host engine", "ok", "built in")


def _kernels() -> Check:
    from flashmoe.build_info import build_info

    info = build_info()
    if not info.cubins:
        return Check(
            "GPU kernels",
            "warn",
            f"none: {info.why_no_cubins}",
            "only a GPU needs them; install again without FLASHMOE_SKIP_CUDA",
        )
    return Check(
        "GPU kernels", "ok", ", ".join(f"{c.kernel} {c.flavour} {c.arch}" for c in info.cubins)
    )


def _torch(seen: dict[str, Any] | None) -> Check:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return Check(
            "torch", "fail", "not installed", "pip install torch; reading runs works without"
        )
    import torch

    if torch.version.cuda is None:
        found = f"{version}, CPU build: runs on the host engine only"
        if seen is None:
            return Check("torch", "ok", found)
        return Check("torch", "warn", found, "install torch for CUDA to run on this machine's GPU")
    return Check("torch", "ok", f"{version}, CUDA {torch.version.cuda}")


def _driver() -> Check:
    from flashmoe.kernels import check_driver, driver_api_version

    try:
        api = driver_api_version()
        check_driver(api)
    except FlashmoeError as exc:
        return Check("driver", "warn", exc.message, exc.hint)
    return Check("driver", "ok", f"speaks CUDA {api // 1000}.{api % 1000 // 10}")


def _gpu(seen: dict[str, Any] | None, device: int) -> Check:
    from flashmoe.kernels import select

    try:
        cubin = select(device)
    except FlashmoeError as exc:
        return Check("GPU", "warn", exc.message, exc.hint)
    name = seen["name"] if seen else f"GPU {device}"
    capability = seen["cc"] if seen else cubin.arch
    return Check("GPU", "ok", f"{name}, compute capability {capability}, runs {cubin.file}")


def _nvml(seen: dict[str, Any] | None) -> Check:
    if seen is None:
        return Check(
            "NVML", "warn", "does not answer", "without a GPU that is expected; else see nvidia-smi"
        )
    found = (
        f"driver {seen['driver']}, SM {seen['sm_clock_mhz']} of {seen['max_sm_clock_mhz']} MHz, "
        f"{seen['power_w']} W, {seen['temperature_c']} C"
    )
    slowed = [r for r in seen["throttle"] if r != "applications clocks setting"]
    if slowed:
        return Check("NVML", "warn", f"{found}; slowed by {', '.join(slowed)}", "times will vary")
    return Check("NVML", "ok", found)


def _gpu_memory(seen: dict[str, Any] | None) -> Check | None:
    if seen is None or not seen["memory_total"]:
        return None
    free, total = seen["memory_free"], seen["memory_total"]
    found = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if free < total / 2:
        return Check("GPU memory", "warn", found, "another process holds it: see nvidia-smi")
    return Check("GPU memory", "ok", found)


def _memory() -> Check | None:
    from flashmoe.inputs import free_memory

    free = free_memory("cpu")
    if free is None:
        return None
    if free < _ROOMY:
        return Check("memory", "warn", f"{free / 1e9:.1f} GB free", "large presets will not fit")
    return Check("memory", "ok", f"{free / 1e9:.1f} GB free")


def _disk() -> Check:
    from flashmoe.trace.place import runs_folder

    folder = runs_folder()
    if not folder.is_dir():
        return Check(
            "disk", "fail", f"FLASHMOE_RUNS is {folder}, no directory", f"mkdir -p {folder}"
        )
    if not os.access(folder, os.W_OK):
        return Check(
            "disk", "fail", f"{folder} cannot be written", "set FLASHMOE_RUNS to one that can"
        )
    free = shutil.disk_usage(folder).free
    state: State = "ok" if free > 1e9 else "warn"
    return Check(
        "disk",
        state,
        f"{free / 1e9:.1f} GB free for runs in {folder.resolve()}",
        "" if state == "ok" else "a traced run takes up to some hundred MB",
    )


def _terminal() -> Check:
    from flashmoe_cli.output import terminal

    where = terminal()
    colour = "colour" if where.colour else "no colour (letters stand for states)"
    signs = "unicode" if where.unicode else "ASCII only"
    found = f"{where.width} columns, {colour}, {signs}"
    if where.width < 80:
        return Check("terminal", "warn", found, "a timeline wants 80 columns or more")
    return Check("terminal", "ok", found)

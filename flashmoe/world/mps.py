"""A private CUDA MPS, under which the processes of one GPU make progress together.

Without one a GPU gives each process a slice of time to itself, and what one rank waits for in the
other's kernel comes slices later, or never where both wait.  The control daemon is started for one
job, in a directory of its own, and ends with it; other daemons on the machine are not touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flashmoe.errors import EXIT_NO_GPU, FlashmoeError

if TYPE_CHECKING:
    from flashmoe.keeper import Keeper

CONTROL = "nvidia-cuda-mps-control"

FOLDERS = ("/usr/bin", "/usr/local/nvidia/bin", "/usr/local/cuda/bin", "/usr/lib/nvidia/bin")
"""Where drivers put it when it is not on PATH; beside the driver's own files is looked at first."""

_SHARE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
_START_S = 10.0
_END_S = 5.0

_QUIT = "quit -t 1"
"""Servers are not given longer for clients that do not go: all of ours are gone by then."""

_NAME = "nvidia-cuda-mps"  # of daemon and server, as far as /proc shows it


def find_control(folders: tuple[str, ...] | None = None) -> Path:
    """MPS's control program, on PATH, beside the driver's files or in ``folders`` (FOLDERS).

    Raises FlashmoeError (exit code 5) that says where it was looked for.
    """
    on_path = shutil.which(CONTROL)
    if on_path is not None:
        return Path(on_path)
    places = dict.fromkeys([*_beside_driver(), *(FOLDERS if folders is None else folders)])
    for place in places:
        found = Path(place, CONTROL)
        if os.access(found, os.X_OK):
            return found
    raise FlashmoeError(
        f"several ranks on one GPU need CUDA MPS, and {CONTROL} is neither on PATH nor in "
        f"{', '.join(places)}",
        "install the driver's MPS programs; or virtual ranks in one process: --world local "
        "--ranks N",
        EXIT_NO_GPU,
    )


def _beside_driver() -> list[str]:
    """Folders of programs by the driver's own program and by its library, where it is loaded."""
    smi = shutil.which("nvidia-smi")
    found = [os.path.dirname(os.path.realpath(smi))] if smi else []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            if "/libcuda.so" in line:
                library = Path(line[line.index("/") :])
                found += [str(folder / "bin") for folder in list(library.parents)[1:-1]]
                found.append(str(library.parent))
    return found


@contextlib.contextmanager
def private_mps(keeper: Keeper) -> Iterator[dict[str, str]]:
    """A control daemon for the processes of each GPU; gives its clients' environment.

    When the block is left, however that is, daemon and directory are gone; should this process be
    killed first, ``keeper`` sees to it.  Raises FlashmoeError where there is no MPS, or it does not
    start.
    """
    control = find_control()
    folder = Path(tempfile.mkdtemp(prefix="flashmoe-mps-"))
    daemon = {
        "CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"),
        "CUDA_MPS_LOG_DIRECTORY": str(folder / "log"),
    }
    # In this order, and before there is a daemon: to end none does no harm.
    keeper.order(run=["sh", "-c", f"echo {_QUIT} | '{control}'"], env=daemon)
    keeper.order(remove=str(folder))
    try:
        for name in daemon.values():
            Path(name).mkdir()
        _start(control, daemon)
        try:
            # Each kernel's grid is its share of the SMs, and no SM holds two of its CTAs.  MPS's
            # own shares would keep kernels that wait for each other from running at once (measured
            # on an H100 with 50 % each).
            yield {**daemon, _SHARE: "100", "PATH": _path_with(control)}
        finally:
            _end(control, daemon)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _path_with(control: Path) -> str:
    """PATH for the clients, of whom NVSHMEM asks the control program by its name."""
    path = os.environ.get("PATH", os.defpath)
    found = shutil.which(control.name, path=path)
    return path if found else f"{path}{os.pathsep}{control.parent}"


def _start(control: Path, daemon: dict[str, str]) -> None:
    try:
        # Its children keep what it writes to open, so nothing here waits for their end.
        done = subprocess.run(
            [control, "-d"],
            env=_environment() | daemon,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_START_S,
            check=False,
        )
        why = "" if done.returncode == 0 else f"exit code {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as exc:
        why = str(exc)
    if why:
        log = Path(daemon["CUDA_MPS_LOG_DIRECTORY"], "control.log")
        said = log.read_text(errors="replace").strip() if log.is_file() else ""
        last = said.splitlines()[-1] if said else "its log is empty"
        raise FlashmoeError(
            f"CUDA MPS does not start ({why}): {last}",
            "see `flashmoe doctor`; or virtual ranks in one process: --world local --ranks N",
        )


def _environment() -> dict[str, str]:
    """The daemon's: clients choose among all GPUs, since one that shows a part renumbers it."""
    ours = ("CUDA_VISIBLE_DEVICES", _SHARE)
    return {name: value for name, value in os.environ.items() if name not in ours}


def _end(control: Path, daemon: dict[str, str]) -> None:
    """Tells the daemon to quit, and waits until it has; kills it, or servers, where they stay."""
    pid = _pid(daemon)
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            [control],
            input=f"{_QUIT}\n".encode(),
            env=os.environ | daemon,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_END_S,
            check=False,
        )
    until = time.monotonic() + _END_S
    while (left := _alive(pid, daemon)) and time.monotonic() < until:
        time.sleep(0.02)
    for process in left:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)


def _alive(pid: int | None, daemon: dict[str, str]) -> list[int]:
    """The daemon, and what serves this very MPS: it has its pipe directory in its environment."""
    ours = f"CUDA_MPS_PIPE_DIRECTORY={daemon['CUDA_MPS_PIPE_DIRECTORY']}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it has just ended, or is another user's
            name, _, rest = (entry / "stat").read_text().rpartition(")")
            if rest.split()[0] == "Z" or not (_NAME in name or entry.name == str(pid)):
                continue
            if ours in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def _pid(daemon: dict[str, str]) -> int | None:
    """The daemon's process, as it says itself in its pipe directory."""
    try:
        return int(Path(daemon["CUDA_MPS_PIPE_DIRECTORY"], f"{CONTROL}.pid").read_text())
    except (OSError, ValueError):
        return None

"""The private MPS, with a control program that does what NVIDIA's does as far as we see it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flashmoe.errors import FlashmoeError
from flashmoe.keeper import Keeper
from flashmoe.world import mps

# -d: a daemon, whose number is in the pipe directory.  quit on stdin: it ends, unless it is deaf.
CONTROL = """#!/bin/sh
pid="$CUDA_MPS_PIPE_DIRECTORY/nvidia-cuda-mps-control.pid"
if [ "$1" = -d ]; then
  [ -n "$FAKE_FAILS" ] && { echo "$FAKE_FAILS" >"$CUDA_MPS_LOG_DIRECTORY/control.log"; exit 3; }
  sleep 600 </dev/null >/dev/null 2>&1 &
  echo $! >"$pid"
  exit 0
fi
read command more
[ "$command" = quit ] && [ -z "$FAKE_DEAF" ] && kill "$(cat "$pid")"
exit 0
"""


class Orders:
    """A keeper that only listens."""

    def __init__(self) -> None:
        self.given: list[dict[str, Any]] = []

    def order(self, **what: Any) -> None:
        self.given.append(what)


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / mps.CONTROL
    program.write_text(CONTROL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return program


def daemon_of(environment: dict[str, str]) -> int:
    return int(Path(environment["CUDA_MPS_PIPE_DIRECTORY"], f"{mps.CONTROL}.pid").read_text())


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_daemon_and_directory_are_there_within_and_gone_after(
    control: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "25")
    with mps.private_mps(Orders()) as environment:  # type: ignore[arg-type]
        pid, pipe = daemon_of(environment), Path(environment["CUDA_MPS_PIPE_DIRECTORY"])
        assert runs(pid)
        assert environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "100"
        assert Path(environment["CUDA_MPS_LOG_DIRECTORY"]).is_dir()
    assert not runs(pid)
    assert not pipe.parent.exists()


def test_clients_find_the_control_program_by_its_name(
    control: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mps.private_mps(Orders()) as environment:  # type: ignore[arg-type]
        assert environment["PATH"] == os.environ["PATH"]
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(mps, "find_control", lambda: control)
    with mps.private_mps(Orders()) as environment:  # type: ignore[arg-type]
        assert environment["PATH"] == f"/usr/bin:/bin:{control.parent}"


def test_a_block_that_raises_leaves_nothing(control: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        mps.private_mps(Orders()) as environment,  # type: ignore[arg-type]
    ):
        pid, folder = daemon_of(environment), Path(environment["CUDA_MPS_LOG_DIRECTORY"]).parent
        raise KeyboardInterrupt
    assert not runs(pid)
    assert not folder.exists()


def test_the_daemon_shows_all_gpus(control: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with mps.private_mps(Orders()) as environment:  # type: ignore[arg-type]
        seen = Path(f"/proc/{daemon_of(environment)}/environ").read_bytes().split(b"\0")
    assert not any(entry.startswith(b"CUDA_VISIBLE_DEVICES=") for entry in seen)
    assert "CUDA_VISIBLE_DEVICES" not in environment  # the client's own stays


def test_a_server_that_outlives_its_daemon_is_ended(control: Path) -> None:
    folder = control.parent
    server = folder / "nvidia-cuda-mps-server"
    server.write_text("#!/bin/sh\nread line\n")
    server.chmod(0o755)
    mps_end_s, mps._END_S = mps._END_S, 0.3
    try:
        with mps.private_mps(Orders()) as environment:  # type: ignore[arg-type]
            served = subprocess.Popen([server], stdin=subprocess.PIPE, env=os.environ | environment)
            until = time.monotonic() + 5
            while "mps" not in Path(f"/proc/{served.pid}/comm").read_text():
                assert time.monotonic() < until
        assert served.wait(5) == -9
    finally:
        mps._END_S = mps_end_s


def test_a_daemon_that_does_not_quit_is_killed(
    control: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DEAF", "1")
    monkeypatch.setattr(mps, "_END_S", 0.3)
    with mps.private_mps(Orders()) as environment:  # type: ignore[arg-type]
        pid = daemon_of(environment)
    until = time.monotonic() + 5
    while runs(pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert not runs(pid)


def test_one_that_does_not_start_is_told_with_its_last_word(
    control: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "no device is supported")
    with (
        pytest.raises(FlashmoeError, match=r"exit code 3.*no device is supported") as caught,
        mps.private_mps(Orders()),  # type: ignore[arg-type]
    ):
        pass
    assert "--world local" in caught.value.hint
    assert not list(tmp_path.glob("flashmoe-mps-*"))


def test_without_the_program_it_says_where_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(FlashmoeError, match="neither on PATH nor in /a, /b") as caught:
        mps.find_control(("/a", "/b"))
    assert caught.value.exit_code == 5


def test_the_program_beside_nvidia_smi_is_found(
    control: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    linked = tmp_path / "path"
    linked.mkdir()
    smi = control.parent / "nvidia-smi"
    smi.write_text("#!/bin/sh\n")
    smi.chmod(0o755)
    (linked / "nvidia-smi").symlink_to(smi)
    monkeypatch.setenv("PATH", str(linked))
    assert mps.find_control(()) == control


PARENT = """
import sys, time
from flashmoe.keeper import Keeper
from flashmoe.world.mps import private_mps
with private_mps(Keeper()) as environment:
    print(environment["CUDA_MPS_PIPE_DIRECTORY"], flush=True)
    time.sleep(600)
"""


def test_a_killed_parent_leaves_nothing(control: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", PARENT], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pipe = Path(parent.stdout.readline().strip())
    pid = daemon_of({"CUDA_MPS_PIPE_DIRECTORY": str(pipe)})
    assert runs(pid)
    parent.kill()
    parent.wait()
    until = time.monotonic() + 5
    while (runs(pid) or pipe.parent.exists()) and time.monotonic() < until:
        time.sleep(0.05)
    assert not runs(pid)
    assert not pipe.parent.exists()


def test_a_keeper_that_is_told_all_is_done_ends_nothing(control: Path) -> None:
    keeper = Keeper()
    with mps.private_mps(keeper) as environment:
        keeper.done()
        assert runs(daemon_of(environment))

"""Runs the command line with ranks as processes, and looks for what it may leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flashmoe_cli

MARK = "FLASHMOE_TEST_MARK"


@dataclass
class Job:
    """One run of the command line, all of whose processes carry a mark in their environment."""

    folder: Path
    args: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        place = str(Path(flashmoe_cli.__file__).parents[1])
        self.shm = set(os.listdir("/dev/shm"))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "flashmoe_cli", *self.args],
            cwd=self.folder,
            env=os.environ
            | {"PYTHONPATH": place, MARK: self.mark, "OMP_NUM_THREADS": "1"}
            | self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def pids(self) -> dict[int, str]:
        """Every process of this job that is alive, with its command line."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if f"{MARK}={self.mark}".encode() in environment and state != "Z":
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().decode()
            except OSError:
                continue
        return found

    def pe(self, rank: int) -> int:
        """The process of a rank; waits until it is there."""
        return until(lambda: next(
            (pid for pid, line in self.pids().items() if f"rank={rank}\0" in line), None
        ))  # fmt: skip

    def wait_for(self, phase: str) -> None:
        """Reads stderr until a phase is announced."""
        assert self.process.stderr is not None
        seen = []
        while (line := self.process.stderr.readline()) != "":
            seen.append(line.rstrip())
            if seen[-1] == phase:
                return
        raise AssertionError(f"no '{phase}' came: {seen}")

    def end(self, timeout: float = 60) -> Done:
        """Waits for the command line to end by itself."""
        try:
            out, err = self.process.communicate(timeout=timeout)
        finally:
            for pid in self.pids() if self.process.poll() is None else ():
                os.kill(pid, signal.SIGKILL)
        return Done(self.process.returncode, out, err)

    def left(self, within: float = 1.0) -> list[str]:
        """What is still there after ``within`` seconds: processes, shared memory, odd files."""
        end = time.monotonic() + within
        while True:
            left = [f"process {pid}: {line}" for pid, line in self.pids().items()]
            left += [f"/dev/shm/{name}" for name in set(os.listdir("/dev/shm")) - self.shm
                     if "flashmoe" in name]  # fmt: skip
            left += [str(p) for p in self.folder.iterdir() if p.name.startswith(".")]
            for run in self.folder.glob("*.fmoe"):
                if not (run / "run.json").exists():
                    left.append(f"{run} without run.json")
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.05)


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> dict[str, Any]:
        """The object on stdout."""
        found: dict[str, Any] = json.loads(self.out)
        return found

    def __str__(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.err}"


FULL_DISK = """
import errno, flashmoe.part
write = flashmoe.part.write_part
def write_part(file, part):
    write(file, part)
    if part.report["rank"] in {ranks}:
        raise OSError(errno.ENOSPC, "No space left on device")
flashmoe.part.write_part = write_part
"""
"""Code in which the disk is full for these ranks' parts; see ``with_code``."""


def with_code(folder: Path, code: str) -> dict[str, str]:
    """The environment in which every Python of a job runs ``code`` first."""
    place = folder / "first"
    place.mkdir()
    (place / "sitecustomize.py").write_text(code)
    paths = [str(place), str(Path(flashmoe_cli.__file__).parents[1])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def until(what: Callable[[], Any], limit: float = 30.0) -> Any:
    """Polls until ``what`` gives something."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        found = what()
        if found is not None and found is not False:
            return found
        time.sleep(0.01)
    raise AssertionError("it did not come")

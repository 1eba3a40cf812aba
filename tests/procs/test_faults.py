"""When one dies: each way of it, and what the others, the report and the machine look like then."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flashmoe._host")

from flashmoe.launcher import TERM_S
from flashmoe.trace.rundir import open_run

from .harness import FULL_DISK, Job, until, with_code

DEADLINE_S = 4.0
GRACE_S = 3.0
HOST = ("--world", "host", "--processes", "--deadline", str(DEADLINE_S))
# Long enough in its launch to be met there, and short enough to end it within the deadline.
SLOW = ("--fault", "slow:0:0.02")
SLOW_PART = """
import time
from flashmoe.pe import Pe
gather = Pe.part
def part(pe):
    time.sleep({seconds})
    return gather(pe)
Pe.part = part
"""
CTRL_C_AT_AN_END = """
import subprocess
def interrupted(ask):
    def asked(process, *args, **how):
        code = ask(process, *args, **how)
        if code is not None and "flashmoe.child" in process.args:
            subprocess.Popen.poll, subprocess.Popen.wait = poll, wait
            raise KeyboardInterrupt
        return code
    return asked
poll, wait = subprocess.Popen.poll, subprocess.Popen.wait
subprocess.Popen.poll, subprocess.Popen.wait = interrupted(poll), interrupted(wait)
"""
BROKEN_PART = """
from flashmoe.pe import Pe
def part(pe):
    raise IndexError("nothing is left of it")
Pe.part = part
"""


def trace(folder: Path, *more: str, ranks: int = 3, **env: str) -> Job:
    args = ("trace", "tiny", "--ranks", str(ranks), "-T", "24", *HOST, "-o", "run.fmoe", *more)
    return Job(folder, args, dict(env))


def check_survivors(folder: Path, dead: int, ranks: int = 3) -> dict[str, Any]:
    """The run can be read, and holds events of every rank but the dead one."""
    run = open_run(folder / "run.fmoe")
    seen = set(run.events["rank"].to_pylist())
    assert seen == set(range(ranks)) - {dead}
    assert run.flight is not None
    return run.meta


@pytest.mark.parametrize("point", ["start", "joined"])
def test_a_pe_killed_before_any_launch(tmp_path: Path, point: str) -> None:
    job = trace(tmp_path, "--fault", f"killed:1:{point}", "--json")
    done = job.end()
    assert done.code == 1, done
    message = done.said["error"]["message"]
    assert "rank 1 is gone: killed by SIGKILL" in message, done
    # Whether both had come equally far by then is chance.
    said = r"ranks 0, 2 at [a-z ]+|rank 0 at [a-z ]+; rank 2 at [a-z ]+"
    assert re.search(rf"; the others waited for it \(({said})\)$", message), done
    assert job.left() == []
    assert not (tmp_path / "run.fmoe").exists()


@pytest.mark.parametrize("pointers", [(), ("--no-pointers",)])
def test_a_pe_killed_inside_the_kernel(tmp_path: Path, pointers: tuple[str, ...]) -> None:
    more = ("--fault", "killed:1:kernel:0.05", "--fault", "slow:1:0.02", *pointers)
    job = trace(tmp_path, *more, "--json")
    began = time.monotonic()
    done = job.end()
    assert time.monotonic() - began < 30
    assert done.code == 1, done
    hang = done.said["hang"]
    assert (hang["cause"], hang["culprit"]) == ("dead", 1), done
    assert "killed by SIGKILL" in hang["reason"]
    assert {wait["rank"] for wait in hang["waits"]} >= {0, 2}
    assert job.left() == []
    meta = check_survivors(tmp_path, 1)
    said = [pe["message"] for pe in meta["world"]["processes"]["ranks"]]
    assert said[1] == "killed by SIGKILL"
    assert meta["status"]["code"] == 1


def test_survivors_of_a_kill_end_in_time(tmp_path: Path) -> None:
    """Killed from outside, in a launch; the time runs from the kill."""
    job = trace(tmp_path, "-n", "2000", *SLOW)
    job.wait_for("running")
    os.kill(job.pe(2), signal.SIGKILL)
    began = time.monotonic()
    until(lambda: all("rank=" not in line for line in job.pids().values()))
    assert time.monotonic() - began < DEADLINE_S + GRACE_S
    done = job.end()
    assert done.code == 1, done
    assert "rank 2 is gone: killed by SIGKILL" in done.out
    assert job.left() == []
    check_survivors(tmp_path, 2)


def test_a_pe_that_raises_inside_the_kernel(tmp_path: Path) -> None:
    job = trace(tmp_path, "--fault", "raises:0:kernel:0.05", "--fault", "slow:0:0.02", "--json")
    done = job.end()
    assert done.code == 1, done
    hang = done.said["hang"]
    assert (hang["cause"], hang["culprit"]) == ("dead", 0), done
    assert "injected at kernel" in hang["reason"]
    assert any(line.startswith("[rank 0] Traceback") for line in done.err.splitlines()), done
    assert job.left() == []
    meta = open_run(tmp_path / "run.fmoe").meta
    assert "injected" in meta["world"]["processes"]["ranks"][0]["message"]


def test_a_pe_that_raises_before(tmp_path: Path) -> None:
    job = trace(tmp_path, "--fault", "raises:2:joined", "--json")
    done = job.end()
    assert done.code == 1, done
    assert "rank 2" in done.said["error"]["message"]
    assert "injected at joined" in done.said["error"]["message"]
    assert job.left() == []


def test_why_a_pe_failed_is_told_though_it_cannot_gather_its_part(tmp_path: Path) -> None:
    job = trace(
        tmp_path, "--fault", "raises:2:joined", "--json", **with_code(tmp_path, BROKEN_PART)
    )
    done = job.end()
    assert done.code == 1, done
    assert "injected at joined" in done.said["error"]["message"], done
    assert job.left() == []


@pytest.mark.parametrize("ranks", ["{1}", "{0, 1, 2}"])
def test_a_disk_that_is_full_kills_no_rank(tmp_path: Path, ranks: str) -> None:
    full = with_code(tmp_path, FULL_DISK.replace("{ranks}", ranks))
    done = (job := trace(tmp_path, "--json", **full)).end()
    assert done.code == 1, done
    said = re.escape(f": no space left to write {tmp_path}")
    assert re.fullmatch("rank [012]" + said, done.said["error"]["message"]), done
    assert "free space" in done.said["error"]["hint"]
    assert job.left() == []


def test_a_hang_is_told_though_a_part_could_not_be_written(tmp_path: Path) -> None:
    full = with_code(tmp_path, FULL_DISK.replace("{ranks}", "{2}"))
    how = ("--fault", "lost-signal:0:7", "--deadline", "0.5", "--json")
    done = trace(tmp_path, *how, **full).end()
    assert (done.code, done.said["hang"]["cause"]) == (124, "lost-signal"), done


@pytest.mark.parametrize("pointers", [(), ("--no-pointers",)])
def test_a_lost_signal_is_found_as_among_threads(tmp_path: Path, pointers: tuple[str, ...]) -> None:
    more = ("--fault", "lost-signal:0:7", "--deadline", "0.5", *pointers)
    job = trace(tmp_path, *more, "--json")
    done = job.end()
    assert done.code == 124, done
    hang = done.said["hang"]
    assert hang["cause"] == "lost-signal", done
    assert hang["culprit"] == 0 or 0 in hang["candidates"], done
    assert bool(pointers) <= (hang["culprit"] == 0)  # by puts the word itself says whose it is
    assert job.left() == []
    assert open_run(tmp_path / "run.fmoe").meta["hang"]["reason"] == hang["reason"]


def test_a_pe_that_is_stopped_and_goes_on_in_time_is_no_hang(tmp_path: Path) -> None:
    job = trace(tmp_path, "-n", "60", "--fault", "slow:0:0.002")
    job.wait_for("running")
    pe = job.pe(1)
    os.kill(pe, signal.SIGSTOP)
    time.sleep(DEADLINE_S / 3)
    os.kill(pe, signal.SIGCONT)
    done = job.end()
    assert done.code == 0, done
    assert job.left() == []
    assert open_run(tmp_path / "run.fmoe").meta["status"]["message"] == "ok"


def test_a_pe_that_stays_stopped_is_named(tmp_path: Path) -> None:
    job = trace(tmp_path, "-n", "2000", *SLOW, "--json", "--deadline", "1")
    # --json says no phases: the slots' own first launch tells that it runs.
    pe = job.pe(1)
    until(lambda: _threads(pe) > 12)
    os.kill(pe, signal.SIGSTOP)
    done = job.end()
    assert done.code == 124, done
    assert done.said["hang"]["culprit"] == 1, done
    assert done.said["hang"]["cause"] == "stopped", done
    assert job.left() == []


def test_a_pe_that_is_stopped_when_the_launches_are_over_is_not_waited_for_for_ever(
    tmp_path: Path,
) -> None:
    job = trace(tmp_path, "-n", "60", "--deadline", "1")
    pe = job.pe(1)
    job.wait_for("checking against the float32 reference")
    os.kill(pe, signal.SIGSTOP)
    began = time.monotonic()
    done = job.end()
    assert time.monotonic() - began < 1 + 5 * GRACE_S  # its part may be written, or not
    assert done.code in (0, 1), done
    if done.code == 1:
        assert "rank 1 is gone: it was stopped, and not continued" in done.out
    assert job.left() == []


def _threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_what_stops_the_launcher_stops_all_and_keeps_what_had_run(
    tmp_path: Path, how: signal.Signals
) -> None:
    job = trace(tmp_path, "-n", "2000", "--fault", "slow:0:0.002")
    job.wait_for("running")
    time.sleep(0.5)
    job.process.send_signal(how)
    began = time.monotonic()
    done = job.end()
    assert time.monotonic() - began < DEADLINE_S + GRACE_S
    assert done.code == 130, done
    assert "saved what had run: run.fmoe" in done.err
    assert job.left() == []
    run = open_run(tmp_path / "run.fmoe")
    assert run.meta["status"] == {"code": 130, "message": "interrupted"}
    assert set(run.events["rank"].to_pylist()) == {0, 1, 2}
    assert run.meta["iterations"] > 0


def test_ctrl_c_at_the_moment_a_pe_ends(tmp_path: Path) -> None:
    job = trace(tmp_path, **with_code(tmp_path, CTRL_C_AT_AN_END))
    done = job.end(timeout=40)
    assert done.code == 130, done
    assert job.left() == []


def test_one_that_takes_long_to_gather_its_part_is_given_the_time(tmp_path: Path) -> None:
    """Full rings of a GPU that others use take seconds; SIGTERM would come before that."""
    more = ("-n", "2000", "--fault", "slow:0:0.002")
    slow = with_code(tmp_path, SLOW_PART.format(seconds=TERM_S + 1.0))
    job = trace(tmp_path, *more, **slow)
    job.wait_for("running")
    time.sleep(0.5)
    job.process.send_signal(signal.SIGINT)
    done = job.end()
    assert "saved what had run: run.fmoe" in done.err, done
    assert set(open_run(tmp_path / "run.fmoe").events["rank"].to_pylist()) == {0, 1, 2}


@pytest.mark.parametrize("when", ["starting 3 processes", "building the engine", "running"])
def test_the_launcher_killed_leaves_nothing(tmp_path: Path, when: str) -> None:
    job = trace(tmp_path, "-n", "2000", *SLOW)
    job.wait_for(when)
    job.process.kill()
    job.process.wait()
    assert job.left(within=5.0) == []
    assert list(tmp_path.iterdir()) == []


def test_the_launcher_killed_with_a_stopped_pe_leaves_nothing(tmp_path: Path) -> None:
    job = trace(tmp_path, "-n", "2000", *SLOW)
    job.wait_for("running")
    os.kill(job.pe(1), signal.SIGSTOP)
    job.process.kill()
    job.process.wait()
    assert job.left(within=5.0) == []


def test_the_launcher_killed_while_it_writes_leaves_no_half_run(tmp_path: Path) -> None:
    (tmp_path / "run.fmoe").mkdir()
    (tmp_path / "run.fmoe" / "run.json").write_text(json.dumps({"schema": 1, "rings": {}}))
    job = trace(tmp_path, "-n", "400", "-f")
    until(lambda: list(tmp_path.glob(".run.fmoe.*.part")) or None, 60)
    job.process.kill()
    job.process.wait()
    assert job.left(within=5.0) == []
    assert (tmp_path / "run.fmoe" / "run.json").exists()  # the old one, or the new one whole


def test_a_pe_that_is_stopped_is_no_success(tmp_path: Path) -> None:
    job = trace(tmp_path, "-n", "2000", "--fault", "slow:0:0.002")
    job.wait_for("running")
    time.sleep(0.5)
    os.kill(job.pe(1), signal.SIGTERM)
    done = job.end()
    assert done.code == 130, done
    assert "rank 1 was stopped" in done.err and "saved what had run" in done.err, done
    assert job.left() == []
    run = open_run(tmp_path / "run.fmoe")
    assert run.meta["status"] == {"code": 130, "message": "rank 1 was stopped"}
    assert set(run.events["rank"].to_pylist()) == {0, 1, 2}


def test_a_pe_that_is_stopped_before_it_ran_is_named(tmp_path: Path) -> None:
    job = trace(tmp_path, "-n", "2000", "--json")
    pe = job.pe(2)
    time.sleep(0.3)
    os.kill(pe, signal.SIGTERM)
    done = job.end()
    # By its handler, or before that stood.
    stopped = (130, "rank 2 was stopped"), (1, "rank 2 is gone: killed by SIGTERM")
    assert (done.code, done.said["error"]["message"].partition(" while ")[0]) in stopped, done
    assert job.left() == []

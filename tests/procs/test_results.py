"""What processes compute and record is what threads do, and what the routing implies."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flashmoe._host")

import flashmoe_cli
from flashmoe.trace import schema
from flashmoe.trace.causality import order_of
from flashmoe.trace.columns import Events
from flashmoe.trace.rundir import open_run
from flashmoe_cli.output import Terminal
from flashmoe_cli.render.figures import clock_lines

from .harness import FULL_DISK, Job, with_code
from .payload import implied, traced

FILES = {"rings.bin", "run.json", "events.parquet", "plan.parquet", "counts.parquet"}
TOKENS = ["24,0,31,9", "24,17", "5,40,12"]


def arguments(folder: Path, name: str, tokens: str) -> tuple[str, ...]:
    ranks = str(tokens.count(",") + 1)
    args = ("trace", "tiny", "--world", "host", "--ranks", ranks, "-T", tokens, "-n", "2")
    saved = ("-o", str(folder / f"{name}.fmoe"))
    saved += ("--save-output", str(folder / f"{name}.safetensors"), "--skew", "1")
    return (*args, *saved, "--json")


def trace(folder: Path, name: str, tokens: str, *more: str, **env: str) -> Any:
    """A run with its ranks as processes."""
    args = (*arguments(folder, name, tokens), "--processes", *more)
    done = Job(folder, args, dict(env)).end()
    assert done.code == 0, done
    assert done.said["check"]["ok"]
    return open_run(folder / f"{name}.fmoe")


def trace_threads(folder: Path, name: str, tokens: str, *more: str) -> Any:
    """The same with its ranks as threads of this process."""
    from typer.testing import CliRunner

    from flashmoe_cli.main import app

    done = CliRunner().invoke(app, [*arguments(folder, name, tokens), *more], prog_name="flashmoe")
    assert done.exit_code == 0, done.output
    return open_run(folder / f"{name}.fmoe")


@pytest.mark.parametrize(
    ("tokens", "how"), [(TOKENS[0], ("--no-pointers",)), *((t, ()) for t in TOKENS)]
)
def test_bits_and_bytes_are_those_of_threads_and_of_the_routing(
    tmp_path: Path, tokens: str, how: tuple[str, ...]
) -> None:
    threads = trace_threads(tmp_path, "threads", tokens)  # by pointers always
    processes = trace(tmp_path, "processes", tokens, *how)
    one, other = ((tmp_path / f"{n}.safetensors").read_bytes() for n in ("threads", "processes"))
    assert one == other
    config = processes.meta["config"]
    row_bytes = processes.meta["world"]["row_bytes"]
    for run, name in ((threads, "threads"), (processes, "processes")):
        due = implied(tmp_path / f"{name}.safetensors", tokens, config["experts"], row_bytes)
        assert due.sum() > 0
        for launch in (0, 1):
            assert (traced(run, launch) == due).all()
    for table in ("plan", "counts"):
        assert getattr(threads, table).equals(getattr(processes, table))


def test_the_run_is_one_and_says_who_made_it(tmp_path: Path) -> None:
    run = trace(tmp_path, "run", "9,8,7")
    assert {p.name for p in run.path.iterdir()} == FILES
    ring = run.meta["rings"]["per_ring"]
    place = list(itertools.product(range(3), range(2), range(6)))
    assert [(r["rank"], r["cta"], r["lane"]) for r in ring] == place
    assert all(r["began"] for r in ring)
    world = run.meta["world"]
    assert world["topology"] == "host-processes"
    about = world["processes"]
    assert (about["launcher"], about["transport"], about["pointers"]) == ("flashmoe", "host", True)
    assert len({pe["pid"] for pe in about["ranks"]}) == 3
    assert [pe["message"] for pe in about["ranks"]] == ["ok"] * 3


def test_clocks_that_are_off_are_found_out(tmp_path: Path) -> None:
    """Rank 1 is 3 s ahead and 20 ppm fast, rank 2 is 2 ms behind: as the exchanges say, too."""
    skew = {"FLASHMOE_TEST_CLOCK": "1:3000000000:2e-5,2:-2000000:0"}
    run = trace(tmp_path, "run", "9,8,7", **skew)
    clocks = run.meta["clock"]["ranks"]
    assert [c["applied"] for c in clocks] == [False, True, True]
    for rank, offset in ((1, -3_000_000_000), (2, 2_000_000)):
        start = clocks[rank]["start"]
        # The drift has run for some seconds before the first exchange.
        drifted = 2e-5 * 20e9 if rank == 1 else 0
        assert abs(start["offset_ns"] - offset) <= start["bound_ns"] + drifted
        assert start["bound_ns"] < 1_000_000
    events = Events.of(run.events)
    for launch in (0, 1):  # all ranks in one launch at one time, though one was 3 s ahead
        mine = (events.kind == schema.EventKind.LAUNCH) & (events.iter == launch)
        begin, end = events.t0_ns[mine], (events.t0_ns + events.dur_ns)[mine]
        assert begin.max() < end.min() + 100_000_000
    order = order_of(run, events)
    assert order is not None
    assert order["checked"] > 0
    assert order["violations"] == 0
    tightening = run.meta["clock"]["tightening"]
    assert tightening["pairs"] > 0 and tightening["contradiction_ns"] == 0
    for said in clocks:
        if said["tightened"] is not None:
            both = [[e["bound_ns"] for e in (how["start"], how["end"])]
                    for how in (said["tightened"], said)]  # fmt: skip
            assert max(both[0]) < max(both[1])


def test_waits_that_contradict_each_other_are_told(tmp_path: Path) -> None:
    run = trace(tmp_path, "run", "20,20,20")
    run.meta["clock"]["tightening"]["contradiction_ns"] = 1e6
    order = order_of(run, Events.of(run.events))
    assert order is not None and order["contradiction_ns"] == 1e6
    text = " ".join(clock_lines(run.meta["clock"] | {"order": order}, Terminal(80, False, True)))
    assert "waits contradict each other: some end at least 1.00 ms too early" in text


def test_an_order_that_cannot_be_is_counted(tmp_path: Path) -> None:
    run = trace(tmp_path, "run", "20,20,20")
    events = Events.of(run.events)
    assert order_of(run, events)["violations"] == 0  # type: ignore[index]
    ahead = events.rank == 1
    wrong = Events(**{**events.__dict__, "t0_ns": events.t0_ns - np.where(ahead, 50_000_000, 0)})
    found = order_of(run, wrong)
    assert found is not None
    assert found["violations"] > 0
    assert found["worst_ns"] > 10_000_000
    # By less than the bounds nothing can be told.
    for how in run.meta["clock"]["ranks"]:
        for at in ("start", "end"):
            how[at]["bound_ns"] = 60_000_000
    assert order_of(run, wrong)["violations"] == 0  # type: ignore[index]


def start_elsewhere(
    folder: Path, envs: list[dict[str, str]], *args: str
) -> list[subprocess.Popen[str]]:
    """The command line once for each of these environments, as another launcher would start it."""
    place = {"PYTHONPATH": str(Path(flashmoe_cli.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "flashmoe_cli", *args],
            cwd=folder, env=os.environ | place | env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for env in envs
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen[str]]) -> list[Any]:
    """Exit code, stdout and stderr of each."""
    out = [p.communicate(timeout=120) for p in processes]
    return [(p.returncode, *o) for p, o in zip(processes, out, strict=True)]


def started_elsewhere(folder: Path, envs: list[dict[str, str]], *args: str) -> list[Any]:
    """``start_elsewhere``, to the end."""
    return ended(start_elsewhere(folder, envs, *args))


@pytest.mark.parametrize("by", ["torchrun", "srun", "mpirun"])
def test_ranks_that_another_launcher_started(tmp_path: Path, by: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    forms: dict[str, Any] = {
        "torchrun": lambda r: {"RANK": r, "WORLD_SIZE": "2", "LOCAL_RANK": r},
        "srun": lambda r: {"SLURM_PROCID": r, "SLURM_STEP_ID": "0", "SLURM_LOCALID": r,
                           "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"},
        "mpirun": lambda r: {"OMPI_COMM_WORLD_RANK": r, "OMPI_COMM_WORLD_SIZE": "2",
                             "OMPI_COMM_WORLD_LOCAL_RANK": r, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
    }  # fmt: skip
    envs = [common | forms[by](str(r)) for r in range(2)]
    done = started_elsewhere(
        tmp_path, envs, "trace", "tiny", "--world", "host", "-o", "run.fmoe", "-q"
    )
    assert [code for code, _, _ in done] == [0, 0], done
    assert "2 ranks" in done[0][1] and done[1][1] == "", done
    run = open_run(tmp_path / "run.fmoe")
    assert run.meta["world"]["processes"]["launcher"] == by
    assert set(run.events["rank"].to_pylist()) == {0, 1}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def by_torchrun(ranks: int, **more: str) -> list[dict[str, str]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), **more}
    return [common | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("fault", ["lost-signal:1:2", "never-starts:1"])
def test_a_hang_among_them_is_reported_by_rank_0(tmp_path: Path, fault: str) -> None:
    args = ("trace", "tiny", "--world", "host", "-o", "run.fmoe", "--deadline", "0.5")
    done = started_elsewhere(tmp_path, by_torchrun(3), *args, "--fault", fault, "--no-pointers")
    assert [code for code, _, _ in done] == [124] * 3, done
    assert "rank 1" in done[0][1], done
    meta = open_run(tmp_path / "run.fmoe").meta
    assert meta["hang"]["culprit"] == 1
    assert hidden(tmp_path) == []


def test_one_of_them_that_fails_ends_the_others(tmp_path: Path) -> None:
    args = ("run", "tiny", "--world", "host", "--fault", "raises:1:joined")
    done = started_elsewhere(tmp_path, by_torchrun(3), *args)
    assert [code for code, _, _ in done] == [1] * 3, done
    assert "rank 1: Injected: injected at joined" in done[0][2], done
    assert "Traceback" in done[1][2]
    assert hidden(tmp_path) == []


def test_one_of_them_that_never_comes_is_named(tmp_path: Path) -> None:
    envs = by_torchrun(3, FLASHMOE_RENDEZVOUS_S="6")
    args = ("run", "tiny", "--world", "host", "--fault", "killed:2:start")
    done = started_elsewhere(tmp_path, envs, *args)
    assert done[2][0] == -9
    assert done[0][0] == 1 and "rank 2 did not come to 'folder' in 6 s" in done[0][2], done
    assert done[1][0] == 1
    assert hidden(tmp_path) == []


def test_a_run_that_exists_is_refused_at_once_by_all(tmp_path: Path) -> None:
    (tmp_path / "run.fmoe").mkdir()
    (tmp_path / "run.fmoe" / "run.json").touch()
    args = ("trace", "tiny", "--world", "host", "-o", "run.fmoe")
    done = started_elsewhere(tmp_path, by_torchrun(3), *args)
    assert done[0][0] == 2 and "exists already" in done[0][2], done
    assert 0 not in (done[1][0], done[2][0])
    assert hidden(tmp_path) == []


def test_a_full_disk_at_one_of_them_is_told_at_once(tmp_path: Path) -> None:
    full = with_code(tmp_path, FULL_DISK.replace("{ranks}", "{1}"))
    began = time.monotonic()
    args = ("trace", "tiny", "--world", "host", "-o", "run.fmoe")
    done = started_elsewhere(tmp_path, by_torchrun(3, **full), *args)
    assert [code for code, _, _ in done] == [1] * 3, done
    assert "rank 1: no space left to write" in done[0][2], done
    assert time.monotonic() - began < 60  # a rank that says nothing is waited for twice as long
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("stopped", [0, 1])
def test_all_end_as_stopped_where_one_of_them_is(tmp_path: Path, stopped: int) -> None:
    slow = ("-n", "2000", "--fault", "slow:0:0.002", "-o", "run.fmoe")
    processes = start_elsewhere(tmp_path, by_torchrun(3), "trace", "tiny", "--world", "host", *slow)
    said = processes[0].stderr
    assert said is not None
    while "running" not in (line := said.readline()):
        assert line != "", ended(processes)
    time.sleep(0.5)
    processes[stopped].send_signal(signal.SIGINT)
    done = ended(processes)
    assert [code for code, _, _ in done] == [130] * 3, done
    assert ("interrupted", "rank 1 was stopped")[stopped] in done[0][2], done
    assert hidden(tmp_path) == []


def test_a_wrong_number_of_ranks_is_refused(tmp_path: Path) -> None:
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}
    ((code, _, err),) = started_elsewhere(tmp_path, [env], "run", "tiny", "--ranks", "3")
    assert code == 2
    assert "--ranks 3, but torchrun started 2 processes" in err

"""run and trace, with an engine of plain torch behind them: verdicts, exit codes, what is saved."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from flashmoe_cli import recording
from flashmoe_cli.render.text import command_lines, visible

HOST = ("--world", "host")


def test_run_judges_and_says_that_it_was_the_host_engine(
    runs: Path, cli: Any, torch_engine: Any
) -> None:
    done = cli("run", "tiny", "--ranks", "2", *HOST)
    assert done.exit_code == 0, done.output
    assert "tiny on the host engine (CPU threads; not GPU times), 2 ranks x 2 SMs" in done.stdout
    assert "check    ok" in done.stdout
    assert "by the host's wall clock" in done.stdout
    assert "between ranks" in done.stdout
    assert not list(runs.iterdir())


def test_auto_says_why_there_is_no_gpu(runs: Path, cli: Any, torch_engine: Any) -> None:
    done = cli("run", "tiny", "--json")
    said = json.loads(done.stdout)
    if said["world"] == "host":
        assert said["why_world"]


def test_trace_saves_shows_and_names_the_next_commands(
    runs: Path, cli: Any, torch_engine: Any
) -> None:
    done = cli("trace", "tiny", "--ranks", "2", "-n", "2", *HOST)
    assert done.exit_code == 0, done.output
    (saved,) = runs.glob("*.fmoe")
    assert re.fullmatch(r"tiny-\d{8}-\d{6}\.fmoe", saved.name)
    assert "host engine" in done.stdout
    assert "where the time of each rank's actors went" in done.stdout
    next_commands = done.stdout.split("next:")[1]
    assert "flashmoe timeline" in next_commands
    assert "flashmoe export" in next_commands
    assert "running" in done.stderr
    assert (runs / "latest").resolve() == saved
    assert cli("timeline").exit_code == 0


def test_traces_of_one_second_take_names_of_their_own(
    runs: Path, cli: Any, torch_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording.time, "strftime", lambda form: "20260102-030405")
    whole, inner = recording.run, []

    def another_begins_meanwhile(*given: Any) -> Any:
        if not inner:
            inner.append(None)
            inner[0] = cli("trace", "tiny", "--seed", "2", *HOST)
        return whole(*given)

    monkeypatch.setattr(recording, "run", another_begins_meanwhile)
    done = cli("trace", "tiny", "--seed", "1", *HOST)
    assert done.exit_code == inner[0].exit_code == 0, done.output
    third = cli("trace", "tiny", "--seed", "3", *HOST)
    assert third.exit_code == 0, third.output
    stem = "tiny-20260102-030405"
    seeds = {
        name: json.loads(Path(name, "run.json").read_text())["config"]["seed"]
        for name in (f"{stem}.fmoe", f"{stem}-2.fmoe", f"{stem}-3.fmoe")
    }
    assert list(seeds.values()) == [1, 2, 3]
    assert {p.name for p in runs.iterdir()} == {*seeds, "latest"}


def test_what_held_a_name_for_one_that_was_killed_goes(
    runs: Path, cli: Any, torch_engine: Any
) -> None:
    left, held = runs / ".a-20260102-030405.fmoe.held", runs / ".b-20260102-030405.fmoe.held"
    left.touch()
    with held.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert cli("trace", "tiny", *HOST).exit_code == 0
        assert held.exists()
    assert not left.exists()


@pytest.mark.parametrize("width", [20, 40, 60, 200])
def test_a_command_in_several_lines_is_what_it_was(width: int) -> None:
    words = ["flashmoe", "timeline", "/my long runs/of a day/a.fmoe", "--sm", "3", "--lane", "it's"]
    lines = command_lines(shlex.join(words), width, "  ")
    assert all(line.endswith(" \\") for line in lines[:-1])
    assert shlex.split("\n".join(lines).replace(" \\\n", " ")) == words
    assert all(len(line) <= max(width, len(f"    {shlex.quote(words[2])} \\")) for line in lines)
    assert (len(lines) == 1) == (width == 200)


@pytest.mark.parametrize("width", [40, 60])
@pytest.mark.parametrize("verb", ["run", "trace"])
def test_no_line_of_a_result_is_wider_than_the_terminal(
    runs: Path, cli: Any, torch_engine: Any, monkeypatch: pytest.MonkeyPatch, verb: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    done = cli(verb, "tiny", "--ranks", "3", "-v", *HOST)
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stdout.splitlines() if len(line.split()) > 1]  # no mere path
    assert max(map(visible, lines)) <= width


def test_the_saved_run_tells_what_it_was(runs: Path, cli: Any, torch_engine: Any) -> None:
    done = cli("trace", "tiny", "--ranks", "2", "--seed", "7", "-T", "5,9", *HOST, "-o", "a.fmoe")
    assert done.exit_code == 0, done.output
    meta = json.loads(Path("a.fmoe/run.json").read_text())
    assert meta["world"]["kind"] == "host"
    assert meta["world"]["tokens"] == [5, 9]
    assert meta["config"]["seed"] == 7
    assert meta["check"]["ok"]
    assert meta["status"] == {"code": 0, "message": "ok"}
    assert meta["rings"]["dropped"] == 0


def test_trace_json_holds_the_timeline(runs: Path, cli: Any, torch_engine: Any) -> None:
    done = cli("trace", "tiny", "--json", *HOST)
    said = json.loads(done.stdout)
    assert done.stderr == ""
    assert said["schema"] == 1
    assert said["timeline"]["ranks"][0]["rank"] == 0
    assert Path(said["run"]).is_dir()


def test_a_wrong_result_ends_with_1_and_says_so(runs: Path, cli: Any, torch_engine: Any) -> None:
    torch_engine.spoil = "wrong"
    done = cli("run", "tiny", *HOST)
    assert done.exit_code == 1
    assert "WRONG" in done.stdout
    assert cli("run", "tiny", *HOST, "--no-check").exit_code == 0


def test_a_nan_is_wrong_and_fits_into_json(runs: Path, cli: Any, torch_engine: Any) -> None:
    torch_engine.spoil = "nan"
    done = cli("run", "tiny", *HOST, "-o", "a.fmoe")
    assert done.exit_code == 1
    assert "; 1 element NaN or infinite; routing" in " ".join(done.stdout.split())
    said = json.loads(cli("run", "tiny", *HOST, "--json").stdout)
    assert said["check"]["output"]["not_finite"] == 1
    assert "NaN" not in Path("a.fmoe/run.json").read_text()


def test_a_hang_ends_with_124_a_report_and_a_run(runs: Path, cli: Any, torch_engine: Any) -> None:
    torch_engine.spoil = "hang"
    done = cli("run", "tiny", "--ranks", "2", *HOST)
    assert done.exit_code == 124, done.output
    assert "rank 1 never started" in done.stdout
    (saved,) = runs.glob("*.fmoe")
    assert (saved / "flight.bin").stat().st_size > 0
    assert cli("info").exit_code == 0
    said = json.loads(cli("trace", "tiny", "--ranks", "2", *HOST, "--json").stdout)
    assert said["hang"]["culprit"] == 1
    assert said["status"]["code"] == 124


def test_an_overflow_is_an_error_with_the_rows(runs: Path, cli: Any, torch_engine: Any) -> None:
    torch_engine.spoil = "overflow"
    done = cli("run", "tiny", *HOST)
    assert done.exit_code == 1
    assert "777 rows" in done.stderr


def test_an_existing_output_is_kept(runs: Path, cli: Any, torch_engine: Any) -> None:
    assert cli("trace", "tiny", *HOST, "-o", "a.fmoe").exit_code == 0
    before = Path("a.fmoe/run.json").read_bytes()
    done = cli("trace", "tiny", *HOST, "-o", "a.fmoe")
    assert done.exit_code == 2
    assert "-f" in done.stderr
    assert Path("a.fmoe/run.json").read_bytes() == before
    assert cli("trace", "tiny", *HOST, "-o", "a.fmoe", "-f").exit_code == 0


@pytest.mark.parametrize("flag", ["-o", "--save-output"])
def test_what_cannot_be_replaced_is_said_before_the_work(
    runs: Path, cli: Any, torch_engine: Any, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    from flashmoe import session

    def too_late(*args: Any) -> None:
        raise AssertionError("it has run")

    monkeypatch.setattr(session, "build_engine", too_late)
    Path("kept.fmoe").mkdir()
    Path("kept.fmoe/letter.txt").write_text("mine")
    done = cli("trace", "tiny", *HOST, flag, "kept.fmoe", "-f")
    assert done.exit_code == 2, done.output
    assert "kept" in done.stderr
    assert Path("kept.fmoe/letter.txt").read_text() == "mine"


def test_save_output_writes_all_ranks_in_order(runs: Path, cli: Any, torch_engine: Any) -> None:
    done = cli("run", "tiny", "--ranks", "2", "-T", "3,4", *HOST, "--save-output", "y.safetensors")
    assert done.exit_code == 0, done.output
    with safe_open("y.safetensors", framework="pt") as tensors:
        assert tensors.get_tensor("y").shape == (7, 64)
        assert tensors.get_tensor("ids").shape == (7, 2)
        assert tensors.get_tensor("weights").shape == (7, 2)
    assert cli("run", "tiny", *HOST, "--save-output", "y.safetensors").exit_code == 2


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_costs_the_output_and_not_the_verdict(
    runs: Path, cli: Any, torch_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    args = ("run", "tiny", *HOST, "--save-output", "y.safetensors")
    done = cli(*args)
    assert done.exit_code == 1
    assert "check    ok" in done.stdout
    assert "output" not in done.stdout
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert error.startswith("error: y.safetensors can't be written:")
    assert "No space left on device" in error
    assert not Path("y.safetensors").exists()
    said = json.loads(cli(*args, "--json").stdout)
    assert said["check"]["ok"]
    assert "y.safetensors can't be written" in said["unsaved"]
    assert said["status"]["code"] == 1
    torch_engine.spoil = "hang"  # whose exit code says more
    assert cli(*args).exit_code == 124


def test_a_full_disk_costs_the_run_and_not_the_verdict(
    runs: Path, cli: Any, torch_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashmoe.trace import rundir

    monkeypatch.setattr(rundir, "write_rings", full)
    done = cli("trace", "tiny", *HOST, "--save-output", "y.safetensors")
    assert done.exit_code == 1
    assert "check    ok" in done.stdout
    assert "output   y.safetensors" in done.stdout
    assert "saved" not in done.stdout
    assert "error: no space left to write" in done.stderr
    said = json.loads(cli("trace", "tiny", *HOST, "--json").stdout)
    assert said["check"]["ok"]
    assert said["run"] is None
    assert "no space left" in said["unsaved"]


@pytest.mark.parametrize("verb", ["run", "trace"])
def test_a_run_is_called_fmoe_however_it_is_named(
    runs: Path, cli: Any, torch_engine: Any, verb: str
) -> None:
    Path("a").mkdir()  # which is nobody's run
    for name in ("a", "b.fmoe", "c.d"):
        assert cli(verb, "tiny", *HOST, "-o", name).exit_code == 0
    assert {p.name for p in Path.cwd().glob("*.fmoe")} == {"a.fmoe", "b.fmoe", "c.d.fmoe"}
    assert not list(Path("a").iterdir())
    for name in ("a", "a.fmoe", "b", "c.d"):
        done = cli("info", name)
        assert done.exit_code == 0, done.output
        assert f"{name.removesuffix('.fmoe')}.fmoe" in done.stdout
    assert cli(verb, "tiny", *HOST, "-o", "a").exit_code == 2  # it exists
    assert cli(verb, "tiny", *HOST, "-o", "latest").exit_code == 2
    assert cli(verb, "tiny", *HOST, "-o", "..").exit_code == 2


def test_tokens_from_a_file_are_shared_out(runs: Path, cli: Any, torch_engine: Any) -> None:
    np.save("x.npy", np.random.default_rng(0).standard_normal((7, 64)).astype(np.float32))
    said = json.loads(cli("run", "--tokens", "x.npy", "--ranks", "2", *HOST, "--json").stdout)
    assert said["tokens"] == [3, 4]
    assert said["check"]["ok"]


def test_the_same_batch_over_more_ranks_gives_the_same_rows_per_expert(
    runs: Path, cli: Any, torch_engine: Any
) -> None:
    one = json.loads(cli("run", "-T", "32", *HOST, "--json", "--skew", "1").stdout)
    two = json.loads(cli("run", "-T", "16", "--ranks", "2", *HOST, "--json", "--skew", "1").stdout)
    assert one["rows_per_expert"] == two["rows_per_expert"]
    assert sum(one["rows_per_expert"]) == 64
    assert one["payload_bytes"] == [[0]]


def test_payload_counts_rows_both_ways(runs: Path, cli: Any, torch_engine: Any) -> None:
    said = json.loads(cli("run", "-T", "16,0", "--ranks", "2", *HOST, "--json").stdout)
    rows_to_other = sum(said["rows_per_expert"][4:])
    expected = rows_to_other * 64 * 2
    assert said["payload_bytes"] == [[0, expected], [expected, 0]]


@pytest.mark.parametrize("asked", [("--world", "local"), ("--device", "0")])
def test_a_gpu_asked_for_and_not_there_ends_with_5(
    runs: Path, cli: Any, asked: tuple[str, str]
) -> None:
    from flashmoe.kernels import select

    try:
        select(0)
    except Exception:
        done = cli("run", "tiny", *asked)
        assert done.exit_code == 5
        assert "--world host" in done.stderr
    else:
        pytest.skip("there is a usable GPU")


def test_ctrl_c_ends_with_130(runs: Path, cli: Any, torch_engine: Any) -> None:
    torch_engine.spoil = "interrupt"
    done = cli("run", "tiny", *HOST)
    assert done.exit_code == 130
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.output


def test_the_floating_point_operations_of_a_launch() -> None:
    from types import SimpleNamespace

    from flashmoe.presets import PRESETS
    from flashmoe.session import flop

    large = SimpleNamespace(config=PRESETS["mixtral"].config, tokens=(4096, 4096))
    assert flop(large) == 2 * 8192 * 2 * 4096 * 3 * 14336


def test_a_stopped_trace_leaves_a_readable_run(
    runs: Path, cli: Any, torch_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = torch_engine.launch

    def stopped_at_the_fourth(self: Any) -> Any:
        if self.launches == 3:
            raise KeyboardInterrupt
        return launch(self)

    monkeypatch.setattr(torch_engine, "launch", stopped_at_the_fourth)
    assert cli("trace", "tiny", "-n", "5", *HOST, "-o", "a.fmoe").exit_code == 130
    meta = json.loads(Path("a.fmoe/run.json").read_text())
    assert meta["status"] == {"code": 130, "message": "interrupted"}
    assert meta["iterations"] == 2
    assert cli("timeline", "a").exit_code == 0


def test_too_little_memory_is_said_before_allocating(
    runs: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashmoe import inputs

    monkeypatch.setattr(inputs, "free_memory", lambda device: 10_000_000)
    done = cli("run", "mixtral", *HOST)
    assert done.exit_code == 1
    assert "2.8 GB" in done.stderr
    assert "0.0 GB are free" in done.stderr
    done = cli("run", "tiny", "-T", "1000000", *HOST)
    assert done.exit_code == 1
    assert "1000000 tokens take 0.4 GB" in done.stderr


def test_a_gpu_is_described_as_far_as_anything_says() -> None:
    from flashmoe_cli.render.result import device_text

    known = {"name": "NVIDIA H200", "cc": "9.0", "sms": 132}
    assert device_text(known) == "NVIDIA H200, compute capability 9.0, 132 SMs"
    more = {"driver": "580.65", "sm_clock_mhz": 1980, "power_w": None, "throttle": ["power cap"]}
    assert device_text(known | more).endswith("driver 580.65, SM 1980 MHz, slowed by power cap")


def test_virtual_ranks_of_one_gpu_are_labelled() -> None:
    from flashmoe.saving import topology

    assert topology("local", 4) == "shared-gpu"
    assert topology("local", 1) == "one-gpu"
    assert topology("host", 4) == "host-threads"
    assert topology("host", 4, 1) == "host-processes"
    assert topology("ipc", 4, 1) == "several-gpus"
    assert topology("ipc", 4, 2) == "shared-gpu"

"""The command line as a whole: errors, near names, versions, completion, pipes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import flashmoe_cli

ME = [sys.executable, "-m", "flashmoe_cli"]
#: The tests change directory: a relative PYTHONPATH would no longer lead here.
PLACE = {"PYTHONPATH": str(Path(flashmoe_cli.__file__).parents[1])}


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (("timelin",), "no such command 'timelin'", "did you mean timeline?"),
        (("run", "mixtal"), "no preset 'mixtal'", "did you mean 'mixtral'?"),
        (("run", "--rank", "2"), "no such option --rank", "did you mean --ranks?"),
        (("timeline", "--wndow", "x"), "no such option --wndow", "did you mean --window?"),
        (("run", "--ranks", "0"), "--ranks", "flashmoe run --help"),
        (("run", "tyni"), "no preset 'tyni'", "did you mean 'tiny'?"),
        (
            ("run", "--world", "hots"),
            "--world hots: it is one of auto, host, local",
            "did you mean host? flashmoe run --help",
        ),
        (("timeline", "--lane", "q"), "--lane q: it is one of load, ", "flashmoe timeline --help"),
        (("run", "--seed", str(2**63)), "--seed", "flashmoe run --help"),
        (("trace", "--ring-capacity", str(2**32)), "--ring-capacity", "flashmoe trace --help"),
        (("run", "-n", "x"), "-n / --iterations must be a valid integer", "flashmoe run --help"),
        (("run", "--skew", "-1"), "--skew must be greater than or equal to 0", "flashmoe run"),
        (("run", "--deadline", "inf"), "--deadline must be less than", "flashmoe run --help"),
        (("run", "--deadline", "1e12"), "--deadline must be less than", "flashmoe run --help"),
        (("run", "--deadline", "nan"), "--deadline must be less than", "flashmoe run --help"),
        (("run", "tiny", "--fault", "lost-signal:0:99"), "no expert 99", "experts are 0 to 7"),
        (("run", "--skew", "inf"), "--skew must be less than", "flashmoe run --help"),
        (("run", "--sm", "3"), "no such option --sm", "--sm is of flashmoe timeline; "),
        (("run", "--force", "--ring-mode", "x"), "no such option --ring-mode", "flashmoe trace"),
        (("run", "tiny", "extra"), "extra", "flashmoe run --help"),
        (("run", "--hidden"), "--hidden", "flashmoe run --help"),
        (("-v", "presets"), "-v before the verb", "behind the verb: flashmoe presets -v"),
        (("run", "tiny", "--hidden", "63"), "hidden size 63", "--hidden 56 or 64"),
    ],
)
def test_misuse_ends_with_2_one_line_of_what_and_one_of_what_to_do(
    runs: Path, cli: Any, args: tuple[str, ...], message: str, hint: str
) -> None:
    done = cli(*args)
    assert done.exit_code == 2
    assert done.stdout == ""
    what, todo = done.stderr.splitlines()
    assert what.startswith("error: ")
    assert message in what
    assert todo.startswith("hint:  ")
    assert hint in todo
    as_json = cli(*args, "--json") if args[0] != "timelin" else cli("--json", *args)
    if args != ("run", "--hidden"):  # there --json would be the option's value
        error = json.loads(as_json.stdout)
        assert error["schema"] == 1
        assert error["error"]["exit_code"] == 2
        assert hint in error["error"]["hint"]
        assert as_json.stderr == ""


def test_a_bug_is_no_traceback_unless_asked_for(
    runs: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashmoe_cli import recording

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(recording, "run", broken)
    done = cli("run", "tiny", "-q")
    assert done.exit_code == 1
    assert "internal error: ZeroDivisionError: by nothing" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in cli("run", "tiny", "-q", "--debug").stderr


def test_a_full_disk_is_one_line(
    runs: Path, cli: Any, torch_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from flashmoe import saving

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "a.fmoe")

    monkeypatch.setattr(saving, "save_run", full)
    done = cli("trace", "tiny", "--world", "host", "-q")
    assert done.exit_code == 1
    assert "No space left on device" in done.stderr
    assert "FLASHMOE_RUNS" in done.stderr


def test_versions(cli: Any) -> None:
    from flashmoe import __version__

    assert cli("--version").stdout.startswith(f"flashmoe {__version__}")
    more = cli("--version", "-v").stdout
    assert "host engine:" in more
    assert "GPU kernels:" in more
    assert json.loads(cli("--version", "--json").stdout)["build"]["version"] == __version__


@pytest.mark.parametrize("args", [("--json", "presets"), ("--json",)])
def test_json_before_the_verb_is_refused_in_json(cli: Any, args: tuple[str, ...]) -> None:
    done = cli(*args)
    assert done.exit_code == 2
    assert "flashmoe" in json.loads(done.stdout)["error"]["hint"]
    assert done.stderr == ""


@pytest.mark.parametrize("columns", ["²", "-3", "x", "0", "9" * 5000])
def test_columns_that_are_none_count_as_not_set(
    monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    from flashmoe_cli.output import terminal

    monkeypatch.setenv("COLUMNS", columns)
    with open(os.devnull, "w") as stream:
        assert terminal(stream).width == 100


def test_no_verb_shows_the_help(cli: Any) -> None:
    assert "flashmoe trace tiny" in cli().stdout
    assert cli("--help").exit_code == 0


def test_every_verb_has_help_that_names_its_options(cli: Any) -> None:
    from flashmoe_cli.main import app

    verbs = {c.callback.__name__ for c in app.registered_commands if c.callback}
    reading = {"timeline", "traffic", "export", "info"}
    assert verbs == {"run", "trace", "bench", "tune", "doctor", "presets"} | reading
    for verb in verbs:
        done = cli(verb, "--help")
        assert done.exit_code == 0
        assert "--json" in done.stdout


def test_help_shows_no_bounds(cli: Any) -> None:
    assert "<=x" not in cli("trace", "--help").stdout


def test_presets_are_listed(cli: Any, golden: Any) -> None:
    golden("presets.txt", cli("presets").stdout)
    names = [p["name"] for p in json.loads(cli("presets", "--json").stdout)["presets"]]
    assert "mixtral" in names


def test_doctor_judges_every_subject(runs: Path, cli: Any) -> None:
    done = cli("doctor", "--json")
    said = json.loads(done.stdout)
    assert done.exit_code == (0 if said["ok"] else 1)
    checks = {c["name"]: c for c in said["checks"]}
    assert {"python", "torch", "driver", "GPU", "GPU kernels", "NVML", "terminal"} <= set(checks)
    assert all(c["remedy"] for c in said["checks"] if c["state"] != "ok")
    text = cli("doctor").stdout
    assert all(name in text for name in checks)


def test_doctor_fails_where_runs_cannot_be_saved(
    runs: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHMOE_RUNS", str(runs / "nowhere"))
    done = cli("doctor")
    assert done.exit_code == 1
    assert "mkdir -p" in done.stdout


@pytest.mark.parametrize(
    ("gpu", "torch", "runs_on"),
    [("ok", "ok", "the GPU"), ("ok", "warn", "the host engine"), ("warn", "ok", "the host engine")],
)
def test_doctor_says_where_runs_will_run(gpu: Any, torch: Any, runs_on: str) -> None:
    from flashmoe_cli.checks import Check
    from flashmoe_cli.output import Terminal
    from flashmoe_cli.render.doctor import doctor_lines

    checks = [Check("GPU", gpu, "x", "y"), Check("torch", torch, "x", "y")]
    assert f"runs on {runs_on}" in doctor_lines(checks, Terminal(80, False, True))[-1]


def complete(words: str, position: int, **env: str) -> list[str]:
    """What bash is offered for the word at ``position`` of a command line."""
    asked = {
        "_FLASHMOE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(position),
    }
    done = subprocess.run(
        [sys.executable, "-c", "from flashmoe_cli.main import main; main()"],
        capture_output=True,
        text=True,
        env=os.environ | PLACE | asked | env,
        check=False,
    )
    return done.stdout.split()


def test_tab_completes_verbs_presets_runs_and_choices(made_up: Any, runs: Path) -> None:
    made_up("mine.fmoe")
    assert "timeline" in complete("flashmoe time", 1)
    assert {"mixtral"} <= set(complete("flashmoe run mix", 2))
    assert complete("flashmoe timeline mi", 2) == ["mine.fmoe"]
    assert complete(f"flashmoe info {runs}/m", 2) == [f"{runs}/mine.fmoe"]
    assert complete("flashmoe run --world ho", 3) == ["host"]
    assert complete("flashmoe timeline --lane ma", 3) == ["math0", "math1"]


def test_a_closed_pipe_is_silent(made_up: Any) -> None:
    path = made_up()
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*ME, "timeline", str(path)],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=os.environ | PLACE,
        check=False,
    )
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 0


def test_a_closed_pipe_hides_no_failure(made_up: Any) -> None:
    path = made_up(iterations=4, capacity=60)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*ME, "timeline", "--strict", str(path)],
        stdout=writer,
        env=os.environ | PLACE,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 4


def test_a_full_stdout_is_one_line_and_no_traceback(made_up: Any) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*ME, "timeline", str(made_up())],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | PLACE,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: No space left on device")
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize(("verb", "code"), [("timeline", 0), ("export", 0), ("timelin", 2)])
def test_streams_that_are_closed_from_the_start_change_nothing(
    made_up: Any, stream: str, verb: str, code: int
) -> None:
    made_up()
    closed = f"{1 if stream == 'stdout' else 2}>&-"
    command = f"{shlex.join([*ME, verb])} {closed}"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, env=os.environ | PLACE, check=False
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr + done.stdout


def test_a_stderr_that_is_full_fails_nothing(made_up: Any) -> None:
    made_up()
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*ME, "export"],
            stdout=subprocess.PIPE,
            stderr=full,
            text=True,
            env=os.environ | PLACE,
            check=False,
        )
    assert done.returncode == 0
    assert "one.pftrace" in done.stdout


def test_a_terminal_without_unicode_stays_readable(made_up: Any) -> None:
    path = made_up()
    done = subprocess.run(
        [*ME, "timeline", str(path)],
        capture_output=True,
        env=os.environ | PLACE | {"PYTHONIOENCODING": "ascii", "FORCE_COLOR": "1"},
        check=True,
    )
    done.stdout.decode("ascii")
    assert b"GEMM1" in done.stdout


def test_a_ctrl_c_while_loading_is_no_traceback(tmp_path: Path) -> None:
    """As if it came while typer was being imported."""
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from flashmoe_cli.__main__ import"
    done = subprocess.run(
        [sys.executable, "-c", f"{script} main; main()"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")

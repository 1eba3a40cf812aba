"""Where flashmoe cannot run, the verbs that read still do: without torch, without an extension."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import flashmoe.trace as trace_package

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

#: What the marker in pyproject.toml leaves out elsewhere, and what is not compiled there.
BLOCKED = ("torch", "cuda", "nvtx", "pynvml", "flashmoe._host")

WITHOUT = """
import json, sys

paths, blocked = json.loads(sys.argv.pop(1))
sys.path[:] = paths


class Without:  # a finder for which what is blocked is not installed
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if any(name == b or name.startswith(b + ".") for b in blocked):
            return None
        return self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def python(script: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs ``script`` in a new interpreter for which nothing of BLOCKED is installed."""
    setting = json.dumps([sys.path, BLOCKED])
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + script, setting, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
    )


def flashmoe(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``flashmoe ARGUMENTS`` there."""
    return python("from flashmoe_cli.main import main\nmain()", *arguments, cwd=cwd)


def test_what_is_blocked_looks_as_if_it_were_not_installed(tmp_path: Path) -> None:
    done = python("import torch", cwd=tmp_path)
    assert "ModuleNotFoundError: No module named 'torch'" in done.stderr


def test_every_trace_module_imports(tmp_path: Path) -> None:
    names = [m.name for m in pkgutil.walk_packages(trace_package.__path__, "flashmoe.trace.")]
    assert "flashmoe.trace.schema" in names
    script = "import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = python(script, *names, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small made-up run, for a reader as good as a real one."""
    path = tmp_path_factory.mktemp("runs") / "made-up.fmoe"
    script = (
        "import sys, pathlib\n"
        "import synthetic\n"
        "shape = synthetic.Shape(ranks=2, sms=4, tokens=64, hidden=64, intermediate=64)\n"
        "synthetic.write(pathlib.Path(sys.argv[1]), shape)\n"
    )
    setting = json.dumps([str(BENCHMARKS), *sys.path])
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {setting}\n{script}", path], check=True
    )
    return path


@pytest.mark.parametrize("verb", ["info", "timeline", "traffic"])
def test_a_verb_that_reads_reads(trace: Path, verb: str) -> None:
    done = flashmoe(verb, trace, "--json", cwd=trace.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema"]


@pytest.mark.parametrize("form", ["perfetto", "chrome"])
def test_export_writes(trace: Path, tmp_path: Path, form: str) -> None:
    out = tmp_path / "out"
    done = flashmoe("export", trace, "--format", form, "-o", out, cwd=trace.parent)
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size > 1000


@pytest.mark.parametrize("arguments", [("--version", "-v"), ("--help",), ("presets",)])
def test_what_needs_no_run_works(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = flashmoe(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_running_says_in_one_line_what_is_missing(tmp_path: Path) -> None:
    done = flashmoe("run", "tiny", cwd=tmp_path)
    assert done.returncode not in (0, 2)
    assert "Traceback" not in done.stderr
    assert "torch is not installed" in done.stderr
    assert len(done.stderr.splitlines()) == 2

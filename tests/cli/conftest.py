"""A place for runs, made-up runs to read, and an engine of plain torch behind the session."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is both $FLASHMOE_RUNS and the working directory."""
    folder = tmp_path / "runs"
    folder.mkdir()
    monkeypatch.setenv("FLASHMOE_RUNS", str(folder))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(folder)
    return folder


def _load(path: Path) -> Any:
    """A module by its path: neither benchmarks/ nor tests/ is a package that is installed."""
    name = f"_loaded_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def made_up(runs: Path) -> Any:
    """Writes a made-up run: ``made_up("name.fmoe", ranks=2, iterations=3, capacity=100)``."""
    synthetic = _load(_ROOT / "benchmarks" / "synthetic.py")

    def write(name: str = "one.fmoe", **shape: Any) -> Path:
        small = {"ranks": 2, "sms": 3, "tokens": 96, "hidden": 64, "intermediate": 64}
        small |= {"experts": 6, "top_k": 2, "wall_us": 200.0}
        path = runs / name
        synthetic.write(path, synthetic.Shape(**(small | shape)))
        return path

    return write


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command line in this process: ``cli("timeline", "--json")`` gives typer's Result.

    It is 100 columns wide, whatever width whoever runs the tests has.
    """
    monkeypatch.setenv("COLUMNS", "100")
    from typer.testing import CliRunner

    from flashmoe_cli.main import app

    return lambda *args: CliRunner().invoke(app, list(args), prog_name="flashmoe")


@pytest.fixture
def golden() -> Any:
    """Holds text to tests/cli/golden/NAME; FLASHMOE_UPDATE_GOLDEN=1 writes it instead."""
    import os

    def hold(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if os.environ.get("FLASHMOE_UPDATE_GOLDEN"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8")

    return hold


@pytest.fixture
def torch_engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts ``TorchEngine`` where the session builds an engine; gives its class to set it up."""
    from flashmoe import session

    TorchEngine = _load(Path(__file__).with_name("torch_engine.py")).TorchEngine
    monkeypatch.setattr(TorchEngine, "spoil", None)
    monkeypatch.setattr(
        session, "build_engine", lambda world, request, inputs: TorchEngine.of(request, inputs)
    )
    return TorchEngine

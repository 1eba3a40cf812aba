"""What importing costs, and that reading a trace needs neither torch nor a compiled extension."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import flashmoe.trace

HEAVY = ("torch", "numpy", "pyarrow", "cuda", "pynvml", "transformers", "flashmoe._host")

#: Stands before a script: what only running needs cannot be imported.
BLOCK = """
import sys

BLOCKED = ("torch", "cuda", "nvtx", "pynvml", "flashmoe._host")


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if any(name == b or name.startswith(b + ".") for b in BLOCKED):
            raise ImportError(f"{name} is blocked")


sys.meta_path.insert(0, Blocker())
"""


def python(script: str, *arguments: str, cwd: Path | None = None) -> str:
    """Runs ``script`` in a new interpreter that sees what this one does; returns its stdout."""
    paths = json.dumps(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {paths}\n{script}", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_starting_imports_nothing_heavy() -> None:
    loaded = python(
        "import flashmoe, flashmoe.build_info, flashmoe.kernels, flashmoe_cli.main\n"
        "print(*sys.modules)"
    ).split()
    assert "flashmoe_cli.main" in loaded
    assert not set(HEAVY) & set(loaded)


def test_the_blocker_blocks() -> None:
    out = python(BLOCK + "try:\n  import torch\nexcept ImportError as e: print(e)")
    assert out == "torch is blocked\n"


def test_every_trace_module_imports_without_torch_or_extension() -> None:
    names = [m.name for m in pkgutil.walk_packages(flashmoe.trace.__path__, "flashmoe.trace.")]
    assert "flashmoe.trace.schema" in names
    python(
        BLOCK + "import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)", *names
    )


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(flashmoe.__file__).parent / "py.typed").is_file()

"""What starting costs, and what type checkers find."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import flashmoe

HEAVY = {"torch", "numpy", "pyarrow", "cuda", "pynvml", "transformers", "flashmoe._host"}


def test_starting_imports_nothing_heavy() -> None:
    script = (
        f"import sys; sys.path[:] = {json.dumps(sys.path)}\n"
        "import flashmoe, flashmoe.build_info, flashmoe.kernels, flashmoe_cli.main\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = done.stdout.split()
    assert "flashmoe_cli.main" in loaded
    assert not HEAVY & set(loaded)


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(flashmoe.__file__).parent / "py.typed").is_file()

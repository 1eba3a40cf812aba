"""Where runs lie and how they are called; imports nothing, so that TAB can ask it."""

from __future__ import annotations

import os
from pathlib import Path

SUFFIX = ".fmoe"
#: The link beside the runs that names the last one.
LATEST = "latest"
#: What no run can be called.
NO_NAMES = ("", "..", LATEST)


def run_path(given: Path) -> Path:
    """The run directory that a user's ``-o`` names: NAME and NAME.fmoe both mean NAME.fmoe."""
    if given.suffix == SUFFIX or given.name in NO_NAMES:
        return given
    return given.with_name(given.name + SUFFIX)


def runs_folder() -> Path:
    """Where runs are kept: $FLASHMOE_RUNS, or the working directory."""
    return Path(os.environ.get("FLASHMOE_RUNS") or ".")

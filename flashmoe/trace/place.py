"""Where runs lie and how they are called; imports nothing, so that TAB can ask it."""

from __future__ import annotations

import os
from pathlib import Path

SUFFIX = ".fmoe"
#: The link beside the runs that names the last one.
LATEST = "latest"


def runs_folder() -> Path:
    """Where runs are kept: $FLASHMOE_RUNS, or the working directory."""
    return Path(os.environ.get("FLASHMOE_RUNS") or ".")

"""What a person reads after an export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flashmoe_cli.output import Terminal
from flashmoe_cli.render.text import bytes_text, fit, plural

if TYPE_CHECKING:
    from flashmoe.trace.export import Exported

_OPEN = {
    "perfetto": "open it at https://ui.perfetto.dev (the file stays on this machine)",
    "chrome": "open it at chrome://tracing or https://ui.perfetto.dev",
}


def export_lines(run: Path, done: Exported, where: Terminal) -> list[str]:
    """What was written, and where to open it."""
    size = f"{bytes_text(done.size)}, {plural(done.slices, 'slice')}, {plural(done.flows, 'arrow')}"
    lines = (f"{run.name} -> {done.path}  ({size})", _OPEN[done.format])
    return [part for line in lines for part in fit(line, where.width, 2)]

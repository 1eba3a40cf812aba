"""The doctor's report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flashmoe_cli.output import Terminal
from flashmoe_cli.render.text import pad, paint, plural

if TYPE_CHECKING:
    from flashmoe_cli.checks import Check

_STYLE = {"ok": "32", "warn": "33", "fail": "1;31"}


def doctor_lines(checks: Sequence[Check], where: Terminal) -> list[str]:
    """One line a check, its remedy below it, and the sum in words."""
    width = max(len(c.name) for c in checks)
    lines = []
    for check in checks:
        state = paint(pad(check.state, 4), _STYLE[check.state], where.colour)
        lines.append(f"{state}  {pad(check.name, width)}  {check.found}")
        if check.remedy and check.state != "ok":
            lines.append(f"{' ' * (width + 8)}{paint('-> ' + check.remedy, '2', where.colour)}")
    fails = sum(c.state == "fail" for c in checks)
    states = {c.name: c.state for c in checks}
    on_gpu = states.get("GPU") == states.get("torch") == "ok"
    runs = "the GPU" if on_gpu else "the host engine"
    if fails:
        verdict = f"{plural(fails, 'check')} failed; see the remedies above"
    else:
        verdict = f"flashmoe works here and runs on {runs}; try: flashmoe trace tiny"
    return [*lines, "", verdict]

"""The doctor's report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flashmoe_cli.output import Terminal
from flashmoe_cli.render.text import fit, pad, paint, plural

if TYPE_CHECKING:
    from flashmoe_cli.checks import Check

_STYLE = {"ok": "32", "warn": "33", "fail": "1;31"}


def doctor_lines(checks: Sequence[Check], where: Terminal) -> list[str]:
    """One line a check, its remedy below it, and the sum in words."""
    width = max(len(c.name) for c in checks)
    lines = []
    for check in checks:
        state = paint(pad(check.state, 4), _STYLE[check.state], where.colour)
        found = f"{state}  {pad(check.name, width)}  {check.found}"
        lines += fit(found, where.width, width + 8)
        if check.remedy and check.state != "ok":
            indent = " " * min(width + 8, where.width // 2)
            remedy = fit(f"{indent}-> {check.remedy}", where.width, width + 11)
            lines += [paint(line, "2", where.colour) for line in remedy]
    fails = sum(c.state == "fail" for c in checks)
    states = {c.name: c.state for c in checks}
    on_gpu = states.get("GPU") == states.get("torch") == "ok"
    runs = "the GPU" if on_gpu else "the host engine"
    if fails:
        verdict = f"{plural(fails, 'check')} failed; see the remedies above"
    else:
        verdict = f"flashmoe works here and runs on {runs}; try: flashmoe trace tiny"
    return [*lines, "", *fit(verdict, where.width)]

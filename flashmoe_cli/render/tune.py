"""The table of a tuning."""

from __future__ import annotations

from typing import Any

from flashmoe_cli.output import Terminal
from flashmoe_cli.render.text import clip, table


def tune_lines(report: dict[str, Any], where: Terminal) -> list[str]:
    """Each layer's cuts beside the untuned one, and what was chosen."""
    lines: list[str] = []
    for result in report["results"]:
        tokens = ", ".join(map(str, result["tokens"]))
        lines.append(
            f"{result['preset']} (H {result['H']}, I {result['I']}, {result['dtype']}), T {tokens}"
        )
        head = ("rows", "waves", "to untuned", "at most", *(f"T {t} ms" for t in result["tokens"]))
        rows = [
            (
                str(score["tile_rows"]),
                str(score["waves"]),
                f"{score['ratio']:.4f}",
                f"{score['high']:.4f}",
                *(f"{ms:.3f}" for ms in score["ms"]),
            )
            for score in result["scores"]
        ]
        lines += table(head, rows, (True,) * len(head), where.width, "  ")
        cut = result["chosen"]
        chosen = f"{cut['tile_rows']} rows, {cut['waves']} waves"
        verdict = f"chosen: {chosen}" if result["tuned"] else f"nothing is surely ahead of {chosen}"
        lines += [f"  {verdict}", ""]
    table_ = report["table"]
    written = "written nowhere (--dry-run)" if table_ is None else f"written to {table_}"
    return [*(clip(line, where.width) for line in lines), written]  # a path whole, to be copied

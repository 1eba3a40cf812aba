"""What the GPUs' NVLink counters say, beside the payload."""

from __future__ import annotations

from typing import Any

from flashmoe.trace.links import WAYS
from flashmoe_cli.render.text import bytes_text, plural, table


def link_text(figures: dict[str, Any]) -> str:
    """All GPUs together, in a line."""
    total = figures["total"]
    if total is None:
        return f"this driver gives no NVLink counters: {figures['why']}"
    text = f"{bytes_text(total['data'])} of data a launch"
    if total["data_over_payload"] is not None:
        text += f", {total['data_over_payload']:.3f} times the payload"
    text += f"; {bytes_text(total['raw'])} with headers"
    if total["raw_over_payload"] is not None:
        text += f", {total['raw_over_payload']:.3f} times"
    text += f" (the GPUs' counters, {plural(figures['launches'], 'launch', 'launches')}"
    if not figures["certain"]:
        text += "; uncertain: few bytes, or others' among them"
    if figures["why"]:
        text += f"; not of all: {figures['why']}"
    return f"{text})"


def link_lines(figures: dict[str, Any], width: int, indent: str) -> list[str]:
    """Each GPU's bytes a launch in a table; empty without counters.

    As much payload leaves a GPU as reaches it: what is sent for a row that crosses comes back.
    """
    if figures["total"] is None:
        return []
    head = ["rank", "payload", "data sent", "received", "with headers sent", "received"]
    rows = []
    for gpu in figures["gpus"]:
        row = [",".join(map(str, gpu["ranks"])), bytes_text(gpu["payload_tx"])]
        for name in ("data", "raw"):
            for way in WAYS:
                moved, ratio = gpu[f"{name}_{way}"], gpu[f"{name}_over_payload_{way}"]
                cell = "-" if moved is None else bytes_text(moved)
                row.append(cell if ratio is None else f"{cell} x{ratio:.3f}")
        rows.append(row)
    return table(head, rows, [True] * len(head), width, indent)

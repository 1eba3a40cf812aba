"""The table of presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flashmoe_cli.output import Terminal
from flashmoe_cli.render.text import table

if TYPE_CHECKING:
    from flashmoe.presets import Preset


def preset_lines(presets: Mapping[str, Preset], where: Terminal) -> list[str]:
    """One line a preset: its dimensions, its default tokens per rank, and where it comes from."""
    head = ("preset", "T", "H", "I", "E", "k", "act", "dtype", "from")
    rows = []
    for name, preset in presets.items():
        c = preset.config
        sizes = (preset.tokens, c.hidden, c.intermediate, c.experts, c.top_k)
        rows.append((name, *map(str, sizes), c.activation, c.dtype, preset.description))
    right = (False, True, True, True, True, True, False, False, False)
    return [
        *table(head, rows, right, where.width),
        "",
        "T tokens per rank, H model width, I expert width, E experts, k experts of a token",
        "Any of them can be set: flashmoe trace mixtral -T 512 --ranks 4",
    ]

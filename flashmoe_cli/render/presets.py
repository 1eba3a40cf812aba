"""The table of presets."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import wrap
from typing import TYPE_CHECKING

from flashmoe_cli.output import Terminal
from flashmoe_cli.render.text import fit, table

if TYPE_CHECKING:
    from flashmoe.presets import Preset


def preset_lines(presets: Mapping[str, Preset], where: Terminal) -> list[str]:
    """A line a preset: its sizes and default tokens per rank; then where each comes from."""
    head = ("preset", "T", "H", "I", "E", "k", "act", "dtype", "routing")
    rows = []
    for name, preset in presets.items():
        c = preset.config
        sizes = (preset.tokens, c.hidden, c.intermediate, c.experts, c.top_k)
        rows.append((name, *map(str, sizes), c.activation, c.dtype, c.routing.kind))
    right = (False, True, True, True, True, True, False, False, False)
    width = max(map(len, presets))
    lines = table(head, rows, right, where.width)
    sizes_text = "T tokens per rank, H model width, I expert width, E experts, k experts of a token"
    lines += ["", *wrap(sizes_text, where.width), ""]
    for name, preset in presets.items():
        indent = " " * (width + 2)
        text = f"{name:<{width}}  {preset.description}"
        lines += wrap(text, where.width, subsequent_indent=indent)
    how = "Any of them can be set: flashmoe trace mixtral -T 512 --ranks 4"
    return [*lines, "", *fit(how, where.width, 2)]

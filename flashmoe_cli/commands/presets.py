"""``flashmoe presets``."""

from __future__ import annotations

from flashmoe_cli.options import Json
from flashmoe_cli.output import SCHEMA, emit, terminal


def presets(as_json: Json = False) -> None:
    """Lists the shapes that have a name."""
    from flashmoe.presets import PRESETS
    from flashmoe_cli.render.presets import preset_lines

    if as_json:
        shapes = [
            {"name": n, "tokens": p.tokens, "description": p.description, **p.config.to_dict()}
            for n, p in PRESETS.items()
        ]
        emit({"schema": SCHEMA, "verb": "presets", "presets": shapes})
    else:
        emit(preset_lines(PRESETS, terminal()))

"""``flashmoe --version`` as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from flashmoe_cli.output import SCHEMA, Terminal
from flashmoe_cli.render.text import fit


def version_lines(verbose: bool, where: Terminal) -> list[str]:
    """One line; with ``verbose`` the build in full: engines, kernels, compilers."""
    from flashmoe.build_info import build_info

    info = build_info()
    lines = info.lines() if verbose else [f"flashmoe {info.version} ({info.revision})"]
    return [part for line in lines for part in fit(line, where.width, 2)]


def version_json() -> dict[str, Any]:
    """The same as one object."""
    from flashmoe.build_info import build_info

    return {"schema": SCHEMA, "build": asdict(build_info())}

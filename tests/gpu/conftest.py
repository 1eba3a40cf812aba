"""Tests that need a GPU of compute capability 9.0; skipped, with the reason, where there is none.

``make gpu-test`` sets FLASHMOE_REQUIRE_GPU=1, which turns a missing GPU into a failure.
"""

from __future__ import annotations

import os

import pytest

from flashmoe.errors import FlashmoeError


def _why_not() -> str:
    """Why the ``local`` world cannot run here, or nothing."""
    from flashmoe.session import choose_world

    try:
        choose_world("local", 0)
    except FlashmoeError as exc:
        return exc.message
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    ours = [item for item in items if str(item.path).startswith(here)]
    if not ours:
        return
    why = _why_not()
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        if why and not os.environ.get("FLASHMOE_REQUIRE_GPU"):
            item.add_marker(pytest.mark.skip(reason=f"no usable GPU: {why}"))

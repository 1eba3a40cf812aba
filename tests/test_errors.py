"""Every message and hint of a FlashmoeError is written in one style."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCES = [
    path
    for package in ("flashmoe", "flashmoe_cli")
    for path in sorted((Path(__file__).parents[1] / package).rglob("*.py"))
]
# What makes a FlashmoeError of a message and a hint, by name.
MAKERS = {"FlashmoeError"} | {
    node.name
    for path in SOURCES
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.FunctionDef)
    and getattr(node.returns, "id", "") in ("FlashmoeError", "NoReturn")
}


def texts(node: ast.AST) -> Iterator[str]:
    """What a message's expression may give, with ``{}`` for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
        yield "".join(map(str, parts))
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)


def messages(tree: ast.AST) -> Iterator[str]:
    """Messages and hints that are handed to FlashmoeError, also by a function that makes one, or
    are named so on the way there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in MAKERS:
            given = [*node.args[:2], *(k.value for k in node.keywords if k.arg == "hint")]
        elif isinstance(node, ast.Assign):
            pairs = [
                pair
                for target in node.targets
                for pair in (
                    zip(target.elts, node.value.elts, strict=False)
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                    else [(target, node.value)]
                )
            ]
            given = [v for name, v in pairs if getattr(name, "id", "") in ("message", "hint")]
        else:
            continue
        for value in given:
            yield from texts(value)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(Path(*p.parts[-2:])))
def test_messages_begin_in_lower_case_and_end_without_a_period(path: Path) -> None:
    wrong = [
        text
        for text in messages(ast.parse(path.read_text(encoding="utf-8")))
        if re.match(r"[A-Z][a-z ]", text) or text.endswith(".")
    ]
    assert wrong == []


def test_there_are_messages_to_hold_to_the_style() -> None:
    found = [m for path in SOURCES for m in messages(ast.parse(path.read_text(encoding="utf-8")))]
    assert len(found) > 100

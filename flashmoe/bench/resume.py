"""Going on with a report that an earlier command wrote: what must be the same, and what is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from flashmoe.bench.shapes import Shape, shape_key
from flashmoe.errors import FlashmoeError


def check_same(now: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Raises FlashmoeError (exit code 2) where ``earlier`` is of another environment or method.

    Figures of one report are compared with each other, so all of them must be of one machine, one
    build and one way to measure.
    """
    differences = [
        f"{name} {was} then, {now_} now"
        for part in ("environment", "method")
        for name, was, now_ in _differing(_telling(earlier[part]), _telling(now[part]))
    ]
    if differences:
        raise FlashmoeError(
            f"what was measured earlier does not go with this: {'; '.join(differences)}",
            "use the same machine, build and options, or begin a new file",
            2,
        )


def _telling(part: dict[str, Any]) -> dict[str, Any]:
    """What must be the same: a clean commit says what the kernels are, wherever they were built."""
    commit = str(part.get("commit", "unknown"))
    settled = commit != "unknown" and not commit.endswith("+dirty")
    return {k: v for k, v in part.items() if not (settled and k == "kernels")}


def _differing(was: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in dict.fromkeys([*was, *now]):
        if was.get(name) != now.get(name):
            yield name, was.get(name), now.get(name)


def take_over(
    results: Sequence[dict[str, Any]], shapes: Sequence[Shape]
) -> tuple[list[dict[str, Any]], list[Shape]]:
    """The earlier results, and those of ``shapes`` that they lack or hold an ``error`` for."""
    good = {shape_key(result) for result in results if not result["error"]}
    return list(results), [s for s in shapes if shape_key(s.described()) not in good]

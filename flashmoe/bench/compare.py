"""A bench beside an earlier one: what became slower, and whether that is more than noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashmoe.bench.report import SCHEMA
from flashmoe.bench.shapes import shape_key
from flashmoe.errors import FlashmoeError


def read_report(path: Path, mode: str) -> dict[str, Any]:
    """An object that ``flashmoe bench --json --mode MODE`` wrote.

    Raises FlashmoeError (exit code 2) where the file is none, is of another mode, or of a newer
    version than this one reads.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise FlashmoeError(
            f"{path} can't be read: {exc.strerror}", "name a file that bench --json wrote", 2
        ) from exc
    except ValueError as exc:
        raise FlashmoeError(
            f"{path} is no JSON: {exc}", "name a file that bench --json wrote", 2
        ) from exc
    parts = {"environment": dict, "method": dict, "results": list}
    if (
        not isinstance(report, dict)
        or report.get("verb") != "bench"
        or not all(isinstance(report.get(name), kind) for name, kind in parts.items())
    ):
        raise FlashmoeError(
            f"{path} is no result of a bench", "name a file that bench --json wrote", 2
        )
    if report.get("schema", 0) > SCHEMA:
        raise FlashmoeError(
            f"{path} is of version {report['schema']}, and this flashmoe reads up to {SCHEMA}",
            "read it with the flashmoe that wrote it, or a newer one",
            2,
        )
    if report.get("mode") != mode:
        raise FlashmoeError(
            f"{path} holds the mode {report.get('mode')}, and this is {mode}",
            "name a file of the same mode",
            2,
        )
    return report


def compare(now: dict[str, Any], before: dict[str, Any], path: str) -> dict[str, Any]:
    """Our times of both, a line a shape that both hold and that ran before.

    ``ratio`` is now / before of the medians: above 1 is slower.  ``spread_now`` and
    ``spread_before`` are the quartiles' distances over the medians, ``beyond_spread`` whether the
    two ranges of quartiles lie apart.  ``dense_ratio`` is the same ratio of the dense GEMMs: what
    the machine itself changed.  ``same_gpu``: of one model; ``same_device``: the very same, by its
    UUID; None where one of them is not known.
    """
    earlier = {shape_key(result): result for result in before["results"]}
    lines = []
    for result in now["results"]:
        other = earlier.get(shape_key(result))
        if other is not None and other["ours_ms"]:
            lines.append(_line(result, other))
    here, there = now["environment"], before["environment"]
    return {
        "file": path,
        "gpu": there.get("gpu"),
        "same_gpu": here.get("gpu") == there.get("gpu"),
        "same_device": _same(here.get("uuid"), there.get("uuid")),
        "commit": there.get("commit"),
        "results": lines,
    }


def regressions(comparison: dict[str, Any], limit: float) -> list[dict[str, Any]]:
    """The lines that are slower by more than ``limit`` (0.05: 5 %), or that no longer run."""
    return [
        line for line in comparison["results"] if line["ratio"] is None or line["ratio"] > 1 + limit
    ]


def _same(here: str | None, there: str | None) -> bool | None:
    return None if here is None or there is None else here == there


def _line(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    ours, earlier = now["ours_ms"], before["ours_ms"]
    a, b = now["spread"].get("ours"), before["spread"].get("ours")
    apart = bool(a and b and (a["q1_ms"] > b["q3_ms"] or a["q3_ms"] < b["q1_ms"]))
    both_dense = now["dense_ms"] and before["dense_ms"]
    return {
        **_names(now),
        "now_ms": ours,
        "before_ms": earlier,
        "ratio": ours / earlier if ours else None,
        "dense_ratio": now["dense_ms"] / before["dense_ms"] if both_dense else None,
        "spread_now": _relative(a, ours),
        "spread_before": _relative(b, earlier),
        "beyond_spread": apart,
    }


def _names(result: dict[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in ("preset", "T")}


def _relative(spread: dict[str, Any] | None, median: float | None) -> float | None:
    return (spread["q3_ms"] - spread["q1_ms"]) / median if spread and median else None


def parse_limit(text: str) -> float:
    """``5%`` or ``0.05`` as 0.05.  Raises FlashmoeError (exit code 2) for anything else."""
    number, percent = (text[:-1], True) if text.endswith("%") else (text, False)
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise FlashmoeError(f"--fail-over {text} is no share", "write it as 5% or 0.05", 2)
    return value


def command_words(argv: Sequence[str]) -> list[str]:
    """The command as a person typed it: ``flashmoe`` for whatever file started it.

    The wheel is named without the folders it lies in: a report is read elsewhere.
    """
    words = ["flashmoe", *argv[1:]]
    flag = "--sglang-wheel"
    for at, word in enumerate(words):
        if word == flag and at + 1 < len(words):
            words[at + 1] = Path(words[at + 1]).name
        elif word.startswith(f"{flag}="):
            words[at] = f"{flag}={Path(word.partition('=')[2]).name}"
    return words

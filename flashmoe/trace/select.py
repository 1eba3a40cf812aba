"""What a reader names on the command line: SMs, lanes and windows of time."""

from __future__ import annotations

import re

from flashmoe.errors import FlashmoeError
from flashmoe.trace.schema import LANE_NAME

_UNITS = {"ns": 1, "us": 1_000, "µs": 1_000, "ms": 1_000_000, "s": 1_000_000_000}
_TIME = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(ns|us|µs|ms|s)?\s*")


def parse_sms(text: str) -> list[int]:
    """SMs from "17", "17-31" or "0,4,8-11", ascending; raises FlashmoeError (exit code 2)."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise FlashmoeError(f"{text!r} names no SMs.", "Write e.g. 17, 17-31 or 0,4,8-11.", 2)
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(found)


def parse_window(text: str) -> tuple[int, int | None]:
    """Begin and end in ns from the start, of "10us..40us", "1.5ms.." (end None) or "..40us".

    A number without a unit takes the other's unit, else it is microseconds.  Raises FlashmoeError
    (exit code 2) where it is no window, or an empty one.
    """
    wrong = FlashmoeError(
        f"{text!r} is no window of time.", "Write e.g. 10us..40us, 1.5ms.. or ..200us.", 2
    )
    parts = text.split("..")
    if len(parts) != 2 or not any(part.strip() for part in parts):
        raise wrong
    matches = [_TIME.fullmatch(part) if part.strip() else None for part in parts]
    if any(part.strip() and match is None for part, match in zip(parts, matches, strict=True)):
        raise wrong
    unit = next((m[2] for m in reversed(matches) if m is not None and m[2]), "us")
    begin, end = (None if m is None else round(float(m[1]) * _UNITS[m[2] or unit]) for m in matches)
    if end is not None and end <= (begin or 0):
        raise wrong
    return begin or 0, end


def parse_lanes(text: str) -> list[str]:
    """Lanes from "math0", "math0,load" or "math" (all whose name begins so); FlashmoeError (2)."""
    names = list(LANE_NAME.values())
    found = []
    for part in (p.strip() for p in text.split(",")):
        fitting = [name for name in names if name == part] or [
            name for name in names if part and name.startswith(part)
        ]
        if not fitting:
            raise FlashmoeError(f"There is no lane {part!r}.", f"Lanes: {', '.join(names)}.", 2)
        found += fitting
    return [name for name in names if name in found]

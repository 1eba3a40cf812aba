"""What part of a run to look at: ``--sm 17-31``, ``--window 10us..40us``."""

from __future__ import annotations

import re

from flashmoe.errors import FlashmoeError

_UNITS = {"ns": 1.0, "us": 1e3, "µs": 1e3, "ms": 1e6, "s": 1e9}
#: No run has an SM above it; what a list may ask for is bounded, since it is expanded.
_LAST_SM = 0xFFFF
_TIME = re.compile(r"([0-9]*\.?[0-9]+)\s*(ns|us|µs|ms|s)?")


def parse_sms(text: str | None) -> list[int] | None:
    """``3``, ``17-31`` or ``0,4,8-11`` as sorted SM numbers; None: all."""
    if text is None:
        return None
    sms: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]+)\s*(?:(?:-|\.\.)\s*([0-9]+))?\s*", part)
        if found is None:
            raise _usage(
                f"--sm {text} is not a list of SMs", "write --sm 3, --sm 17-31 or --sm 0,4-7"
            )
        if any(len(n.lstrip("0")) > 5 or int(n) > _LAST_SM for n in found.groups() if n):
            raise _usage(f"--sm {text} goes beyond any GPU", f"SMs are numbered 0 to {_LAST_SM}")
        first = int(found[1])
        last = int(found[2]) if found[2] else first
        if last < first:
            raise _usage(f"--sm {text} runs backwards", f"write --sm {last}-{first}")
        sms.update(range(first, last + 1))
    return sorted(sms)


def parse_window(text: str | None) -> tuple[float, float | None] | None:
    """``10us..40us`` as nanoseconds from the iteration's start; an open side is its edge.

    A unit that stands only at the end serves for both: ``10..40us``.  None: all of it.
    """
    if text is None:
        return None
    left, dots, right = text.partition("..")
    unit = _unit(right) or _unit(left)
    if not dots or not (left.strip() or right.strip()):
        raise _bad_window(text)
    a = _ns(left, unit, text) if left.strip() else 0.0
    b = _ns(right, unit, text) if right.strip() else None
    if b is not None and b <= a:
        raise _usage(f"--window {text} is empty", "the end must be later than the beginning")
    return a, b


def _unit(text: str) -> str | None:
    found = _TIME.fullmatch(text.strip())
    return found[2] if found else None


def _ns(text: str, unit: str | None, whole: str) -> float:
    found = _TIME.fullmatch(text.strip())
    if found is None or not (found[2] or unit):
        raise _bad_window(whole)
    return float(found[1]) * _UNITS[found[2] or unit or "ns"]


def _bad_window(text: str) -> FlashmoeError:
    return _usage(
        f"--window {text} is not a stretch of time",
        "write --window 10us..40us, --window 1ms.. or --window ..500ns",
    )


def _usage(message: str, hint: str) -> FlashmoeError:
    return FlashmoeError(message, hint, exit_code=2)

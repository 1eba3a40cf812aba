"""Small pieces of text: aligned tables, figures with units, colour."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from textwrap import wrap

_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def visible(text: str) -> int:
    """Columns that ``text`` takes on a terminal, escapes left out."""
    return len(_ESCAPE.sub("", text))


def clip(text: str, width: int) -> str:
    """``text`` in at most ``width`` columns; what is cut off shows as a dot row (``..``)."""
    if visible(text) <= width:
        return text
    plain = _ESCAPE.sub("", text)
    return plain[: max(width - 2, 0)] + ".."


def fit(text: str, width: int, indent: int = 0) -> list[str]:
    """``text`` in lines of at most ``width`` columns, all but the first ``indent`` columns in.

    The indent takes half of the width at most.  A word that is wider than a line, a path say, stays
    whole, so that it can be copied.
    """
    if visible(text) <= width:
        return [text]
    return wrap(
        text,
        width,
        subsequent_indent=" " * min(indent, width // 2),
        break_long_words=False,
        break_on_hyphens=False,
    )


def command_lines(command: str, width: int, indent: str) -> list[str]:
    """A command line that a shell takes as it stands, in lines of at most ``width`` columns.

    A word that is wider, a path say, stays whole: within quotes a shell joins no lines.
    """
    if len(indent + command) <= width:
        return [indent + command]
    first, *words = (shlex.quote(word) for word in shlex.split(command))
    lines = [indent + first]
    for word in words:
        if len(lines[-1]) + 1 + len(word) + 2 <= width:
            lines[-1] += f" {word}"
        else:
            lines[-1] += " \\"
            lines.append(f"{indent}  {word}")
    return lines


def pad(text: str, width: int, right: bool = False) -> str:
    """``text`` filled with spaces to ``width`` columns, at the left where ``right``-aligned."""
    space = " " * max(width - visible(text), 0)
    return space + text if right else text + space


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[bool],
    width: int,
    indent: str = "",
) -> list[str]:
    """Aligned lines under a heading.

    Columns that do not fit ``width`` follow in tables below, each beginning with the first column.
    """
    sizes = [max(visible(r[i]) for r in (head, *rows)) for i in range(len(head))]
    lines: list[str] = []
    for columns in _fitting(sizes, width - len(indent)):
        for row in (head, *rows):
            cells = [pad(row[i], sizes[i], right[i]) for i in columns]
            lines.append(clip((indent + "  ".join(cells)).rstrip(), width))
    return lines


def _fitting(sizes: Sequence[int], width: int) -> list[list[int]]:
    """Columns of ``sizes`` in groups that fit ``width``, each with column 0 and one more at least.

    A last column alone that is too wide stays where it is: it is text, and gives way at its end.
    """
    groups = [[0]]
    used = sizes[0]
    for i, size in enumerate(sizes[1:], 1):
        fits = used + 2 + size <= width or len(groups[-1]) == 1
        if not fits and sizes[0] + 2 + size <= width:
            groups.append([0])
            used = sizes[0]
        groups[-1].append(i)
        used += 2 + size
    return groups


def paint(text: str, code: str, colour: bool) -> str:
    """``text`` in an SGR style (``1`` bold, ``2`` dim, ``32`` green), or as it is."""
    return f"\x1b[{code}m{text}\x1b[0m" if colour and text else text


def bytes_text(n: float) -> str:
    """A number of bytes with a decimal unit: 312 B, 1.53 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(n) < 1000 or unit == "TB":
            return f"{n:.0f} B" if unit == "B" else f"{_digits(n)} {unit}"
        n /= 1000
    raise AssertionError("unreachable")


def time_text(ns: float) -> str:
    """A duration with a unit: 850 ns, 12.4 us, 3.05 ms."""
    for unit in ("ns", "us", "ms"):
        if abs(ns) < 1000:
            return f"{ns:.0f} ns" if unit == "ns" else f"{_digits(ns)} {unit}"
        ns /= 1000
    return f"{_digits(ns)} s"


def rate_text(gb_per_s: float) -> str:
    """A rate in GB/s, without its unit: three significant digits, never in exponent form."""
    return f"{gb_per_s:.0f}" if gb_per_s >= 999.5 else f"{gb_per_s:.3g}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share of one in percent; a dash where there is none."""
    return "-" if share is None else f"{100 * share:.{digits}f}%"


def count_text(n: int) -> str:
    """A number with thin groups: 12 345."""
    return f"{n:,}".replace(",", " ")


def plural(n: int, one: str, many: str | None = None) -> str:
    """``1 rank``, ``2 ranks``."""
    return f"{count_text(n)} {one if n == 1 else many or one + 's'}"


def _digits(value: float) -> str:
    """Three significant digits, never in exponent form."""
    size = abs(value)
    return f"{value:.0f}" if size >= 99.95 else f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"

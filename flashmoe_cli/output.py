"""What leaves the process: text, JSON and errors, and what the terminal there can show."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TextIO

#: Version of every object that ``--json`` prints.
SCHEMA = 1
#: What $COLUMNS may be; anything else counts as not set.
_COLUMNS = re.compile(r"[0-9]{1,5}")


@dataclass(frozen=True)
class Terminal:
    """What a stream can show: columns, colour, characters beyond ASCII, lines (0: unknown)."""

    width: int
    colour: bool
    unicode: bool
    height: int = 0


def terminal(stream: TextIO | None = None) -> Terminal:
    """Describes ``stream`` (stdout): $COLUMNS, NO_COLOR, FORCE_COLOR and TERM are honoured."""
    stream = sys.stdout if stream is None else stream
    tty = is_tty(stream)
    colour = tty and os.environ.get("TERM", "") != "dumb"
    if os.environ.get("FORCE_COLOR"):
        colour = True
    if os.environ.get("NO_COLOR"):
        colour = False
    columns = os.environ.get("COLUMNS", "")
    size = shutil.get_terminal_size((100, 24))
    asked = int(columns) if _COLUMNS.fullmatch(columns) else 0
    width = asked or (size.columns if tty else 100)
    encoding = (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "")
    height = size.lines if tty else 0
    return Terminal(max(width, 20), colour, encoding.startswith("utf"), height)


def emit(what: str | Iterable[str] | Mapping[str, Any]) -> None:
    """Prints text, lines, or one JSON object to stdout; silent once the reader has gone.

    A reader that stops early (``| head``) is no failure: the rest is dropped, and the command
    still ends with the exit code of its own outcome.
    """
    if isinstance(what, Mapping):
        text = json.dumps(what, indent=2, allow_nan=False, default=_plain)
    elif isinstance(what, str):
        text = what
    else:
        text = "\n".join(what)
    _write(sys.stdout, text + "\n")


def note(text: str) -> None:
    """Prints one line to stderr: progress and remarks that are no result, so it never fails."""
    with suppress(OSError):
        _write(sys.stderr, text + "\n")


def show_error(message: str, hint: str, exit_code: int, *, as_json: bool) -> None:
    """Prints an error: one line of what, one of what to do; as an object on stdout with --json."""
    if as_json:
        error = {"message": message, "hint": hint, "exit_code": exit_code}
        emit({"schema": SCHEMA, "error": error})
        return
    where = terminal(sys.stderr)
    mark = "\x1b[1;31merror:\x1b[0m" if where.colour else "error:"
    note(f"{mark} {message}")
    if hint:
        mark = "\x1b[1mhint:\x1b[0m " if where.colour else "hint: "
        note(f"{mark} {hint}")


def flush() -> None:
    """Flushes both streams; a closed pipe is silent, and so is a stderr that nobody can read."""
    _write(sys.stdout, "")
    with suppress(OSError):
        _write(sys.stderr, "")


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:  # closed by who started us: nobody is there to read
        return
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, "replace").decode(encoding))
        stream.flush()
    except OSError as exc:
        # The interpreter flushes again at exit: give it somewhere to flush to.
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, stream.fileno())
        os.close(sink)
        if not isinstance(exc, BrokenPipeError):
            raise OSError(exc.errno, exc.strerror, stream.name) from exc
    except ValueError:
        if not stream.closed:
            raise


def is_tty(stream: TextIO | None) -> bool:
    """Whether ``stream`` is there and a terminal."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays, paths and tuples as JSON has them."""
    for method in ("tolist", "item"):
        if hasattr(value, method):
            return getattr(value, method)()
    if hasattr(value, "__fspath__"):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} does not go into JSON")

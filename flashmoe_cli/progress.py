"""Progress on stderr: a moving line on a terminal, plain lines elsewhere, nothing with -q."""

from __future__ import annotations

import sys
import time

from flashmoe_cli.output import is_tty, note, terminal

_BAR = 24
_REDRAW_S = 0.05


class Progress:
    """Shows phases as they begin and steps as they pass; a context manager that clears up.

    An instance is the callback that ``flashmoe.session`` takes: called with the phase's name, and
    where the phase has steps, with how many are done and how many there are.
    """

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._tty = is_tty(sys.stderr)
        self._phase = ""
        self._began = time.monotonic()
        self._drawn = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self._clear()

    def __call__(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Reports that ``phase`` runs, ``done`` of ``total`` steps into it (0 of 0: no steps)."""
        if self._quiet:
            return
        if not self._tty:
            if phase != self._phase:
                note(phase)
            self._phase = phase
            return
        now = time.monotonic()
        if phase == self._phase and done < total and now - self._drawn < _REDRAW_S:
            return
        self._phase, self._drawn = phase, now
        text = phase
        if total:
            full = _BAR * done // total
            text = f"{phase}  {'━' * full}{'╌' * (_BAR - full)}  {done}/{total}"
        if now - self._began > 1:
            text += f"  {now - self._began:.0f} s"
        sys.stderr.write("\r\x1b[2K" + text[: terminal(sys.stderr).width - 1])
        sys.stderr.flush()

    def say(self, text: str) -> None:
        """Prints a line that is no progress, above the bar; -q does not silence it."""
        self._clear()
        note(text)

    def _clear(self) -> None:
        if self._tty and self._phase and not self._quiet:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()

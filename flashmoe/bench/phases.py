"""Where the time of one shape's bench goes: its phases, reported as they begin, and timed."""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[[str, int, int], None]


class Phases:
    """Phases in a row; each ends where the next begins.

    A phase is to end when the device has done its work, or the next one is charged for it.
    """

    def __init__(self, label: str, progress: Progress) -> None:
        self._label, self._progress = label, progress
        self._seconds: dict[str, float] = {}
        self._now = ""
        self._since = time.monotonic()

    def __call__(self, name: str) -> None:
        """``name`` begins; one that has been there before goes on."""
        self._end()
        self._now = name
        self._progress(f"{self._label}: {name}", 0, 0)

    def seconds(self) -> dict[str, float]:
        """Ends the last phase: seconds of each, by the host's clock, in order."""
        self._end()
        return dict(self._seconds)

    def _end(self) -> None:
        now = time.monotonic()
        if self._now:
            self._seconds[self._now] = self._seconds.get(self._now, 0.0) + now - self._since
        self._now, self._since = "", now

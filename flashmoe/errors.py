"""The one error a user is meant to read."""

from __future__ import annotations

EXIT_WRONG = 1
"""A wrong result, or any failure without a code of its own."""
EXIT_NO_GPU = 5
"""A GPU was asked for and none is usable."""
EXIT_HANG = 124
"""A wait passed its deadline."""
EXIT_STOPPED = 130
"""Ctrl-C or SIGTERM."""


def one_line(exc: BaseException) -> str:
    """Somebody else's exception as a reason within a sentence: its kind and its first line."""
    text = str(exc).strip()
    return f"{type(exc).__name__}: {text.splitlines()[0]}" if text else type(exc).__name__


class FlashmoeError(Exception):
    """A failure with a remedy: one line of what went wrong, one line of what to do about it.

    ``exit_code`` is what the command line ends with (2 usage, 5 no usable GPU, ...; 1 otherwise).
    It is caught once, in the command line's ``main``; a library user sees an ordinary exception.
    """

    def __init__(self, message: str, hint: str = "", exit_code: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message

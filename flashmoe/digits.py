"""Numbers that other programs, or people, write as text."""

from __future__ import annotations


def whole_number(text: str) -> int | None:
    """The number that ``text`` writes in digits, spaces around it aside; None where it is none.

    Digits beyond ASCII count as none, and so do more than 64 bits hold.
    """
    text = text.strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None

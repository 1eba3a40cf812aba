"""--sm and --window, as a person may write them."""

from __future__ import annotations

import pytest

from flashmoe.errors import FlashmoeError
from flashmoe_cli.selection import parse_sms, parse_window


@pytest.mark.parametrize(
    ("text", "sms"),
    [
        (None, None),
        ("3", [3]),
        ("17-19", [17, 18, 19]),
        ("17..19", [17, 18, 19]),
        ("8,0-2,1", [0, 1, 2, 8]),
    ],
)
def test_sms(text: str | None, sms: list[int] | None) -> None:
    assert parse_sms(text) == sms


BEYOND = ("²", "65536", "0-4000000000", "9" * 5000)


@pytest.mark.parametrize("text", ["", "a", "3-", "5-2", "1,,2", *BEYOND])
def test_bad_sms_are_usage_errors(text: str) -> None:
    with pytest.raises(FlashmoeError) as caught:
        parse_sms(text)
    assert caught.value.exit_code == 2
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "window"),
    [
        (None, None),
        ("10us..40us", (10_000, 40_000)),
        ("10..40us", (10_000, 40_000)),
        ("10us..40", (10_000, 40_000)),
        ("0.5ms..", (500_000, None)),
        ("..250ns", (0, 250)),
        ("1us .. 1ms", (1_000, 1_000_000)),
    ],
)
def test_windows(text: str | None, window: tuple[float, float | None] | None) -> None:
    assert parse_window(text) == window


@pytest.mark.parametrize("text", ["", "..", "10us", "10..40", "40us..10us", "a..b", "1us..1us"])
def test_bad_windows_are_usage_errors(text: str) -> None:
    with pytest.raises(FlashmoeError) as caught:
        parse_window(text)
    assert caught.value.exit_code == 2

"""Processes of a bench find the fakes by their name, as they find the GPU's machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Where this package lies, however deep pytest takes it to be.
ROOT = str(Path(__file__).parents[__name__.count(".")])


@pytest.fixture(autouse=True)
def _fakes_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    # Last, so that the flashmoe under test comes before that of the source tree.
    monkeypatch.setattr(sys, "path", [*sys.path, ROOT])

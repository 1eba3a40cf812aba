"""flashmoe/_host.pyi, which type checkers read, is what the extension offers."""

from __future__ import annotations

from pathlib import Path

import pytest

import flashmoe


def test_the_stub_is_that_of_the_extension() -> None:
    host = pytest.importorskip("flashmoe._host")
    stubgen = pytest.importorskip("nanobind.stubgen")
    generator = stubgen.StubGen(host, quiet=True)
    generator.put(host)
    written = (Path(flashmoe.__file__).parent / "_host.pyi").read_text()
    assert generator.get().strip() == written.strip(), "run `make stub`"

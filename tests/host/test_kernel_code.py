"""The kernel's file is loaded once, however it is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from flashmoe import kernels
from flashmoe.world import kernel


def test_a_file_is_loaded_once_however_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[tuple[int, str, str]] = []

    def load(device: int, flavour: str, telling: str) -> Any:
        loads.append((device, flavour, telling))
        return object()

    monkeypatch.setattr(kernels, "load", load)
    kernel._loaded.cache_clear()
    try:
        # NVSHMEM initialises what the first call gives; what the second gives is launched.
        assert kernel.code(0, "nvshmem") is kernel.code(0, "nvshmem", "")
        assert kernel.code(0, "p2p", "moe_a") is not kernel.code(0, "p2p")
        assert loads == [(0, "nvshmem", ""), (0, "p2p", "moe_a"), (0, "p2p", "")]
    finally:
        kernel._loaded.cache_clear()

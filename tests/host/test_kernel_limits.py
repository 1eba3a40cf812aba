"""What the GPU kernel does not take is refused before any GPU is asked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flashmoe._host")

from flashmoe.config import MoEConfig, Routing
from flashmoe.errors import FlashmoeError
from flashmoe.world.base import EngineOptions
from flashmoe.world.gpu_engine import GpuEngine
from flashmoe.world.kernel import LINE, check_experts
from flashmoe.world.shared_heap import SharedHeap
from flashmoe.world.tiles import extension

MAX_EXPERTS, MAX_GROUPS = extension().MAX_EXPERTS, extension().MAX_GROUPS


def grouped(groups: int) -> MoEConfig:
    routing = Routing("sigmoid", groups=groups, top_groups=2)
    return MoEConfig(64, 64, experts=2 * groups, top_k=2, routing=routing)


BEYOND = {
    "1025 experts": MoEConfig(64, 64, experts=MAX_EXPERTS + 1, top_k=2),
    "33 groups of experts": grouped(MAX_GROUPS + 1),
}


@pytest.mark.parametrize("what", BEYOND)
def test_more_than_the_kernel_counts_is_refused_and_the_host_engine_named(what: str) -> None:
    BEYOND[what].validate()  # other engines take it
    nothing: Any = None
    heap = SharedHeap.__new__(SharedHeap)  # of a GPU that is not here
    for refuses in (
        lambda: GpuEngine(BEYOND[what], nothing, [8], EngineOptions(), nothing, range(1)),
        lambda: heap._worst_shape(BEYOND[what], 8),
    ):
        with pytest.raises(FlashmoeError, match=f"^{what}: the GPU kernel takes") as caught:
            refuses()
        assert caught.value.exit_code == 2
        assert "--world host" in caught.value.hint


def test_as_much_as_the_kernel_counts_is_taken() -> None:
    check_experts(MoEConfig(64, 64, experts=MAX_EXPERTS, top_k=2))
    check_experts(grouped(MAX_GROUPS))


def test_lines_of_code_are_as_long_as_the_kernel_takes_them_to_be() -> None:
    header = Path(__file__).resolve().parents[2] / "csrc" / "device" / "cta.h"
    line = re.search(r"constexpr uint32_t kLine = (\d+);", header.read_text())
    assert line is not None and int(line[1]) == LINE

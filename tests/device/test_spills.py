"""What the compiler said of each kernel: no value lies in memory that was meant for a register."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flashmoe.build_info import Kernel, build_info

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "device" / "moe_p2p_sm90a.cu"
ENTRIES = re.findall(r"^FLASHMOE_KERNEL\((\w+),", SOURCE.read_text(), re.MULTILINE)

#: Kernels that still spill, each to be taken out when it no longer does: the test then fails.
SPILLING = set(ENTRIES)


@pytest.fixture(scope="module")
def kernels() -> dict[str, Kernel]:
    info = build_info()
    if not info.cubins:
        pytest.skip(f"this build holds no kernels: {info.why_no_cubins}")
    return {kernel.name: kernel for cubin in info.cubins for kernel in cubin.kernels}


def test_the_report_of_every_kernel_is_kept(kernels: dict[str, Kernel]) -> None:
    assert len(ENTRIES) >= 8
    assert set(kernels) >= set(ENTRIES)
    # 384 threads of a block share 65,536 registers.
    assert all(0 < kernels[name].registers <= 168 for name in ENTRIES)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xfail(strict=True)) if name in SPILLING else name
        for name in ENTRIES
    ],
)
def test_no_register_is_spilled(kernels: dict[str, Kernel], name: str) -> None:
    kernel = kernels[name]
    assert (kernel.spill_store_bytes, kernel.spill_load_bytes) == (0, 0)

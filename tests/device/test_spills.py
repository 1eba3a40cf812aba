"""What the compiler said of each kernel: no value lies in memory that was meant for a register."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flashmoe.build_info import Kernel, build_info

DEVICE = Path(__file__).resolve().parents[2] / "csrc" / "device"
ENTRIES = [
    (flavour, name)
    for flavour in ("p2p", "nvshmem")
    for name in re.findall(
        r"^FLASHMOE_KERNEL\((\w+),", (DEVICE / f"moe_{flavour}_sm90a.cu").read_text(), re.MULTILINE
    )
]


@pytest.fixture(scope="module")
def kernels() -> dict[tuple[str, str], Kernel]:
    """By flavour and name."""
    info = build_info()
    if not info.cubins:
        pytest.skip(f"this build holds no kernels: {info.why_no_cubins}")
    return {
        (cubin.flavour, kernel.name): kernel for cubin in info.cubins for kernel in cubin.kernels
    }


def entry_of(kernels: dict[tuple[str, str], Kernel], entry: tuple[str, str]) -> Kernel:
    info = build_info()
    if entry[0] not in info.flavours:
        pytest.skip(f"this build holds no kernels of the flavour {entry[0]}: {info.why_no_nvshmem}")
    return kernels[entry]


def test_the_report_of_every_kernel_is_kept(kernels: dict[tuple[str, str], Kernel]) -> None:
    held = build_info().flavours
    assert len(ENTRIES) >= 12
    assert set(kernels) >= {entry for entry in ENTRIES if entry[0] in held}
    # 384 threads of a block share 65,536 registers.
    assert all(0 < kernels[entry].registers <= 168 for entry in ENTRIES if entry[0] in held)


@pytest.mark.parametrize("entry", ENTRIES, ids="-".join)
def test_no_register_is_spilled(
    kernels: dict[tuple[str, str], Kernel], entry: tuple[str, str]
) -> None:
    kernel = entry_of(kernels, entry)
    assert (kernel.spill_store_bytes, kernel.spill_load_bytes) == (0, 0)

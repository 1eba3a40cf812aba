"""Cubins are changed so that they tell where an entry point's code lies, and in nothing else."""

from __future__ import annotations

import pytest

from flashmoe.build_info import Cubin, build_info
from flashmoe.kernels.places import PLACE, telling


@pytest.fixture(scope="module")
def cubin() -> Cubin:
    info = build_info()
    found = [c for c in info.cubins if (c.flavour, c.kernel) == ("p2p", "moe")]
    if not found:
        pytest.skip(f"this build holds no kernels: {info.why_no_cubins}")
    return found[0]


def test_each_entry_point_is_told_by_one_relocation(cubin: Cubin) -> None:
    binary = cubin.path.read_bytes()
    entries = [k.name for k in cubin.kernels if k.name.startswith("moe_")]
    assert len(entries) == 8
    told = {}
    for entry in entries:
        told[entry], size = telling(binary, entry)
        changed = [at for at in range(len(binary)) if told[entry][at] != binary[at]]
        # The number and the kind of one relocation's symbol, which lie in its second word.
        assert len(told[entry]) == len(binary) and 0 < len(changed) <= 8
        assert changed[-1] - changed[0] < 8
        assert 64 << 10 < size < len(binary)
    assert len(set(told.values())) == len(entries)
    # What is told of one entry point has nothing left to tell of another.
    assert telling(told[entries[0]], entries[1]) == (told[entries[0]], 0)


def test_what_is_not_there_is_not_told(cubin: Cubin) -> None:
    binary = cubin.path.read_bytes()
    assert telling(binary, "moe_of_another_build") == (binary, 0)
    assert (
        telling(binary.replace(PLACE.encode(), b"x" * len(PLACE)), "moe_bf16_gated_untraced")[1]
        == 0
    )

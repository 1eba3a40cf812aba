"""Which cubin is chosen, and what a user reads where none fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flashmoe.build_info import BuildInfo, Cubin
from flashmoe.errors import FlashmoeError
from flashmoe.kernels import MIN_DRIVER_API, check_driver, find

HOPPER = Cubin("moe_sm90a.cubin", "moe", "sm_90a", "p2p")
BLACKWELL = Cubin("moe_sm100a.cubin", "moe", "sm_100a", "p2p")
INFO = BuildInfo(
    version="0.1.0",
    commit=None,
    dirty=None,
    built=None,
    system=None,
    python=None,
    cxx=None,
    nvcc=None,
    why_no_host_engine="",
    cubins=(HOPPER, BLACKWELL),
    why_no_cubins="",
)


def test_the_cubin_of_exactly_this_architecture_is_chosen() -> None:
    assert find((9, 0), info=INFO) is HOPPER
    assert find((10, 0), info=INFO) is BLACKWELL


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 3), (12, 0)])
def test_a_newer_or_older_gpu_is_refused_by_name(capability: tuple[int, int]) -> None:
    with pytest.raises(FlashmoeError, match="sm_90a, sm_100a") as caught:
        find(capability, info=INFO)
    assert caught.value.exit_code == 5
    assert f"{capability[0]}.{capability[1]}" in caught.value.message
    assert "--world host" in caught.value.hint


def test_a_build_without_kernels_says_why() -> None:
    none = replace(INFO, cubins=(), why_no_cubins="nvcc is not of CUDA 13")
    with pytest.raises(FlashmoeError, match="nvcc is not of CUDA 13") as caught:
        find((9, 0), info=none)
    assert caught.value.exit_code == 5


def test_a_flavour_that_was_not_built_is_named() -> None:
    with pytest.raises(FlashmoeError, match="no nvshmem flavour") as caught:
        find((9, 0), flavour="nvshmem", info=INFO)
    assert caught.value.exit_code == 5


def test_an_old_driver_is_refused_and_the_oldest_good_one_is_not() -> None:
    check_driver(MIN_DRIVER_API)
    with pytest.raises(FlashmoeError, match=r"CUDA 12\.9") as caught:
        check_driver(12090)
    assert caught.value.exit_code == 5
    assert "580" in caught.value.hint

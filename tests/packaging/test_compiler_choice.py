"""Which nvcc a build takes, and what it records where none serves; nothing is compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
pytestmark = pytest.mark.skipif(CMAKE is None, reason="no cmake")


def configure(tmp_path: Path, nvcc: str | None, **environment: str) -> str:
    """What CMake says where the nvcc on PATH is the shell script ``nvcc``, or there is none."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("g++", "c++", "make", "git", "uname", "as", "ld", "sh"):
        found = shutil.which(name)
        if found is not None:
            (tools / name).symlink_to(found)
    if nvcc is not None:
        (tools / "nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
        (tools / "nvcc").chmod(0o755)
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("FLASHMOE_", "CUDA"))}
    done = subprocess.run(
        [str(CMAKE), "-S", ROOT, "-B", tmp_path / "build", f"-DPython_EXECUTABLE={sys.executable}"],
        env=keep | environment | {"PATH": str(tools)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = " ".join(done.stdout.split())
    return said if done.returncode == 0 else f"failed: {said}"


def wheels_hold_nvcc() -> bool:
    return any(Path(p, "nvidia/cu13/bin/nvcc").is_file() for p in sys.path)


needs_no_wheel = pytest.mark.skipif(
    wheels_hold_nvcc(), reason="this environment holds NVIDIA's compiler as a package"
)


@needs_no_wheel
def test_without_nvcc_the_host_engine_is_built_alone_and_the_reason_kept(tmp_path: Path) -> None:
    said = configure(tmp_path, None)
    assert "No cubins: no nvcc on PATH or in the build environment" in said
    assert not said.startswith("failed")


@needs_no_wheel
@pytest.mark.parametrize(
    ("nvcc", "reason"),
    [
        ("echo 'Cuda compilation tools, release 12.8, V12.8.93'", "is not of CUDA 13"),
        ("exit 127", "does not run"),
        (
            "[ \"$1\" = --version ] && echo 'release 13.0, V13.0.88' && exit 0\n"
            "echo 'cicc: not found' >&2; exit 1",
            "cannot compile for sm_90a: cicc: not found",
        ),
    ],
)
def test_an_nvcc_that_does_not_serve_is_named_with_its_reason(
    tmp_path: Path, nvcc: str, reason: str
) -> None:
    said = configure(tmp_path, nvcc)
    assert not said.startswith("failed")
    assert f"bin/nvcc {reason}" in said


@needs_no_wheel
def test_requiring_kernels_makes_the_same_an_error(tmp_path: Path) -> None:
    said = configure(tmp_path, None, FLASHMOE_REQUIRE_CUDA="1")
    assert said.startswith("failed")
    assert "FLASHMOE_REQUIRE_CUDA is set" in said


def test_an_nvcc_of_release_13_on_path_is_taken(tmp_path: Path) -> None:
    said = configure(tmp_path, "echo 'release 13.1, V13.1.80'")
    assert f"nvcc 13.1.80: {tmp_path}/bin/nvcc" in said


def test_skipping_cuda_asks_for_no_compiler(tmp_path: Path) -> None:
    said = configure(tmp_path, "echo called >&2; exit 1", FLASHMOE_SKIP_CUDA="1")
    assert "No cubins: built with FLASHMOE_SKIP_CUDA=1" in said
    assert "called" not in said

"""Tracing costs nothing where it is off: that machine code knows nothing of traces."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"

# An entry as in csrc/device/moe_p2p_sm90a.cu, alone: all of them take minutes.
SOURCE = """
#include "device/kernel.h"
FLASHMOE_KERNEL(entry, TYPE, GATED, TRACED)
"""

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


def compiled(
    folder: Path,
    *flags: str,
    dtype: str = "__nv_bfloat16",
    gated: bool = True,
    traced: bool = False,
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """What nvcc said of one entry, and the cubin, with CUBIN.d beside it."""
    folder.mkdir()
    source, cubin = folder / "one.cu", folder / "one.cubin"
    source.write_text(SOURCE)
    named = {"TYPE": dtype, "GATED": str(gated).lower(), "TRACED": str(traced).lower()}
    done = subprocess.run(
        ["nvcc", "-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-cubin", *flags,
         *(f"-D{name}={value}" for name, value in named.items()),
         f"-I{CSRC}", "-MD", "-MF", f"{cubin}.d", "-o", str(cubin), str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done, cubin


def code(cubin: Path) -> dict[str, Any]:
    """The entry's instructions, and what its launch needs: registers, stack, shared memory."""
    elffile = pytest.importorskip("elftools.elf.elffile", reason="pyelftools is not installed")
    with cubin.open("rb") as file:
        elf = elffile.ELFFile(file)
        text = elf.get_section_by_name(".text.entry")
        info = elf.get_section_by_name(".nv.info.entry")
        return {
            "bytes": text["sh_size"],
            "instructions": hashlib.sha256(text.data()).hexdigest(),
            "registers": text["sh_info"] >> 24,
            "info": hashlib.sha256(info.data()).hexdigest(),
        }


@pytest.mark.slow
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", ["__nv_bfloat16", "__half"])
def test_untraced_code_is_that_of_a_build_without_traces(
    tmp_path: Path, dtype: str, gated: bool
) -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(
            lambda flags: compiled(
                tmp_path / (flags[0] if flags else "as-it-is"), *flags, dtype=dtype, gated=gated
            ),
            [(), ("-DFLASHMOE_NO_TRACE",)],
        )
        (one, ours), (other, without) = runs
    assert one.returncode == 0, one.stderr
    assert other.returncode == 0, other.stderr
    assert "core/records.h" in Path(f"{ours}.d").read_text()
    assert "core/records.h" not in Path(f"{without}.d").read_text()
    found = code(ours)
    assert found["bytes"] > 100_000  # the kernel, not a stub of it
    assert found == code(without)


@pytest.mark.slow
def test_a_build_without_traces_makes_no_traced_kernel(tmp_path: Path) -> None:
    done, _ = compiled(tmp_path / "traced", "-DFLASHMOE_NO_TRACE", traced=True)
    assert done.returncode != 0
    assert "FLASHMOE_NO_TRACE" in done.stderr

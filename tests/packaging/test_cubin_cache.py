"""FLASHMOE_CUBIN_CACHE: what was compiled before is taken where it is the same, and only there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cmake" / "compile_cubin.cmake"
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
pytestmark = pytest.mark.skipif(CMAKE is None, reason="no cmake")

# -M: the files that a source includes.  Else their text, as a cubin, and a line in compiled.log.
NVCC = """#!/bin/sh
here=$(dirname "$0")
for last; do :; done
while [ $# -gt 0 ]; do
  case $1 in -M) list=1 ;; -MF) deps=$2 ;; -o) out=$2 ;; esac
  shift
done
header=$(dirname "$last")/kernel.h
printf '%s : %s \\\\\\n    %s\\n' target "$(echo "$last" | sed 's/ /\\\\ /g')" \
  "$(echo "$header" | sed 's/ /\\\\ /g')" >"$deps"
[ -n "$list" ] && exit 0
echo once >>"$here/compiled.log"
cat "$last" "$header" >"$out"
echo "Compiling entry function 'k'"
echo "Function properties for k"
"""


class Build:
    """One tree with a kernel in it, and a compiler that all trees share."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.tree = root, root / name
        self.tree.mkdir()
        self.write("kernel.cu", "source")
        self.write("kernel.h", "header")
        nvcc = root / "nvcc"
        nvcc.write_text(NVCC)
        nvcc.chmod(0o755)

    def write(self, name: str, text: str) -> None:
        (self.tree / name).write_text(text)

    def run(self, version: str = "13.0.88", flags: str = "", cache: bool = True) -> tuple[str, int]:
        """The cubin's content, and how often the compiler has compiled until now."""
        cubin = self.tree / "kernel.cubin"
        cubin.unlink(missing_ok=True)
        definitions = {
            "NVCC": self.root / "nvcc",
            "VERSION": version,
            "SOURCE": self.tree / "kernel.cu",
            "CUBIN": cubin,
            "INCLUDES": f"-I{self.tree}",
            "FLAGS": flags,
        }
        env = {k: v for k, v in os.environ.items() if k != "FLASHMOE_CUBIN_CACHE"}
        if cache:
            env["FLASHMOE_CUBIN_CACHE"] = str(self.root / "cache")
        subprocess.run(
            [str(CMAKE), *(f"-D{k}={v}" for k, v in definitions.items()), "-P", str(SCRIPT)],
            env=env,
            check=True,
        )
        assert "Compiling entry" in Path(f"{cubin}.ptxas.txt").read_text()
        return cubin.read_text(), len((self.root / "compiled.log").read_text().split())


def test_the_same_text_is_compiled_once_in_any_tree(tmp_path: Path) -> None:
    first = Build(tmp_path, "first tree")
    assert first.run() == ("sourceheader", 1)
    assert first.run() == ("sourceheader", 1)
    assert Build(tmp_path, "second").run() == ("sourceheader", 1)


def test_a_header_that_changes_is_seen(tmp_path: Path) -> None:
    build = Build(tmp_path, "tree")
    build.run()
    build.write("kernel.h", "other")
    assert build.run() == ("sourceother", 2)
    build.write("kernel.h", "header")
    assert build.run() == ("sourceheader", 2)


def test_compiler_and_flags_are_part_of_it(tmp_path: Path) -> None:
    build = Build(tmp_path, "tree")
    for count, (version, flags) in enumerate([("13.0.88", ""), ("13.1.80", ""), ("13.1.80", "-g")]):
        assert build.run(version, flags)[1] == count + 1
        assert build.run(version, flags)[1] == count + 1
    # Lines of the source are by its path.
    build.run(flags="-lineinfo")
    assert Build(tmp_path, "other").run(flags="-lineinfo")[1] == 5


def test_without_the_variable_nothing_is_kept(tmp_path: Path) -> None:
    build = Build(tmp_path, "tree")
    assert build.run(cache=False)[1] == 1
    assert build.run(cache=False)[1] == 2
    assert not (tmp_path / "cache").exists()

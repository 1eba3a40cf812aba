"""Writes flashmoe/_build_info.json: what this build is of, and what it holds.

Run by CMake on every build; standard library only, since it runs in the build environment.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path

#: Where an sdist carries the commit it was made from (see cmake/backend.py).
STAMP = "cmake/sdist_commit.json"


def version(source: Path) -> str:
    """The one place of the version is ``flashmoe/__init__.py``."""
    text = (source / "flashmoe" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit('flashmoe/__init__.py: no line __version__ = "..."')
    return found.group(1)


def git(source: Path, *arguments: str) -> str | None:
    """What git says in ``source``, or None where it fails or is absent."""
    try:
        done = subprocess.run(
            ["git", "-C", str(source), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit(source: Path) -> dict[str, str | bool | None]:
    """``{"commit", "dirty"}`` of the source: its stamp if it came as an sdist, else git's word.

    A tree unpacked inside some other repository is not of that repository, so git is believed only
    where ``source`` is its top level.
    """
    stamp = source / STAMP
    if stamp.is_file():
        known: dict[str, str | bool | None] = json.loads(stamp.read_text(encoding="utf-8"))
        return known
    top = git(source, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != source.resolve():
        return {"commit": None, "dirty": None}
    status = git(source, "status", "--porcelain")
    return {
        "commit": git(source, "rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def built() -> str:
    """The build's time, UTC; SOURCE_DATE_EPOCH fixes it for reproducible builds."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    now = (
        datetime.datetime.fromtimestamp(int(epoch), datetime.UTC)
        if epoch
        else datetime.datetime.now(datetime.UTC)
    )
    return now.strftime("%Y-%m-%dT%H:%M:%SZ")


#: What ptxas -v says of a kernel: its name, then its stack and spills, then its registers.
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def kernels(report: str) -> list[dict[str, str | int]]:
    """ptxas's figures of each kernel in its report, by name."""
    found = [
        {
            "name": match["name"],
            "registers": int(match["registers"]),
            "stack_bytes": int(match["stack"]),
            "spill_store_bytes": int(match["stores"]),
            "spill_load_bytes": int(match["loads"]),
        }
        for match in KERNEL.finditer(report)
    ]
    return sorted(found, key=lambda kernel: kernel["name"])


def cubin_entry(path: Path) -> dict[str, object]:
    """``moe_sm90a`` or ``moe_nvshmem_sm90a`` -> its file, kernel, architecture, flavour and what
    the report beside it (cmake/compile_cubin.cmake) says of its kernels."""
    name = path.stem
    report = Path(f"{path}.ptxas.txt")
    stem, _, arch = name.rpartition("_sm")
    kernel, nvshmem = stem.removesuffix("_nvshmem"), stem.endswith("_nvshmem")
    return {
        "file": f"{name}.cubin",
        "kernel": kernel.removesuffix("_p2p"),
        "arch": f"sm_{arch}",
        "flavour": "nvshmem" if nvshmem else "p2p",
        "kernels": kernels(report.read_text(encoding="utf-8")) if report.is_file() else [],
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--system", required=True)
    parser.add_argument("--cxx", required=True)
    parser.add_argument("--nvcc", required=True)
    parser.add_argument("--nvshmem", default="")
    parser.add_argument("--why-no-host-engine", required=True)
    parser.add_argument("--why-no-cubins", required=True)
    parser.add_argument("--why-no-nvshmem", default="")
    parser.add_argument("cubins", type=Path, nargs="*")
    options = parser.parse_args()
    info = {
        "schema": 1,
        "version": version(options.source),
        **commit(options.source),
        "built": built(),
        "system": options.system,
        "python": platform.python_version(),
        "cxx": options.cxx.strip() or None,
        "nvcc": options.nvcc or None,
        "nvshmem": options.nvshmem or None,
        "why_no_host_engine": options.why_no_host_engine or None,
        "cubins": [cubin_entry(path) for path in options.cubins],
        "why_no_cubins": options.why_no_cubins or None,
        "why_no_nvshmem": options.why_no_nvshmem or None,
    }
    options.output.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What lies in an sdist and in a wheel, by building both from this tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import flashmoe
from flashmoe.build_info import parse

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="not a clone: there is no commit to find again"
)


def run(arguments: Sequence[str | Path], cwd: Path, **environment: str) -> str:
    """Runs a command that must succeed; returns its stdout."""
    done = subprocess.run(
        [str(a) for a in arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of this tree's last commit, so that nothing built here can be in the way."""
    path = tmp_path_factory.mktemp("clone") / "flashmoe"
    run(["git", "clone", "-q", ROOT, path], ROOT)
    return path


@pytest.fixture(scope="module")
def sdist(clone: Path) -> Path:
    """The unpacked sdist."""
    out = clone.parent / "sdist"
    run([sys.executable, "-m", "build", "-q", "--no-isolation", "--sdist", "-o", out, "."], clone)
    assert run(["git", "status", "--porcelain"], clone) == "", "the build left something behind"
    (archive,) = out.iterdir()
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    return out / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> zipfile.ZipFile:
    """The wheel built from the sdist, without a compiler for GPUs."""
    out = sdist.parent.parent / "wheel"
    run(
        [sys.executable, "-m", "build", "-q", "--no-isolation", "--wheel", "-o", out, "."],
        sdist,
        FLASHMOE_SKIP_CUDA="1",
    )
    (archive,) = out.iterdir()
    return zipfile.ZipFile(archive)


def metadata(wheel: zipfile.ZipFile) -> Message:
    """The wheel's METADATA."""
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_sdist_holds_every_tracked_file_that_a_build_or_a_test_needs(
    clone: Path, sdist: Path
) -> None:
    tracked = run(["git", "ls-files", "csrc", "cmake", "flashmoe", "flashmoe_cli", "tests"], clone)
    missing = [name for name in tracked.split() if not (sdist / name).is_file()]
    assert missing == []
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "THIRD_PARTY_NOTICES"):
        assert (sdist / name).is_file(), name


def test_sdist_knows_its_commit(clone: Path, sdist: Path) -> None:
    head = run(["git", "rev-parse", "HEAD"], clone).strip()
    stamp = json.loads((sdist / "cmake" / "sdist_commit.json").read_text())
    assert stamp == {"commit": head, "dirty": False}


def test_wheel_holds_the_packages_and_nothing_else(clone: Path, wheel: zipfile.ZipFile) -> None:
    held = {n for n in wheel.namelist() if ".dist-info/" not in n}
    tracked = set(run(["git", "ls-files", "flashmoe", "flashmoe_cli"], clone).split())
    built = held - tracked
    assert tracked <= held
    assert {n.split(".")[0] for n in built} == {"flashmoe/_build_info", "flashmoe/_host"}


def test_wheel_says_why_it_holds_no_kernels_and_which_commit_it_is_of(
    clone: Path, wheel: zipfile.ZipFile
) -> None:
    info = parse(wheel.read("flashmoe/_build_info.json").decode())
    assert info.commit == run(["git", "rev-parse", "HEAD"], clone).strip()
    assert info.dirty is False
    assert info.cubins == ()
    assert info.why_no_cubins == "built with FLASHMOE_SKIP_CUDA=1"
    assert info.why_no_host_engine == ""
    assert info.version == flashmoe.__version__


def test_requiring_kernels_fails_the_build_where_they_cannot_be_made(sdist: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--wheel", "-o", "never", "."],
        cwd=sdist,
        env=os.environ | {"FLASHMOE_SKIP_CUDA": "1", "FLASHMOE_REQUIRE_CUDA": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "FLASHMOE_REQUIRE_CUDA is set, and no cubin can be built" in done.stdout + done.stderr
    assert not (sdist / "never").exists() or not list((sdist / "never").iterdir())


def test_metadata_names_the_command_and_keeps_torch_off_other_platforms(
    wheel: zipfile.ZipFile,
) -> None:
    from packaging.requirements import Requirement

    meta = metadata(wheel)
    assert meta["Name"] == "flashmoe-prof"
    assert meta["Version"] == flashmoe.__version__
    assert meta["License-Expression"] == "Apache-2.0"
    plain = [
        r for r in map(Requirement, meta.get_all("Requires-Dist", [])) if "extra" not in str(r)
    ]

    def names(system: str, machine: str) -> set[str]:
        where = {"sys_platform": system, "platform_machine": machine}
        return {r.name for r in plain if r.marker is None or r.marker.evaluate(where)}

    readers = {"numpy", "pyarrow", "rich", "safetensors", "typer"}
    runners = {"torch", "cuda-core", "cuda-bindings", "nvidia-ml-py", "nvtx"}
    assert names("linux", "x86_64") == readers | runners
    assert names("darwin", "arm64") == readers
    (torch,) = (r for r in plain if r.name == "torch")
    assert all(torch.specifier.contains(v) for v in ("2.11.0", "2.13.1"))
    assert not any(torch.specifier.contains(v) for v in ("2.10.2", "2.14.0"))
    (entry,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    assert "flashmoe_cli.__main__:main" in wheel.read(entry).decode()


def test_licences_travel_along(wheel: zipfile.ZipFile) -> None:
    licences = {Path(n).name for n in wheel.namelist() if ".dist-info/licenses/" in n}
    assert licences == {"LICENSE", "THIRD_PARTY_NOTICES"}
    (notices,) = (n for n in wheel.namelist() if n.endswith("licenses/THIRD_PARTY_NOTICES"))
    text = wheel.read(notices).decode()
    for part in ("nanobind", "robin_map", "NVIDIA CUDA Toolkit", "libcu++"):
        assert part in text

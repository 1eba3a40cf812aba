"""What the build writes about itself, and what flashmoe reads of it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import flashmoe
from flashmoe.build_info import BuildInfo, Cubin, Kernel, build_info, parse
from flashmoe.errors import FlashmoeError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    """cmake/build_info.py, which is no part of the installed package."""
    spec = importlib.util.spec_from_file_location("writer", ROOT / "cmake" / "build_info.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'probe' for 'sm_90a'
ptxas info    : Function properties for probe
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers
ptxas info    : Compile time = 17.801 ms
ptxas info    : Compiling entry function 'moe_one' for 'sm_90a'
ptxas info    : Function properties for moe_one
    80 bytes stack frame, 152 bytes spill stores, 208 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 80 bytes cumulative stack size
ptxas info    : Compile time = 22239.184 ms
"""


def git(at: Path, *arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    done = subprocess.run(
        ["git", "-C", str(at), *who, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one commit and nothing changed since."""
    git(tmp_path, "init", "-q")
    (tmp_path / "flashmoe").mkdir()
    (tmp_path / "flashmoe" / "__init__.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "cmake").mkdir()
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_commit_and_dirty_flag_are_those_of_the_repository(
    writer: ModuleType, repository: Path
) -> None:
    head = git(repository, "rev-parse", "HEAD")
    assert writer.commit(repository) == {"commit": head, "dirty": False}
    (repository / "flashmoe" / "__init__.py").write_text('__version__ = "1.2.4"\n')
    assert writer.commit(repository) == {"commit": head, "dirty": True}


def test_a_stamp_from_the_sdist_is_believed_before_git(
    writer: ModuleType, repository: Path
) -> None:
    stamp = {"commit": "c0ffee", "dirty": True}
    (repository / writer.STAMP).write_text(json.dumps(stamp))
    assert writer.commit(repository) == stamp


def test_a_tree_inside_another_repository_is_not_of_that_repository(
    writer: ModuleType, repository: Path
) -> None:
    assert writer.commit(repository / "flashmoe") == {"commit": None, "dirty": None}


def test_written_file_reads_back(writer: ModuleType, repository: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    cubin = tmp_path / "moe_sm90a.cubin"
    Path(f"{cubin}.ptxas.txt").write_text(REPORT)
    command = [
        sys.executable,
        str(ROOT / "cmake" / "build_info.py"),
        f"--source={repository}",
        f"--output={output}",
        "--system=Linux x86_64",
        "--cxx=GNU 14.1",
        "--nvcc=13.0.88",
        "--why-no-host-engine=",
        "--why-no-cubins=",
        str(cubin),
        "build/moe_traced_nvshmem_sm100a.cubin",
    ]
    environment = {"SOURCE_DATE_EPOCH": "86400", "PATH": "/usr/bin:/bin"}
    subprocess.run(command, check=True, env=environment)
    info = parse(output.read_text())
    assert info.version == "1.2.3"
    assert info.commit == git(repository, "rev-parse", "HEAD")
    assert info.built == "1970-01-02T00:00:00Z"
    assert (info.cxx, info.nvcc) == ("GNU 14.1", "13.0.88")
    assert (info.why_no_host_engine, info.why_no_cubins) == ("", "")
    assert info.cubins == (
        Cubin(
            "moe_sm90a.cubin",
            "moe",
            "sm_90a",
            "p2p",
            (Kernel("moe_one", 168, 80, 152, 208), Kernel("probe", 30, 0, 0, 0)),
        ),
        Cubin("moe_traced_nvshmem_sm100a.cubin", "moe_traced", "sm_100a", "nvshmem"),
    )
    assert [c.compute_capability for c in info.cubins] == [(9, 0), (10, 0)]
    assert info.flavours == ("nvshmem", "p2p")


def test_words_of_a_build_name_what_it_lacks() -> None:
    info = BuildInfo(
        version="1.2.3",
        commit="0123456789abcdef",
        dirty=True,
        built="2026-01-01T00:00:00Z",
        system="Linux x86_64",
        python="3.12.1",
        cxx="GNU 14.1",
        nvcc=None,
        why_no_host_engine="",
        cubins=(),
        why_no_cubins="built with FLASHMOE_SKIP_CUDA=1",
    )
    text = "\n".join(info.lines())
    assert "flashmoe 1.2.3, commit 0123456789ab+dirty" in text
    assert "host engine: yes" in text
    assert "none: built with FLASHMOE_SKIP_CUDA=1" in text
    assert "GNU 14.1, no nvcc" in text


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": "1"'])
def test_a_damaged_file_is_one_clear_error(text: str) -> None:
    with pytest.raises(FlashmoeError, match="damaged"):
        parse(text)


def test_this_installation_is_built_and_holds_what_it_says() -> None:
    info = build_info()
    assert info.version == flashmoe.__version__
    assert info.built is not None, "the tests run on a built flashmoe"
    assert bool(info.cubins) == (info.why_no_cubins == "")
    for cubin in info.cubins:
        assert cubin.path.read_bytes()[:4] == b"\x7fELF"
    assert (importlib.util.find_spec("flashmoe._host") is not None) == (
        info.why_no_host_engine == ""
    )


def test_what_was_built_is_found_in_either_place_of_an_editable_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, built = tmp_path / "source", tmp_path / "built"
    file = built / "kernels" / "cubin" / "moe_sm90a.cubin"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\x7fELF")
    monkeypatch.setattr(flashmoe, "__path__", [str(source), str(built)])
    assert Cubin("moe_sm90a.cubin", "moe", "sm_90a", "p2p").path == file

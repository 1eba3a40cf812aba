"""What may still be allocated: what the machine says, a cgroup's limit, and its page cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashmoe.world import memory

MIB = 1 << 20


def asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], machine: int | None = None
) -> int | None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    meminfo = folder / "meminfo"
    if machine is not None:
        meminfo.write_text(f"MemTotal: 9 kB\nMemAvailable:  {machine // 1024} kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_CGROUP", folder)
    return memory.available_bytes()


def v2(limit: str, used: int, cache: int) -> dict[str, str]:
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{used}\n",
        "memory.stat": f"active_file 7\ninactive_file {cache}\n",
    }


def v1(limit: int, used: int, cache: int) -> dict[str, str]:
    return {
        "memory/memory.limit_in_bytes": f"{limit}\n",
        "memory/memory.usage_in_bytes": f"{used}\n",
        "memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {cache}\n",
    }


@pytest.mark.parametrize(
    ("files", "machine", "available"),
    [
        ({}, None, None),
        ({}, 64 * MIB, 64 * MIB),
        (v2("max", 5 * MIB, MIB), 64 * MIB, 64 * MIB),
        (v2(str(32 * MIB), 30 * MIB, 0), 64 * MIB, 2 * MIB),
        (v2(str(32 * MIB), 30 * MIB, 20 * MIB), 64 * MIB, 22 * MIB),
        (v2(str(32 * MIB), 30 * MIB, 20 * MIB), 8 * MIB, 8 * MIB),
        (v2(str(32 * MIB), 40 * MIB, 0), None, 0),
        (v1(32 * MIB, 30 * MIB, 20 * MIB), 64 * MIB, 22 * MIB),
        (v1(0x7FFFFFFFFFFFF000, 30 * MIB, 20 * MIB), 64 * MIB, 64 * MIB),
    ],
)
def test_available_bytes(
    files: dict[str, str],
    machine: int | None,
    available: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert asked(tmp_path, monkeypatch, files, machine) == available

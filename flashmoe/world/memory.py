"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

from flashmoe.digits import whole_number

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")

#: Where a cgroup says its limit and what it uses, and the name in memory.stat of the page cache
#: that it would give up: version 2, then version 1.
_LIMITS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def available_bytes() -> int | None:
    """Bytes that can be allocated before the machine or its container is full; None: unknown.

    Page cache that would be given up counts as available, as it does in MemAvailable.
    """
    limits = []
    kib = _named(_MEMINFO, "MemAvailable:")
    if kib is not None:
        limits.append(kib * 1024)
    for most, current, stat, cache in _LIMITS:
        limit, used = whole_number(_read(_CGROUP / most)), whole_number(_read(_CGROUP / current))
        if limit is not None and used is not None:
            used -= min(_named(_CGROUP / stat, cache) or 0, used)
            limits.append(max(0, limit - used))
    return min(limits) if limits else None


def _named(path: Path, name: str) -> int | None:
    """The number behind ``name`` in a file of one name and number a line."""
    for line in _read(path).splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == name:
            return whole_number(words[1])
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

"""What TAB offers: presets, and the runs that lie in the usual place.  Imports stay light."""

from __future__ import annotations

from pathlib import Path

from flashmoe.trace.place import SUFFIX, runs_folder


def complete_presets(incomplete: str) -> list[tuple[str, str]]:
    """(name, description) of each preset that begins with ``incomplete``."""
    from flashmoe.presets import PRESETS

    return [(n, p.description) for n, p in PRESETS.items() if n.startswith(incomplete)]


def complete_runs(incomplete: str) -> list[str]:
    """Run directories that begin with ``incomplete``, newest first.

    A name is completed inside the runs folder, a path (with a slash) where it leads.
    """
    head, slash, tail = incomplete.rpartition("/")
    folder = Path(head or "/") if slash else runs_folder()
    try:
        found = [p for p in folder.iterdir() if p.name.startswith(tail) and p.is_dir()]
    except OSError:
        return []
    runs = [p for p in found if p.name.endswith(SUFFIX)]
    runs.sort(key=lambda p: p.stat().st_mtime, reverse=True)
    if not slash:
        return [p.name for p in runs]
    below = [f"{head}/{p.name}/" for p in found if not p.name.endswith(SUFFIX)]
    return [f"{head}/{p.name}" for p in runs] + below

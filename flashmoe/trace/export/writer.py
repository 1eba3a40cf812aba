"""Writes an export: the one entry point, and the only part with effects."""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import pyarrow as pa

from flashmoe.errors import FlashmoeError
from flashmoe.trace import flows as flows_of
from flashmoe.trace.columns import Events
from flashmoe.trace.export import chrome, perfetto

Format = Literal["perfetto", "chrome"]
FORMATS: Final[dict[str, str]] = {"perfetto": ".pftrace", "chrome": ".json"}


class Run(Protocol):
    """What an export needs of a run: its tables and its metadata."""

    @property
    def meta(self) -> dict[str, Any]: ...
    @property
    def events(self) -> pa.Table: ...
    @property
    def plan(self) -> pa.Table: ...
    @property
    def counts(self) -> pa.Table: ...


@dataclass(frozen=True)
class Exported:
    """What was written: the file, its size in bytes, slices (instants included) and flow arrows."""

    path: Path
    format: str
    size: int
    slices: int
    flows: int


def export(
    run: Run, format: str, path: str | os.PathLike[str], force: bool = False, gz: bool | None = None
) -> Exported:
    """Writes ``run`` to ``path`` as ``format`` ("perfetto" or "chrome").

    ``gz``: compress with gzip; None: where the path ends in ``.gz``.  Raises FlashmoeError for an
    unknown format, an existing file without ``force``, a device or a missing directory, and a file
    that cannot be written; what was there before is then still there.
    """
    if format not in FORMATS:
        raise FlashmoeError(
            f"unknown export format {format!r}", f"known are: {', '.join(FORMATS)}", exit_code=2
        )
    out = Path(path)
    if out.is_dir():
        raise FlashmoeError(f"{out} is a directory", "give the name of a file with -o", exit_code=2)
    if out.exists() and not out.is_file():  # a rename would put the export in a device's place
        raise FlashmoeError(f"{out} is no file", "give the name of a file with -o", exit_code=2)
    if out.exists() and not force:
        raise FlashmoeError(
            f"{out} exists already", "choose another name with -o, or overwrite with -f", 2
        )
    if not out.absolute().parent.is_dir():
        raise FlashmoeError(f"there is no directory {out.absolute().parent}", "create it first", 2)
    events = Events.of(run.events)
    row_bytes = (run.meta.get("world") or {}).get("row_bytes")
    edges = flows_of.assign(events, run.plan, run.counts, row_bytes)
    pieces = (perfetto.packets if format == "perfetto" else chrome.pieces)(events, edges, run.meta)
    size = _write(out, pieces, out.suffix == ".gz" if gz is None else gz)
    return Exported(out, format, size, len(events), len(edges.source))


def _write(out: Path, pieces: Iterator[bytes | memoryview], gz: bool) -> int:
    """Writes beside the target and renames at the end, so that no half file bears its name."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(open(temporary, "wb"))
            if gz:
                file = stack.enter_context(gzip.GzipFile("", "wb", 1, file, mtime=0))
            for piece in pieces:
                file.write(piece)
        size = temporary.stat().st_size
        os.replace(temporary, out)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise FlashmoeError(
            f"cannot write {out}: {error.strerror or error}",
            "free some space, or write elsewhere with -o"
            if full
            else "choose another path with -o",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return size

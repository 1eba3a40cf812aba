"""The run directory NAME.fmoe: written whole or not at all, found, and read with clear errors.

run.json (metadata), rings.bin (the evidence), events.parquet (decoded), plan.parquet and
counts.parquet (what was routed), flight.bin (only where the run hung).  See docs/trace-format.md.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flashmoe.errors import FlashmoeError
from flashmoe.trace import schema
from flashmoe.trace.decode import EVENTS, decode, require_known
from flashmoe.trace.place import LATEST, NO_NAMES, SUFFIX, runs_folder
from flashmoe.trace.rings import Dump, Rings, dropped, from_dump, held, read_rings, write_rings

SCHEMA = 2  # of run.json

PLAN = pa.schema(
    [
        ("iter", pa.uint16()),
        ("rank", pa.uint16()),
        ("tile", pa.uint32()),
        ("gemm", pa.uint8()),
        ("expert", pa.uint16()),
        ("row_tile", pa.uint32()),
        ("row_tile_global", pa.uint32()),
        ("col_tile", pa.uint32()),
        ("rows", pa.uint32()),
        ("height", pa.uint32()),
        ("cols", pa.uint32()),
        ("depth", pa.uint32()),
        ("family", pa.string()),
    ]
)
COUNTS = pa.schema(
    [
        ("iter", pa.uint16()),
        ("source", pa.uint16()),
        ("chunk", pa.uint32()),
        ("expert", pa.uint16()),
        ("rows", pa.uint32()),
    ]
)


class RoutingDump(Protocol):
    """What an engine routed in one launch: see ``flashmoe.world.base.Routing``."""

    chunk_counts: np.ndarray
    tiles: np.ndarray


# --------------------------------------------------------------------------------------- writing


def refuse_existing(path: Path, force: bool) -> None:
    """Raises FlashmoeError (exit code 2) where no run may be written to ``path``.

    That is where something is there, unless ``force`` is set and it is a run or an empty directory.
    """
    if path.name in NO_NAMES:
        raise FlashmoeError(
            f"a run cannot be called {str(path)!r}", f"name it, e.g. mine{SUFFIX}", 2
        )
    if not path.exists() and not path.is_symlink():
        return
    if not force:
        raise _exists(path)
    ours = path.is_dir() and ((path / "run.json").exists() or not any(path.iterdir()))
    if not ours or path.is_symlink():
        raise FlashmoeError(
            f"{path} exists and is not a run directory; -f replaces only runs",
            "choose another name with -o",
            2,
        )


def _exists(path: Path) -> FlashmoeError:
    return FlashmoeError(
        f"{path} exists already; nothing is overwritten",
        "choose another name with -o, or replace it with -f",
        2,
    )


class RunWriter:
    """Writes a run directory; use it as a context manager.

    ``meta`` is the dict that becomes run.json; the caller fills it, and ``rings`` and ``schema``
    are added here.  Everything goes into a sibling with a temporary name that takes its place at
    the end, so a directory called NAME.fmoe is always whole.  After an exception inside the block
    what was added so far is written, with ``status`` set if the caller had not, and the exception
    goes on.  Raises FlashmoeError (exit code 2) where ``path`` exists and ``force`` is not set, at
    the beginning and, for what came there meanwhile, at the end.
    """

    def __init__(self, path: str | os.PathLike[str], force: bool = False) -> None:
        self.path = Path(path)
        self.force = force
        self.meta: dict[str, Any] = {}
        self._rings: Rings | None = None
        self._plan: list[pa.Table] = []
        self._counts: list[pa.Table] = []
        self._flight: np.ndarray | None = None
        refuse_existing(self.path, force)

    def add_rings(self, dump: Dump | Rings) -> None:
        """The rings as the engine dumped them; they must stay as they are until the block ends."""
        self._rings = dump if isinstance(dump, Rings) else from_dump(dump)

    def add_routing(self, iterations: int | Iterable[int], routing: RoutingDump) -> None:
        """Counts and tile plan of one launch, or of several that were routed alike."""
        which = [iterations] if isinstance(iterations, int) else list(iterations)
        tiles, counts = np.asarray(routing.tiles), np.asarray(routing.chunk_counts)
        source, chunk, expert = np.nonzero(counts)
        rows = counts[source, chunk, expert]
        for i in which:
            own: dict[str, np.ndarray] = {"iter": np.full(len(tiles), min(i, 0xFFFF), np.uint16)}
            own |= {name: tiles[name] for name in PLAN.names[1:]}
            self._plan.append(_table(own, PLAN))
            own = {"iter": np.full(len(rows), min(i, 0xFFFF), np.uint16)}
            own |= {"source": source, "chunk": chunk, "expert": expert, "rows": rows}
            self._counts.append(_table(own, COUNTS))

    def add_flight(self, slots: np.ndarray) -> None:
        """The flight recorder's slots, ``schema.FLIGHT_SLOT`` [n], of a run that hung."""
        self._flight = np.ascontiguousarray(slots, schema.FLIGHT_SLOT)

    def __enter__(self) -> RunWriter:
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and "status" not in self.meta:
            code = getattr(error, "exit_code", 1)
            text = str(error).partition("\n")[0] or type(error).__name__
            self.meta["status"] = {"code": code, "message": text}
        self._write()

    def _write(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            with disk_errors(self.path):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                self._write_into(temporary)
                self._take_place(temporary)
                point_latest(self.path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write_into(self, folder: Path) -> None:
        rings = self._rings or Rings(np.zeros(0, schema.RING_HEADER), [])
        with (folder / "rings.bin").open("wb") as file:
            write_rings(file, rings)
        if self._flight is not None:
            (folder / "flight.bin").write_bytes(self._flight.tobytes())
        plan = pa.concat_tables(self._plan) if self._plan else PLAN.empty_table()
        counts = pa.concat_tables(self._counts) if self._counts else COUNTS.empty_table()
        write_parquet(plan, folder / "plan.parquet")
        write_parquet(counts, folder / "counts.parquet")
        events = with_flows(decode(rings), plan, counts, _row_bytes(self.meta))
        write_parquet(events, folder / "events.parquet")
        meta = {"schema": SCHEMA, "created": datetime.now(UTC).isoformat(timespec="seconds")}
        meta |= self.meta | {"rings": describe_rings(rings)}
        (folder / "run.json").write_text(json.dumps(meta, indent=1, default=_plain) + "\n")

    def _take_place(self, temporary: Path) -> None:
        old = self.path.with_name(f".{self.path.name}.{os.getpid()}.old")
        # Without force nothing makes way: the rename itself fails where another has been quicker.
        if self.force and self.path.exists():
            self.path.rename(old)
        try:
            temporary.rename(self.path)
        except OSError as error:
            if old.exists():
                old.rename(self.path)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise _exists(self.path) from error
            raise
        shutil.rmtree(old, ignore_errors=True)


def point_latest(path: Path) -> None:
    """Makes the `latest` link beside ``path`` name it; a file of that name is left alone."""
    link = path.with_name(LATEST)
    if link.exists() and not link.is_symlink():
        return
    fresh = path.with_name(f".{LATEST}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(path.name, target_is_directory=True)
    fresh.replace(link)


def write_parquet(table: pa.Table, path: Path) -> None:
    """zstd, times delta-packed, names and repeating numbers by dictionary."""
    packed = [n for n in ("t0_ns", "dur_ns", "aux", "stall_ns") if n in table.column_names]
    # Only columns with few distinct values gain from a dictionary; the rest stay plain.
    repeating = [n for n in table.column_names if n not in packed]
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=3,
        use_dictionary=repeating,
        column_encoding=dict.fromkeys(packed, "DELTA_BINARY_PACKED") or None,
        row_group_size=1 << 20,
        write_statistics=True,
    )


def with_flows(
    events: pa.Table, plan: pa.Table, counts: pa.Table, row_bytes: int | None
) -> pa.Table:
    """The same events with `flow` filled, from a dispatch to its tiles to their combines."""
    from flashmoe.trace import flows

    found = flows.assign(events, plan, counts, row_bytes)
    at = events.schema.get_field_index("flow")
    return events.set_column(at, EVENTS.field("flow"), pa.array(found.flow))


def _row_bytes(meta: dict[str, Any]) -> int | None:
    return (meta.get("world") or {}).get("row_bytes")


def describe_rings(rings: Rings) -> dict[str, Any]:
    """What run.json says of the rings: capacity, mode, totals, and each ring's header."""
    headers, lost = rings.headers, dropped(rings.headers)
    began = rings.began
    modes = {int(m) for m in headers["mode"][began]}
    names = [
        "rank", "sm", "cta", "lane", "count", "capacity", "mode",
        "begin_ns", "end_ns", "begin_cycles", "end_cycles",
    ]  # fmt: skip
    per_ring = [
        dict(zip(names, row, strict=True)) | {"began": bool(alive), "dropped": int(gone)}
        for row, alive, gone in zip(headers[names].tolist(), began, lost, strict=True)
    ]
    return {
        "capacity": int(headers["capacity"].max(initial=0)),
        "mode": schema.MODE_NAME[schema.RingMode(modes.pop())] if len(modes) == 1 else None,
        "n": len(headers),
        "records": int(held(headers).sum()),
        "dropped": int(lost.sum()),
        "per_ring": per_ring,
    }


def _table(columns: dict[str, np.ndarray], of: pa.Schema) -> pa.Table:
    arrays = []
    for field in of:
        text = pa.types.is_string(field.type)
        values = np.asarray(columns[field.name])
        arrays.append(pa.array(values.astype(str if text else field.type.to_pandas_dtype())))
    return pa.Table.from_arrays(arrays, schema=of)


def _plain(value: Any) -> Any:
    """JSON of what NumPy and pathlib leave in metadata."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"run.json cannot hold a {type(value).__name__}")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what a disk can refuse into one sentence with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message, hint = (
                f"no space left to write {path}",
                "free space, or write elsewhere with -o or $FLASHMOE_RUNS",
            )
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            message, hint = f"{path} cannot be written: {error.strerror}", "write elsewhere with -o"
        else:
            message, hint = f"{path} cannot be written: {error}", "write elsewhere with -o"
        raise FlashmoeError(message, hint) from error


# --------------------------------------------------------------------------------------- reading


class Run:
    """A run directory, opened: its tables are read when first asked for."""

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path = path
        self.meta = meta

    @cached_property
    def events(self) -> pa.Table:
        """The events, one row each, with the columns of ``decode.EVENTS``."""
        path = self.path / "events.parquet"
        if not path.exists() and (self.path / "rings.bin").exists():
            table = decode(self.rings)
            require_known(table)
            return with_flows(table, self.plan, self.counts, _row_bytes(self.meta))
        table = self._read("events.parquet", EVENTS)
        require_known(table)
        return table.combine_chunks()

    @cached_property
    def plan(self) -> pa.Table:
        """The tiles of each iteration, with the columns of ``PLAN``."""
        table = self._read("plan.parquet", PLAN, without="height")
        return table if "height" in table.column_names else self._with_height(table)

    @cached_property
    def counts(self) -> pa.Table:
        """The rows routed in each iteration, with the columns of ``COUNTS``."""
        return self._read("counts.parquet", COUNTS)

    @cached_property
    def rings(self) -> Rings:
        """The rings as the engine left them."""
        path = self.path / "rings.bin"
        if not path.exists():
            raise _missing(path)
        return read_rings(path)

    def check_files(self) -> None:
        """Raises FlashmoeError where a file that is there is not whole.

        Looks at headers and footers alone: a change within the data goes unnoticed.
        """
        if (self.path / "rings.bin").exists():
            read_rings(self.path / "rings.bin", whole=False)
        for name in ("events.parquet", "plan.parquet", "counts.parquet"):
            if (self.path / name).exists():
                with _damaged(self.path / name):
                    pq.read_metadata(self.path / name)

    @cached_property
    def flight(self) -> np.ndarray | None:
        """The flight recorder's slots [n] of a run that hung, else None."""
        path = self.path / "flight.bin"
        if not path.exists():
            return None
        data = path.read_bytes()
        if len(data) % schema.FLIGHT_SLOT.itemsize:
            raise FlashmoeError(f"{path} is truncated", "copy the run again, or trace again")
        return np.frombuffer(data, schema.FLIGHT_SLOT)

    def _with_height(self, plan: pa.Table) -> pa.Table:
        """The plan of a run from before tiles had heights of their own: all had that of one."""
        rows = plan["rows"].to_numpy()
        height = (self.meta.get("world") or {}).get("tile_rows") or rows.max(initial=1)
        at, field = PLAN.get_field_index("height"), PLAN.field("height")
        return plan.add_column(at, field, pa.array(np.full(len(rows), height, np.uint32)))

    def _read(self, name: str, of: pa.Schema, without: str | None = None) -> pa.Table:
        """A table of the run, which has all columns of ``of`` but, it may be, ``without``."""
        path = self.path / name
        if not path.exists():
            raise _missing(path)
        with _damaged(path):
            table = pq.read_table(path)
        lacking = [n for n in of.names if n not in table.column_names and n != without]
        if lacking:
            raise FlashmoeError(
                f"{path} has no column {', '.join(lacking)}: flashmoe did not write it",
                "give a run directory (NAME.fmoe) that flashmoe wrote",
            )
        return table


def open_run(path: str | os.PathLike[str] | None = None) -> Run:
    """Opens a run: a path, a name (.fmoe or not) in the runs' folder, or None for the latest.

    Raises FlashmoeError where there is none, or it is foreign, newer or damaged.
    """
    folder = find_run(path)
    file = folder / "run.json"
    if not file.exists():
        raise FlashmoeError(
            f"{folder} is not a flashmoe run: it has no run.json",
            "give a run directory (NAME.fmoe) that `flashmoe trace` wrote",
        )
    try:
        meta = json.loads(file.read_text(), parse_constant=_no_number)
    except (ValueError, OSError) as error:
        raise FlashmoeError(
            f"{file} is damaged or truncated", "copy the run again, or trace again"
        ) from error
    version = meta.get("schema") if isinstance(meta, dict) else None
    if not isinstance(version, int) or "rings" not in meta:
        raise FlashmoeError(
            f"{file} is not a flashmoe run's metadata",
            "give a run directory (NAME.fmoe) that `flashmoe trace` wrote",
        )
    if version > SCHEMA:
        raise FlashmoeError(
            f"{folder} was written in schema {version}; this flashmoe reads up to {SCHEMA}",
            "upgrade flashmoe, or read the run with the version that wrote it",
        )
    return Run(folder, meta)


def _no_number(text: str) -> float:
    """NaN and the infinities are no JSON, and nothing that a run says of itself."""
    raise ValueError(f"{text} is no number")


def find_run(path: str | os.PathLike[str] | None) -> Path:
    """The directory that ``path`` names, or the latest run's; FlashmoeError where there is none."""
    folder = runs_folder()
    if path is None:
        link = folder / LATEST
        if link.is_dir():
            return link.resolve()
        runs = list_runs()
        if not runs:
            raise FlashmoeError(
                f"there is no run in {folder.resolve()}",
                "make one by `flashmoe trace`, or name one",
                2,
            )
        return max(runs, key=lambda run: run.stat().st_mtime)
    given = Path(path)
    places = (given, Path(f"{given}{SUFFIX}"), folder / given, folder / f"{given}{SUFFIX}")
    found = [place for place in places if place.is_dir()]
    if found:
        # A run called NAME may lie beside a folder NAME that is none.
        return next((place for place in found if (place / "run.json").exists()), found[0])
    if given.exists():
        raise FlashmoeError(f"{given} is a file, not a run directory", "give a NAME.fmoe", 2)
    names = {run.name.removesuffix(SUFFIX): run.name for run in list_runs()}
    close = difflib.get_close_matches(given.name.removesuffix(SUFFIX), names, 1, 0.5)
    hint = f"did you mean {names[close[0]]}?" if close else "make one by `flashmoe trace`"
    raise FlashmoeError(f"there is no run {given}", hint, 2)


def list_runs() -> list[Path]:
    """The runs in the runs' folder, by name."""
    return sorted(p for p in runs_folder().glob(f"*{SUFFIX}") if (p / "run.json").exists())


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Turns what a reader of Parquet finds wrong into one sentence with a remedy."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise FlashmoeError(
            f"{path} is damaged or truncated", "copy the run again, or trace again"
        ) from error


def _missing(path: Path) -> FlashmoeError:
    return FlashmoeError(
        f"{path.parent} has no {path.name}: the run is incomplete",
        "copy the run again, or trace again",
    )

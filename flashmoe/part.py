"""What one PE leaves of a run: a report and arrays, in one file that has no name while it matters.

The file is made by who will read it and handed over open, so that a process that dies leaves
nothing behind.  A part whose end is missing was cut short, and is none.
"""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_MAGIC = b"FMOEPART"
_ALIGN = 64


@dataclass
class Part:
    """A rank's share of a run: ``report`` in plain JSON values, arrays by name."""

    report: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


def write_part(file: BinaryIO, part: Part) -> None:
    """Writes a part at the start of ``file``; raises OSError as ``file`` does."""
    file.seek(0)
    index: dict[str, Any] = {}
    at = 0
    for name, array in part.arrays.items():
        flat = np.ascontiguousarray(array)
        padding = -at % _ALIGN
        file.write(bytes(padding))
        at += padding
        index[name] = {"at": at, "dtype": _dtype_out(flat.dtype), "shape": flat.shape}
        if flat.nbytes:
            file.write(flat.reshape(-1).view(np.uint8).data)
        at += flat.nbytes
    tail = json.dumps({"report": part.report, "arrays": index}).encode()
    file.write(tail)
    file.write(len(tail).to_bytes(8, "little") + _MAGIC)
    file.flush()


@contextlib.contextmanager
def refused_by_disk(place: Path) -> Iterator[None]:
    """Turns what the disk refuses to a part at ``place`` into a FlashmoeError."""
    try:
        yield
    except OSError as error:
        from flashmoe.trace import rundir  # brings pyarrow, which a PE does without

        with rundir.disk_errors(place):
            raise error


def read_part(file: BinaryIO) -> Part | None:
    """The part in ``file``, its arrays in the file's mapping; None where there is no whole one."""
    size = file.seek(0, 2)
    if size < 16:
        return None
    data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    length = int.from_bytes(data[size - 16 : size - 8], "little")
    if data[size - 8 :] != _MAGIC or length > size - 16:
        return None
    tail = json.loads(data[size - 16 - length : size - 16])
    arrays = {}
    for name, entry in tail["arrays"].items():
        dtype, shape = _dtype_in(entry["dtype"]), entry["shape"]
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(data, dtype, count, entry["at"]).reshape(shape)
    return Part(tail["report"], arrays)


def _dtype_out(dtype: np.dtype[Any]) -> Any:
    return np.lib.format.dtype_to_descr(dtype)


def _dtype_in(entry: Any) -> np.dtype[Any]:
    def tuples(value: Any) -> Any:
        # JSON has lists where a dtype wants tuples: fields, and the shape of one.
        if isinstance(value, list):
            return [tuple(tuple(v) if isinstance(v, list) else v for v in field) for field in value]
        return value

    return np.lib.format.descr_to_dtype(tuples(entry))

"""rings.bin: every actor's ring, byte for byte as the engine handed it over."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from flashmoe.errors import FlashmoeError
from flashmoe.trace.schema import (
    FILE_HEADER,
    FILE_MAGIC,
    FILE_VERSION,
    RECORD,
    RING_HEADER,
    RING_MAGIC,
    RingMode,
)


class Dump(Protocol):
    """What an engine hands over: see ``flashmoe.world.base.RingDump``."""

    headers: np.ndarray
    records: np.ndarray


@dataclass(frozen=True)
class Rings:
    """All rings of a run, without copying their records.

    ``headers``: ``RING_HEADER`` [n].  ``stored``: one ``RECORD`` array a ring, the records it
    still holds in the order they lie in memory (a wrapped keep-last ring begins in the middle).
    """

    headers: np.ndarray
    stored: list[np.ndarray]

    @property
    def began(self) -> np.ndarray:
        """bool [n]: the ring's actor has begun at least once."""
        return self.headers["magic"] == RING_MAGIC

    @property
    def dropped(self) -> np.ndarray:
        """int64 [n]: records each ring had no room for; on a GPU at least (with_images())."""
        return dropped(self.headers)

    def in_order(self, ring: int) -> list[np.ndarray]:
        """The ring's records oldest first, as one piece, or two where it wrapped."""
        records, first = self.stored[ring], oldest(self.headers[ring])
        return [records] if first == 0 else [records[first:], records[:first]]


def dropped(headers: np.ndarray) -> np.ndarray:
    """int64 [n]: max(0, count - capacity) of each of ``RING_HEADER`` [n]."""
    count, capacity = headers["count"].astype(np.int64), headers["capacity"].astype(np.int64)
    return np.maximum(count - capacity, 0)


def held(headers: np.ndarray) -> np.ndarray:
    """int64 [n]: min(count, capacity), the records each ring still holds."""
    return np.minimum(headers["count"], headers["capacity"].astype(np.uint64)).astype(np.int64)


def oldest(header: np.void) -> int:
    """Where in the ring's memory its oldest record lies."""
    count, capacity = int(header["count"]), int(header["capacity"])
    if header["mode"] != RingMode.KEEP_LAST or count <= capacity or capacity == 0:
        return 0
    return count % capacity


def from_dump(dump: Dump) -> Rings:
    """The same view of an engine's ``RingDump``, without copying its records."""
    headers = np.ascontiguousarray(dump.headers)
    kept = held(headers)
    return Rings(headers, [dump.records[i, : kept[i]] for i in range(len(headers))])


def write_rings(file: BinaryIO, rings: Rings) -> int:
    """Writes rings.bin to ``file``.  Returns the bytes written; raises OSError as ``file`` does."""
    header = np.zeros(1, FILE_HEADER)
    header["magic"] = FILE_MAGIC
    header["version"] = FILE_VERSION
    header["record_bytes"] = RECORD.itemsize
    header["header_bytes"] = RING_HEADER.itemsize
    header["n_rings"] = len(rings.headers)
    file.write(header.tobytes())
    total = FILE_HEADER.itemsize
    for i, records in enumerate(rings.stored):
        file.write(rings.headers[i : i + 1].tobytes())
        file.write(np.ascontiguousarray(records).view(np.uint8).data)
        total += RING_HEADER.itemsize + records.nbytes
    return total


def read_rings(path: Path, whole: bool = True) -> Rings:
    """Reads rings.bin at ``path``; the records stay in the file's mapping.

    ``whole`` brings all of the file into memory now, which is quicker where all records are wanted.
    Raises FlashmoeError where the file is not one of ours, is newer, or ends early.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < FILE_HEADER.itemsize:
            raise _truncated(path)
        populate = getattr(mmap, "MAP_POPULATE", 0) if whole else 0
        if populate:
            mapping = mmap.mmap(
                file.fileno(), 0, flags=mmap.MAP_PRIVATE | populate, prot=mmap.PROT_READ
            )
        else:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header = np.frombuffer(mapping, FILE_HEADER, count=1)[0]
    if header["magic"] != FILE_MAGIC:
        raise FlashmoeError(
            f"{path} is not a flashmoe trace: it does not begin with {FILE_MAGIC.decode()}",
            "give a run directory (NAME.fmoe) that flashmoe wrote",
        )
    if header["version"] > FILE_VERSION:
        raise FlashmoeError(
            f"{path} has format version {header['version']}; this flashmoe reads up to "
            f"{FILE_VERSION}",
            "upgrade flashmoe, or read the run with the version that wrote it",
        )
    if (header["record_bytes"], header["header_bytes"]) != (RECORD.itemsize, RING_HEADER.itemsize):
        raise FlashmoeError(
            f"{path} has records of {header['record_bytes']} bytes and ring headers of "
            f"{header['header_bytes']}, not {RECORD.itemsize} and {RING_HEADER.itemsize}",
            "the file is damaged; trace again",
        )
    if int(header["n_rings"]) * RING_HEADER.itemsize > size - FILE_HEADER.itemsize:
        raise _truncated(path)  # before so many are allocated
    headers = np.zeros(int(header["n_rings"]), RING_HEADER)
    stored = []
    at = FILE_HEADER.itemsize
    for i in range(len(headers)):
        if at + RING_HEADER.itemsize > size:
            raise _truncated(path)
        headers[i] = np.frombuffer(mapping, RING_HEADER, count=1, offset=at)[0]
        at += RING_HEADER.itemsize
        kept = min(int(headers[i]["count"]), int(headers[i]["capacity"]))
        if at + kept * RECORD.itemsize > size:
            raise _truncated(path)
        stored.append(np.frombuffer(mapping, RECORD, count=kept, offset=at))
        at += kept * RECORD.itemsize
    return Rings(headers, stored)


def _truncated(path: Path) -> FlashmoeError:
    return FlashmoeError(
        f"{path} is truncated: it ends before the last ring it announces",
        "the copy or the write was cut short; copy the run again, or trace again",
    )

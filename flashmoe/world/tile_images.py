"""Records of tiles, made of what a GPU's kernel left of each (csrc/core/tile_image.h).

The kernel copies what a tile's task says anyway as it is, once a tile; to make a dozen records of
it there would cost each SM more than that.  What comes out is what each lane would have written
itself: spans of an actor do not overlap, and a wait that was over before the actor came is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from flashmoe.trace import schema
from flashmoe.trace.rings import from_dump
from flashmoe.trace.schema import EventKind, Lane, RecordFlag, RingMode
from flashmoe.world.base import RingDump

LONGEST: Final = 0xFFFFFFFF
"""ns; what a record's duration says of that and of all that is longer."""


def with_tiles(
    dump: RingDump,
    images: np.ndarray,
    written: np.ndarray,
    *,
    capacity: int,
    ranks: int,
    hidden: int,
    columns: int,
) -> RingDump:
    """``dump`` with the records of tiles among those that the lanes wrote themselves.

    ``images``: TILE_IMAGE [CTAs, images each]; ``written``: how many each CTA has made, int [CTAs],
    of which a full log kept what its rings keep.  ``capacity`` is the most records of an actor,
    ``columns`` the weight rows of a math group's half of a tile.  Of an image that was not kept
    nobody knows how many records it would have made: it counts as one of each lane that has to do
    with every tile.
    """
    made = _Made(dump, images, written)
    for lane, image, spans in _spans(made.images, ranks, hidden, columns):
        made.add(lane, image, spans)
    return made.merged(capacity)


@dataclass
class _Spans:
    """Spans of tiles, RECORD [n], and what the scheduler awaited for each before it.

    ``waits``: RECORD [n] as they would be, of kind 0 where there was none, their ends ``wait_to``
    uint64 [n].
    """

    records: np.ndarray
    waits: np.ndarray
    wait_to: np.ndarray

    @classmethod
    def without_waits(cls, records: np.ndarray) -> _Spans:
        none = np.zeros(len(records), schema.RECORD)
        return cls(records, none, np.zeros(len(records), np.uint64))

    @classmethod
    def joined(cls, parts: Sequence[_Spans]) -> _Spans:
        return cls(
            np.concatenate([part.records for part in parts]),
            np.concatenate([part.waits for part in parts]),
            np.concatenate([part.wait_to for part in parts]),
        )

    def __getitem__(self, which: Any) -> _Spans:
        return _Spans(self.records[which], self.waits[which], self.wait_to[which])


class _Made:
    """The spans of all images by actor, and their merging with the records of the rings."""

    def __init__(self, dump: RingDump, images: np.ndarray, written: np.ndarray) -> None:
        self._rings = from_dump(dump)
        self._last = bool((dump.headers["mode"] == RingMode.KEEP_LAST).any())
        room = images.shape[1]
        self._lost = np.maximum(written.astype(np.int64) - room, 0)
        kept = [
            np.roll(own, -(int(count) % room)) if self._last and count > room else own[:count]
            for own, count in zip(images, written, strict=True)
        ]
        self._cta = np.repeat(np.arange(len(kept)), [len(own) for own in kept])
        self.images: np.ndarray = np.concatenate([images[:0].reshape(-1), *kept])
        self._spans: list[_Spans] = []
        self._actors: list[np.ndarray] = []

    def add(self, lane: Lane, image: np.ndarray, spans: _Spans) -> None:
        """``spans`` of a lane, each of the image that ``image`` says."""
        self._spans.append(spans)
        self._actors.append(self._cta[image] * schema.N_LANES + int(lane))

    def merged(self, capacity: int) -> RingDump:
        """All of them, at most ``capacity`` of an actor."""
        actors = np.concatenate(self._actors)
        order = np.argsort(actors, kind="stable")
        spans = _Spans.joined(self._spans)[order]
        begins = np.searchsorted(actors[order], np.arange(len(self._rings.headers) + 1))
        headers = self._rings.headers.copy()
        rows = []
        for actor, lost_own in enumerate(self._rings.dropped.tolist()):
            own = np.concatenate(self._rings.in_order(actor))
            tiles = spans[begins[actor] : begins[actor + 1]]
            lost_tiles = int(self._lost[actor // schema.N_LANES])
            records, gone = self._merge(own, tiles, lost_own > 0, lost_tiles > 0)
            over = max(0, len(records) - capacity)
            records = records[over:] if self._last else records[:capacity]
            dropped = lost_own + gone + over
            if actor % schema.N_LANES not in (Lane.COMM0, Lane.COMM1):
                dropped += lost_tiles
            headers["count"][actor] = len(records) + dropped
            headers["capacity"][actor] = len(records) if dropped else capacity
            if self._last and dropped and len(records):
                # The oldest lies where the next record would have gone.
                records = np.roll(records, dropped % len(records))
            rows.append(records)
        most = max((len(row) for row in rows), default=0)
        merged = np.zeros((len(rows), most), schema.RECORD)
        for to, row in zip(merged, rows, strict=True):
            to[: len(row)] = row
        return RingDump(headers, merged)

    def _merge(
        self, own: np.ndarray, tiles: _Spans, own_lost: bool, tiles_lost: bool
    ) -> tuple[np.ndarray, int]:
        """One actor's records in the order of their ends, and how many were left out because others
        before them, or after, were lost."""
        if len(tiles.records) == 0:
            return own, 0
        # The actor wrote its own ones in order; a launch ends behind its last tile.
        written = _Spans.without_waits(own)
        times = [_ends(tiles.records), np.maximum.accumulate(_ends(own))]
        order = np.argsort(np.concatenate(times), kind="stable")
        of_tiles = order < len(tiles.records)
        every = _Spans.joined([tiles, written])[order]
        lacking = [~of_tiles] * own_lost + [of_tiles] * tiles_lost
        places = [np.flatnonzero(kept) for kept in lacking if kept.any()]
        first, until = 0, len(order)
        if self._last:
            first = max((int(at[0]) for at in places), default=0)
        else:
            until = min((int(at[-1]) + 1 for at in places), default=until)
        gone = len(order) - (until - first)
        every, of_tiles = every[first:until], of_tiles[first:until]
        records, waits = every.records.copy(), every.waits.copy()
        ends = _ends(records)
        over = np.maximum.accumulate(np.concatenate([ends[:0], ends]))
        before = np.concatenate([np.zeros(1, np.uint64), over])[:-1]  # what came before has ended
        waits["t0_ns"] = np.maximum(waits["t0_ns"], before)
        awaited = (waits["kind"] != 0) & (waits["t0_ns"] < every.wait_to)
        _set_end(waits, np.where(awaited, every.wait_to, waits["t0_ns"]))
        before = np.where(awaited, every.wait_to, before)
        late = of_tiles & (records["t0_ns"] < before)
        records["t0_ns"][late] = np.minimum(before, ends)[late]
        records[late] = _set_end(records[late], ends[late])
        return np.insert(records, np.flatnonzero(awaited), waits[awaited]), gone


def _ends(records: np.ndarray) -> np.ndarray:
    ends: np.ndarray = records["t0_ns"] + records["dur_ns"]
    return ends


def _set_end(records: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Gives ``records`` the durations with which they end at ``end``, uint64, or as they began."""
    took = np.maximum(end, records["t0_ns"]) - records["t0_ns"]
    records["dur_ns"] = np.minimum(took, LONGEST)
    saturated = np.where(took >= LONGEST, RecordFlag.SATURATED, 0).astype(np.uint8)
    records["flags"] = records["flags"] & ~np.uint8(RecordFlag.SATURATED) | saturated
    return records


def _spans(
    images: np.ndarray, ranks: int, hidden: int, columns: int
) -> Iterator[tuple[Lane, np.ndarray, _Spans]]:
    """(lane, the images they are of, spans), each actor's in the order of an image's steps."""
    every = np.arange(len(images))
    tile = images["tile"]

    def records_of(
        of: np.ndarray, kind: np.ndarray | EventKind, begin: np.ndarray, end: np.ndarray
    ) -> np.ndarray:
        records = np.zeros(len(of), schema.RECORD)
        records["t0_ns"], records["kind"] = begin, kind
        records["flags"], records["iter"] = images["iter_flags"][of], images["iter"][of]
        records["expert"], records["tile"] = tile["expert"][of], tile["index"][of]
        records["peer"] = schema.NO_PEER
        return _set_end(records, end)

    def awaited(of: np.ndarray, records: np.ndarray, until: np.ndarray) -> _Spans:
        begin = images["wait_from"][of]
        waits = records_of(of, images["wait_kind"][of].astype(np.uint8), begin, until)
        waits["tile"], waits["aux"] = tile["row_tile"][of], images["wait_lacking"][of]
        return _Spans(records, waits, until)

    begin, end = images["scheduled_from_ns"], images["scheduled_ns"]
    yield Lane.SCHED, every, _Spans.without_waits(records_of(every, EventKind.SCHEDULE, begin, end))
    for place, lane in enumerate((Lane.LOAD, Lane.COMM0, Lane.COMM1)):
        of = np.flatnonzero(images["loads"]["begin_ns"][:, place])
        stamps = images["loads"][of, place]
        records = records_of(of, EventKind.LOAD, stamps["begin_ns"], stamps["end_ns"])
        records["aux"], records["stall_cycles"] = stamps["cycles"], stamps["stall_cycles"]
        yield lane, of, awaited(of, records, images["wait_to"][of])
    for group, lane in enumerate((Lane.MATH0, Lane.MATH1)):
        stamps = images["stamps"][:, group]
        kind = np.where(tile["gemm"] == 1, np.uint8(EventKind.GEMM1), np.uint8(EventKind.GEMM2))
        records = records_of(every, kind, stamps["begin_ns"], stamps["products_ns"])
        records["aux"] = stamps["products_cycles"] - stamps["begin_cycles"]
        records["stall_cycles"] = stamps["stall_cycles"]
        until = np.minimum(images["wait_to"], stamps["begin_ns"])
        yield lane, every, awaited(every, records, until)
        column = tile["col_tile"].astype(np.int64) * 2 * columns + group * columns
        of = np.flatnonzero((tile["gemm"] == 2) & (column < hidden))
        row_bytes = 2 * np.minimum(columns, hidden - column[of])
        stamps, rows = stamps[of], tile["rows"][of].astype(np.int64)
        records = records_of(of, EventKind.GIVE_BACK, stamps["products_ns"], stamps["end_ns"])
        records["aux"] = rows * row_bytes
        yield lane, of, _Spans.without_waits(records)
        first = np.zeros(len(of), np.int64)
        for turn in range(ranks):
            to = np.flatnonzero(first < rows)
            path, at = images["returns"][of[to], turn], stamps["end_ns"][to]
            end = np.minimum(path["end"] - tile["row0"][of[to]].astype(np.int64), rows[to])
            records = records_of(of[to], EventKind.PUT, at, at)
            records["peer"], records["aux"] = path["source"], (end - first[to]) * row_bytes[to]
            yield lane, of[to], _Spans.without_waits(records)
            first[to] = end

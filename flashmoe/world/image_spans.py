"""What a CTA's images tell of its lanes: the spans that each would have written itself.

csrc/core/images.h says what lies in an image; :mod:`flashmoe.world.images` puts the spans of all
actors together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np

from flashmoe.trace import schema
from flashmoe.trace.schema import EventKind, Lane, RecordFlag, Step

LONGEST: Final = 0xFFFFFFFF
"""ns; what a record's duration says of that and of all that is longer."""

WARPS: Final[dict[Lane, range]] = {
    **{lane: range(int(lane), int(lane) + 1) for lane in Lane if lane < Lane.MATH0},
    Lane.MATH0: range(4, 8),
    Lane.MATH1: range(8, 12),
}
"""Of a CTA, those that each lane speaks for."""

STEP_KIND: Final = {
    Step.GATE: EventKind.GATE,
    Step.COUNTS: EventKind.COUNTS,
    Step.PLAN: EventKind.PLAN,
    Step.DISPATCH: EventKind.DISPATCH,
}

WAITED_TOGETHER: Final = (EventKind.WAIT_BARRIER, EventKind.WAIT_COUNTS, EventKind.WAIT_LOGITS)
"""Waits that the scheduler goes through for all lanes of its CTA."""

_WRAPS_NS: Final = 1 << 30
"""Within that, 32 bits of an SM's clock tell how far it went: it goes at some 2 GHz."""


class Source(IntEnum):
    """Where a span comes from."""

    OWN = 0
    STEP = 1
    TOGETHER = 2
    TILE = 3


@dataclass(frozen=True)
class Work:
    """What the traced launches do, as far as it says what their records hold.

    ``gathers``: comm warps bring rows of tiles; ``chunks``: CTAs of a rank; ``columns``: weight
    rows of a math group's half of a tile.
    """

    ranks: int
    chunks: int
    experts: int
    top_k: int
    hidden: int
    columns: int
    gathers: bool


@dataclass
class Spans:
    """Spans, RECORD [n], and what the scheduler awaited for each before it.

    ``waits``: RECORD [n] as they would be, of kind 0 where there was none, their ends ``wait_to``
    uint64 [n]; both None where nothing was.
    """

    records: np.ndarray
    source: Source
    waits: np.ndarray | None = None
    wait_to: np.ndarray | None = None


def _begun(
    images: np.ndarray, kind: np.ndarray | EventKind, begin: np.ndarray, end: np.ndarray
) -> np.ndarray:
    """RECORD [n], one of each of ``images``, of nobody and nothing in particular."""
    records = np.zeros(len(images), schema.RECORD)
    records["t0_ns"], records["kind"] = begin, kind
    records["flags"], records["iter"] = images["iter_flags"], images["iter"]
    records["peer"], records["expert"] = schema.NO_PEER, schema.NO_EXPERT
    records["tile"] = schema.NO_TILE
    return with_ends(records, end)


def spans_of_steps(
    steps: np.ndarray, headers: np.ndarray, work: Work
) -> Iterator[tuple[Lane, np.ndarray, Spans]]:
    """(lane, the CTAs they are of, spans): the first steps of launches, and launches themselves."""
    of_ctas = headers[:: schema.N_LANES]
    for lane in Lane:
        cta, launch = np.nonzero(steps["begin_ns"][:, :, lane])
        images = steps[cta, launch, lane]
        begin = images["begin_ns"]
        # Rows that stay in place: warp w of 12 speaks for the w-th, and every 12th from there.
        rows, warps = images["tokens"].astype(np.int64) * work.top_k, np.array(WARPS[lane])
        share = np.maximum((rows[:, None] + 11 - warps) // 12, 0).sum(axis=1)

        for step, kind in STEP_KIND.items():
            end = images["end_ns"][:, step]
            of = np.flatnonzero((end != 0) & (share != 0) if step is Step.DISPATCH else end)
            records, chunk = _begun(images[of], kind, begin[of], end[of]), of_ctas[cta[of]]
            if step is Step.GATE:
                records["tile"], records["aux"] = chunk["cta"], images["tokens"][of]
            elif step is Step.COUNTS:
                # One warp sends them, those of every chunks-th expert to each rank.
                sent = -(-(work.experts - chunk["cta"].astype(np.int64)) // work.chunks)
                sent = np.maximum(sent, 0) * (lane is Lane.LOAD) * work.ranks
                records["aux"] = 8 * sent
            elif step is Step.DISPATCH:
                records["peer"], records["expert"] = chunk["rank"], 0
                records["tile"] = chunk["cta"]
                records["aux"] = np.minimum(share * work.hidden * 2, LONGEST)[of]
            yield lane, cta[of], Spans(records, Source.STEP)
        of = np.flatnonzero(images["left_ns"])
        records = _begun(images[of], EventKind.LAUNCH, begin[of], images["left_ns"][of])
        records["aux"] = images["cycles"][of]
        yield lane, cta[of], Spans(records, Source.STEP)


def spans_together(written: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, Spans]]:
    """(the CTA they are of, spans): what each CTA's scheduler awaited for all its lanes.

    ``written``: the records that each actor wrote itself.
    """
    for cta, own in enumerate(written[Lane.SCHED :: schema.N_LANES]):
        waits = own[np.isin(own["kind"], WAITED_TOGETHER) & (own["flags"] & RecordFlag.OPEN == 0)]
        yield np.full(len(waits), cta), Spans(waits, Source.TOGETHER)


def _paces(
    images: np.ndarray, cta: np.ndarray, steps: np.ndarray, group: int, lane: Lane
) -> np.ndarray:
    """float64 [n], ns a cycle: how the SM's clock goes as a math group multiplies each tile.

    As it does from a tile's begin to that of the next one which the CTA runs in the same launch.
    For the last of a launch as until its lane was past it; where that never came to pass, or too
    late, as from the tile before, and for a tile alone as while it was loaded.
    """
    begin, clock = (images["stamps"][name][:, group] for name in ("begin_ns", "begin_cycles"))
    load = images["loads"][:, 0]
    pace = _ns_per_cycle(load["end_ns"] - load["begin_ns"], load["cycles"])
    launch = _launches_of(begin, cta, steps[:, :, lane])
    to_next = begin[1:] - begin[:-1]
    follows = np.all(
        [of[1:] == of[:-1] for of in (cta, launch, images["iter"], images["iter_flags"])], axis=0
    ) & (to_next < _WRAPS_NS)
    between = _ns_per_cycle(to_next, clock[1:] - clock[:-1])
    pace[1:][follows] = between[follows]
    known = np.flatnonzero(launch >= 0)
    past = steps[cta[known], launch[known], lane]
    to_past = past["past_tiles_ns"] - begin[known]
    told = to_past < _WRAPS_NS  # where there is no such time, that is not
    to_the_end = _ns_per_cycle(to_past, past["past_tiles_cycles"] - clock[known])
    pace[known[told]] = to_the_end[told]
    pace[:-1][follows] = between[follows]
    return pace


def _ns_per_cycle(took: np.ndarray, cycles: np.ndarray) -> np.ndarray:
    pace: np.ndarray = took / np.maximum(cycles, 1)
    return pace


def _launches_of(begin: np.ndarray, cta: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """int [n]: of ``steps``, STEP_IMAGE [CTAs, launches], those in which tiles began, -1 where that
    launch was not kept.

    ``begin``: of each tile, of the CTA that ``cta`` says, which does not fall.
    """
    launch = np.full(len(begin), -1)
    bounds = np.searchsorted(cta, np.arange(len(steps) + 1))
    for of_cta, first, end in zip(steps, bounds, bounds[1:], strict=False):
        begun = np.flatnonzero(of_cta["begin_ns"])
        if not len(begun) or first == end:
            continue
        begun = begun[np.argsort(of_cta["begin_ns"][begun], kind="stable")]
        tiles = begin[first:end]
        at = np.searchsorted(of_cta["begin_ns"][begun], tiles, "right") - 1
        found = begun[np.maximum(at, 0)]
        left = of_cta["left_ns"][found]
        launch[first:end] = np.where((at >= 0) & ((left == 0) | (tiles <= left)), found, -1)
    return launch


def spans_of_tiles(
    images: np.ndarray, cta: np.ndarray, steps: np.ndarray, work: Work
) -> Iterator[tuple[Lane, np.ndarray, Spans]]:
    """(lane, the images they are of, spans), each actor's in the order of an image's steps.

    ``cta``: that of each of ``images``, of which a CTA's are in order; ``steps``: STEP_IMAGE [CTAs,
    launches, lanes].
    """
    every = np.arange(len(images))
    tile = images["tile"]

    def records_of(
        of: np.ndarray, kind: np.ndarray | EventKind, begin: np.ndarray, end: np.ndarray
    ) -> np.ndarray:
        records = _begun(images[of], kind, begin, end)
        records["expert"], records["tile"] = tile["expert"][of], tile["index"][of]
        return records

    def awaited(of: np.ndarray, records: np.ndarray, until: np.ndarray) -> Spans:
        begin = images["wait_from"][of]
        waits = records_of(of, images["wait_kind"][of].astype(np.uint8), begin, until)
        waits["tile"], waits["aux"] = tile["row_tile"][of], images["wait_lacking"][of]
        return Spans(records, Source.TILE, waits, until)

    begin, end = images["scheduled_from_ns"], images["scheduled_ns"]
    records = records_of(every, EventKind.SCHEDULE, begin, end)
    yield Lane.SCHED, every, Spans(records, Source.TILE)
    for place, lane in enumerate((Lane.LOAD, Lane.COMM0, Lane.COMM1)):
        of = np.flatnonzero(images["loads"]["begin_ns"][:, place])
        stamps = images["loads"][of, place]
        records = records_of(of, EventKind.LOAD, stamps["begin_ns"], stamps["end_ns"])
        records["aux"], records["stall_cycles"] = stamps["cycles"], stamps["stall_cycles"]
        yield lane, of, awaited(of, records, images["wait_to"][of])
    for group, lane in enumerate((Lane.MATH0, Lane.MATH1)):
        stamps = images["stamps"][:, group]
        kind = np.where(tile["gemm"] == 1, np.uint8(EventKind.GEMM1), np.uint8(EventKind.GEMM2))
        pace = _paces(images, cta, steps, group, lane)
        products, end = (
            stamps["begin_ns"] + np.rint((at - stamps["begin_cycles"]) * pace).astype(np.uint64)
            for at in (stamps["products_cycles"], stamps["end_cycles"])
        )
        records = records_of(every, kind, stamps["begin_ns"], products)
        records["aux"] = stamps["products_cycles"] - stamps["begin_cycles"]
        records["stall_cycles"] = stamps["stall_cycles"]
        until = np.minimum(images["wait_to"], stamps["begin_ns"])
        yield lane, every, awaited(every, records, until)
        column = (tile["col_tile"].astype(np.int64) * 2 + group) * work.columns
        of = np.flatnonzero((tile["gemm"] == 2) & (column < work.hidden))
        row_bytes = 2 * np.minimum(work.columns, work.hidden - column[of])
        rows = tile["rows"][of].astype(np.int64)
        records = records_of(of, EventKind.GIVE_BACK, products[of], end[of])
        records["aux"] = rows * row_bytes
        yield lane, of, Spans(records, Source.TILE)
        first = np.zeros(len(of), np.int64)
        for turn in range(work.ranks):
            to = np.flatnonzero(first < rows)
            path, at = images["returns"][of[to], turn], end[of[to]]
            until_row = np.minimum(path["end"] - tile["row0"][of[to]].astype(np.int64), rows[to])
            records = records_of(of[to], EventKind.PUT, at, at)
            records["peer"] = path["source"]
            records["aux"] = (until_row - first[to]) * row_bytes[to]
            yield lane, of[to], Spans(records, Source.TILE)
            first[to] = until_row


def ends_of(records: np.ndarray) -> np.ndarray:
    """uint64 [n], ns."""
    ends: np.ndarray = records["t0_ns"] + records["dur_ns"]
    return ends


def with_ends(records: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Gives ``records`` the durations with which they end at ``end``, uint64, or as they began."""
    took = np.maximum(end, records["t0_ns"]) - records["t0_ns"]
    records["dur_ns"] = np.minimum(took, LONGEST)
    saturated = np.where(took >= LONGEST, RecordFlag.SATURATED, 0).astype(np.uint8)
    records["flags"] = records["flags"] & ~np.uint8(RecordFlag.SATURATED) | saturated
    return records

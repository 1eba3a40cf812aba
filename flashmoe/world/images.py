"""Records made of what a GPU's kernel left of each tile and launch (csrc/core/images.h).

The kernel copies what a tile's task says anyway as it is, and stamps the ends of a launch's first
steps; to make a dozen records of a tile there, or five of a launch, would cost each SM more than
that.  What comes out is what each lane would have written itself: spans of an actor do not overlap,
and a wait that was over before the actor came is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from flashmoe.trace import schema
from flashmoe.trace.rings import from_dump
from flashmoe.trace.schema import EventKind, Lane, RecordFlag, RingMode, Step
from flashmoe.world.base import RingDump

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


@dataclass(frozen=True)
class Images:
    """What the kernel left beside the rings, of n CTAs.

    ``tiles``: TILE_IMAGE [n, tiles each]; ``tiles_made``: int64 [n], how many each has made, of
    which a full log kept what its rings keep.  ``steps``: STEP_IMAGE [n, launches, lanes], those
    never begun zero; ``launches``: how many there were.
    """

    tiles: np.ndarray
    tiles_made: np.ndarray
    steps: np.ndarray
    launches: int

    def behind(self, others: Images) -> Images:
        """With the launches of ``others``, which came before."""
        steps = np.concatenate([others.steps, self.steps], axis=1)
        return Images(self.tiles, self.tiles_made, steps, others.launches + self.launches)


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


def headers_of(
    written: np.ndarray, last: np.ndarray, ranks: Sequence[int], capacity: int, mode: RingMode
) -> np.ndarray:
    """RING_HEADER [n]: those of n actors, which on a GPU write no more of it than ``count``, into
    ``written``.

    ``last``: STEP_IMAGE [CTAs, lanes] of each one's last launch; ``ranks``: those of the CTAs, each
    of as many.
    """
    headers = np.zeros(len(written), schema.RING_HEADER)
    steps = last.reshape(-1)
    began = steps["begin_ns"] != 0
    cta, lane = np.divmod(np.arange(len(headers)), schema.N_LANES)
    chunks = max(1, len(last) // max(1, len(ranks)))
    headers["count"], headers["capacity"], headers["mode"] = written["count"], capacity, mode
    headers["magic"] = schema.RING_MAGIC
    headers["rank"] = np.repeat(np.asarray(ranks, np.uint16), chunks * schema.N_LANES)
    headers["cta"], headers["lane"], headers["sm"] = cta % chunks, lane, steps["sm"]
    headers["begin_ns"], headers["end_ns"] = steps["begin_ns"], steps["left_ns"]
    # More than 32 bits hold is unknown.
    headers["end_cycles"] = np.where(steps["cycles"] < LONGEST, steps["cycles"], 0)
    headers[~began] = np.zeros((), schema.RING_HEADER)
    return headers


def with_images(dump: RingDump, images: Images, work: Work, *, capacity: int) -> RingDump:
    """``dump`` with the records of tiles and first steps among those that the lanes wrote
    themselves.

    ``capacity`` is the most records of an actor.  Of what was not kept nobody knows how many
    records it would have made: a tile counts as one of each lane that has to do with every tile, a
    launch as one of each.
    """
    made = _Made(dump, images, work.gathers)
    for lane, cta, steps in _steps(images.steps, dump.headers, work):
        made.add(lane, cta, steps)
    for cta, waits in _together(made.own):
        for lane in Lane:
            if lane is not Lane.SCHED:
                made.add(lane, cta, waits)
    for lane, tile, spans in _tiles(made.tiles, made.cta, work):
        made.add(lane, made.cta[tile], spans)
    return made.merged(capacity)


_OWN, _STEP, _TOGETHER, _TILE = range(4)  # where a span comes from
_WRAPS_NS: Final = 1 << 30
"""Within that, 32 bits of an SM's clock tell how far it went: it goes at some 2 GHz."""


@dataclass
class _Spans:
    """Spans, RECORD [n], and what the scheduler awaited for each before it.

    ``waits``: RECORD [n] as they would be, of kind 0 where there was none, their ends ``wait_to``
    uint64 [n]; both None where nothing was.
    """

    records: np.ndarray
    source: int
    waits: np.ndarray | None = None
    wait_to: np.ndarray | None = None


class _Made:
    """What is made, by actor, and its merging with the records of the rings."""

    def __init__(self, dump: RingDump, images: Images, gathers: bool) -> None:
        self._gathers = gathers
        self.rings = from_dump(dump)
        self.own = [np.concatenate(self.rings.in_order(i)) for i in range(len(self.rings.headers))]
        """What each actor wrote itself, oldest first."""
        self._last = bool((dump.headers["mode"] == RingMode.KEEP_LAST).any())
        room = images.tiles.shape[1]
        self._tiles_lost = np.maximum(images.tiles_made - room, 0)
        self._launches_lost = max(0, images.launches - images.steps.shape[1])
        kept = [
            np.roll(own, -(int(count) % room)) if self._last and count > room else own[:count]
            for own, count in zip(images.tiles, images.tiles_made, strict=True)
        ]
        self.cta = np.repeat(np.arange(len(kept)), [len(own) for own in kept])
        """Of each of ``tiles``."""
        self.tiles: np.ndarray = np.concatenate([images.tiles[:0].reshape(-1), *kept])
        self._spans: list[_Spans] = []
        self._actors: list[np.ndarray] = []

    def add(self, lane: Lane, cta: np.ndarray, spans: _Spans) -> None:
        """``spans`` of a lane, each of the CTA that ``cta`` says."""
        self._spans.append(spans)
        self._actors.append(cta * schema.N_LANES + int(lane))

    def merged(self, capacity: int) -> RingDump:
        """All of them, at most ``capacity`` of an actor."""
        every = self._in_order()
        actors = len(self.rings.headers)
        lost = self._lost()
        every, gone = self._without_holes(every, lost)
        records, of = _resolved(every)
        held = np.bincount(of, minlength=actors)
        over = np.maximum(held - capacity, 0)
        place = np.arange(len(of)) - np.repeat(np.cumsum(held) - held, held)
        fits = place >= over[of] if self._last else place < capacity
        records, of, place = records[fits], of[fits], (place - self._last * over[of])[fits]
        held -= over
        dropped = lost[_OWN] + lost[_STEP] + gone + over
        moves = np.isin(np.arange(actors) % schema.N_LANES, (Lane.COMM0, Lane.COMM1))
        dropped += np.where(moves, 0, lost[_TILE])
        if self._last:
            # The oldest lies where the next record would have gone.
            place = (place + dropped[of]) % held[of]
        headers, began = self.rings.headers.copy(), self.rings.began
        headers["count"][began] = (held + dropped)[began]
        headers["capacity"][began] = np.where(dropped != 0, held, capacity)[began]
        merged = np.zeros((actors, int(held.max(initial=0))), schema.RECORD)
        merged[of, place] = records
        return RingDump(headers, merged)

    def _in_order(self) -> _Every:
        """All spans and records, each actor's in the order of their ends.

        An actor wrote its own ones in order, whatever their ends; a launch ends behind all that was
        done in it.
        """
        sizes = [len(records) for records in self.own]
        made = [span.records for span in self._spans]
        records = np.concatenate([*made, *self.own])
        actor = np.concatenate([*self._actors, np.repeat(np.arange(len(sizes)), sizes)])
        source = np.concatenate(
            [*(np.full(len(span.records), span.source, np.int8) for span in self._spans),
             np.full(sum(sizes), _OWN, np.int8)]
        )  # fmt: skip
        waited = [span for span in self._spans if span.waits is not None]
        wait = np.full(len(records), -1)
        begin = np.cumsum([0, *(len(span.records) for span in self._spans)])
        first = 0
        for at, span in zip(begin, self._spans, strict=False):
            if span.waits is not None:
                wait[at : at + len(span.records)] = np.arange(first, first + len(span.records))
                first += len(span.records)
        waits = np.concatenate([np.zeros(0, schema.RECORD), *(s.waits for s in waited)])
        wait_to = np.concatenate([np.zeros(0, np.uint64), *(s.wait_to for s in waited)])
        time = _ends(records)
        mine = len(records) - sum(sizes)
        time[mine:] = _latest(time[mine:], actor[mine:])
        is_launch = records["kind"] == EventKind.LAUNCH
        # What a lane wrote, and took time, ends before what ends at the same tick of the clock.
        is_own = np.isin(source, (_OWN, _TOGETHER)) & (records["dur_ns"] != 0)
        order = np.lexsort((~is_own, is_launch, time, actor))
        return _Every(
            records[order], actor[order], source[order], time[order], wait[order], waits, wait_to
        )

    def _lost(self) -> dict[int, np.ndarray]:
        """int64 [actors] by source: how much of it, of an actor, is not there."""
        return {
            _OWN: self.rings.dropped,
            _STEP: self._launches_lost * self.rings.began.astype(np.int64),
            _TILE: np.repeat(self._tiles_lost, schema.N_LANES),
        }

    def _without_holes(
        self, every: _Every, lost: Mapping[int, np.ndarray]
    ) -> tuple[_Every, np.ndarray]:
        """``every`` without what came behind, or before, something of the same actor that is not
        there; and how many records of each actor that were."""
        actors = len(self.rings.headers)
        gone = np.zeros(actors, np.int64)
        if not any(of_source.any() for of_source in lost.values()):
            return every, gone
        stays = np.ones(len(every.records), bool)
        begins = np.searchsorted(every.actor, np.arange(actors + 1))
        for actor in range(actors):
            part = slice(begins[actor], begins[actor + 1])
            source, time = every.source[part], every.time[part]
            if (source == _OWN).all():
                continue
            told = self._told(actor)
            places = [
                np.flatnonzero(source == one) for one, of_source in lost.items() if of_source[actor]
            ]
            places = [at for at in places if len(at)]
            first, until = 0, len(source)
            if self._last:
                first = max([0, *(int(at[0]) for at in places), *np.searchsorted(time, told)])
            else:
                ends = np.searchsorted(time, told, "right")
                until = min([until, *(int(at[-1]) + 1 for at in places), *ends])
            stays[part][:first] = stays[part][until:] = False
            gone[actor] = len(source) - max(0, until - first)
        return every[stays], gone

    def _told(self, actor: int) -> list[int]:
        """The times, ns, from which on or up to which logs of the CTA tell all of an actor that has
        no place of its own in what they kept."""
        cta, lane = divmod(actor, schema.N_LANES)
        sched, place = cta * schema.N_LANES + Lane.SCHED, 0 if self._last else -1
        times = []
        if lane != Lane.SCHED and self.rings.dropped[sched]:
            ends = _ends(self.own[sched])
            times.append(int(ends[place]) if len(ends) else 0)
        if lane in (Lane.COMM0, Lane.COMM1) and self._gathers and self._tiles_lost[cta]:
            # Of a tile that a group multiplies all before it have been loaded.
            tile = self.tiles[self.cta == cta][place]
            times.append(int(tile["stamps"]["begin_ns"][0] if self._last else tile["scheduled_ns"]))
        return times


@dataclass
class _Every:
    """Spans and records of all actors, one actor's behind the other's.

    ``wait``: int [n], which of ``waits`` may come before it, or -1; these end at ``wait_to``.
    """

    records: np.ndarray
    actor: np.ndarray
    source: np.ndarray
    time: np.ndarray
    wait: np.ndarray
    waits: np.ndarray
    wait_to: np.ndarray

    def __getitem__(self, which: np.ndarray) -> _Every:
        return _Every(
            self.records[which],
            self.actor[which],
            self.source[which],
            self.time[which],
            self.wait[which],
            self.waits,
            self.wait_to,
        )


def _resolved(every: _Every) -> tuple[np.ndarray, np.ndarray]:
    """The records, with waits among them, and whose they are: nothing that is made begins before
    what came before it has ended, and what was over by then is no wait."""
    records, actor = every.records, every.actor
    ends = _ends(records)
    is_made = every.source != _OWN
    before = np.zeros(len(ends), np.uint64)  # of an actor's first, nothing came before it
    before[1:] = np.where(actor[1:] == actor[:-1], _latest(ends, actor)[:-1], 0)
    at = np.flatnonzero(every.wait >= 0)
    waits, to = every.waits[every.wait[at]], every.wait_to[every.wait[at]]
    waits["t0_ns"] = np.maximum(waits["t0_ns"], before[at])
    awaited = (waits["kind"] != 0) & (waits["t0_ns"] < to)
    at, to = at[awaited], to[awaited]
    waits = _set_end(waits[awaited], to)
    before[at] = to
    late = is_made & (records["kind"] != EventKind.LAUNCH) & (records["t0_ns"] < before)
    records["t0_ns"][late] = np.minimum(before, ends)[late]
    records[late] = _set_end(records[late], ends[late])
    stays = ~(is_made & np.isin(records["kind"], WAITED_TOGETHER) & (records["dur_ns"] == 0))
    has_wait = np.zeros(len(records), np.int64)
    has_wait[at] = 1
    place = np.cumsum(stays + has_wait) - 1
    all_of_them = np.zeros(int(place[-1]) + 1 if len(place) else 0, schema.RECORD)
    of = np.zeros(len(all_of_them), np.int64)
    all_of_them[place[stays]], of[place[stays]] = records[stays], actor[stays]
    all_of_them[place[at] - 1], of[place[at] - 1] = waits, actor[at]
    return all_of_them, of


def _latest(ends: np.ndarray, actor: np.ndarray) -> np.ndarray:
    """uint64 [n]: the latest of an actor's ``ends`` so far; ``actor`` does not fall."""
    if len(ends) == 0:
        return ends
    least = ends.min()
    reach = ends.max() - least + np.uint64(1)  # no actor's number times that is near 2^64
    offset = actor.astype(np.uint64) * reach
    latest: np.ndarray = np.maximum.accumulate(ends - least + offset) - offset + least
    return latest


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


def _begun(
    images: np.ndarray, kind: np.ndarray | EventKind, begin: np.ndarray, end: np.ndarray
) -> np.ndarray:
    """RECORD [n], one of each of ``images``, of nobody and nothing in particular."""
    records = np.zeros(len(images), schema.RECORD)
    records["t0_ns"], records["kind"] = begin, kind
    records["flags"], records["iter"] = images["iter_flags"], images["iter"]
    records["peer"], records["expert"] = schema.NO_PEER, schema.NO_EXPERT
    records["tile"] = schema.NO_TILE
    return _set_end(records, end)


def _steps(
    steps: np.ndarray, headers: np.ndarray, work: Work
) -> Iterator[tuple[Lane, np.ndarray, _Spans]]:
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
            yield lane, cta[of], _Spans(records, _STEP)
        of = np.flatnonzero(images["left_ns"])
        records = _begun(images[of], EventKind.LAUNCH, begin[of], images["left_ns"][of])
        records["aux"] = images["cycles"][of]
        yield lane, cta[of], _Spans(records, _STEP)


def _together(written: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, _Spans]]:
    """(the CTA they are of, spans): what each CTA's scheduler awaited for all its lanes.

    ``written``: the records that each actor wrote itself.
    """
    for cta, own in enumerate(written[Lane.SCHED :: schema.N_LANES]):
        waits = own[np.isin(own["kind"], WAITED_TOGETHER) & (own["flags"] & RecordFlag.OPEN == 0)]
        yield np.full(len(waits), cta), _Spans(waits, _TOGETHER)


def _at(images: np.ndarray, cta: np.ndarray, group: int, cycles: np.ndarray) -> np.ndarray:
    """uint64 [n], ns: when, after a math group had begun each tile, its SM's clock stood at
    ``cycles``, uint32.

    That clock goes as it does from a tile's begin to that of the next one which the CTA runs in the
    same launch, for the last from the one before, and for a tile alone as while it was loaded.
    """
    stamps = images["stamps"][:, group]
    begin, clock = stamps["begin_ns"], stamps["begin_cycles"]
    load = images["loads"][:, 0]
    took, ticks = load["end_ns"] - load["begin_ns"], load["cycles"].copy()
    to_next, ticks_to_next = begin[1:] - begin[:-1], clock[1:] - clock[:-1]
    launch = [cta, images["iter"], images["iter_flags"]]
    follows = np.all([of[1:] == of[:-1] for of in launch], axis=0) & (to_next < _WRAPS_NS)
    took[1:][follows], ticks[1:][follows] = to_next[follows], ticks_to_next[follows]
    took[:-1][follows], ticks[:-1][follows] = to_next[follows], ticks_to_next[follows]
    since = (cycles - clock) * (took / np.maximum(ticks, 1))
    at: np.ndarray = begin + np.rint(since).astype(np.uint64)
    return at


def _tiles(
    images: np.ndarray, cta: np.ndarray, work: Work
) -> Iterator[tuple[Lane, np.ndarray, _Spans]]:
    """(lane, the images they are of, spans), each actor's in the order of an image's steps.

    ``cta``: that of each of ``images``, of which a CTA's are in order.
    """
    every = np.arange(len(images))
    tile = images["tile"]

    def records_of(
        of: np.ndarray, kind: np.ndarray | EventKind, begin: np.ndarray, end: np.ndarray
    ) -> np.ndarray:
        records = _begun(images[of], kind, begin, end)
        records["expert"], records["tile"] = tile["expert"][of], tile["index"][of]
        return records

    def awaited(of: np.ndarray, records: np.ndarray, until: np.ndarray) -> _Spans:
        begin = images["wait_from"][of]
        waits = records_of(of, images["wait_kind"][of].astype(np.uint8), begin, until)
        waits["tile"], waits["aux"] = tile["row_tile"][of], images["wait_lacking"][of]
        return _Spans(records, _TILE, waits, until)

    begin, end = images["scheduled_from_ns"], images["scheduled_ns"]
    records = records_of(every, EventKind.SCHEDULE, begin, end)
    yield Lane.SCHED, every, _Spans(records, _TILE)
    for place, lane in enumerate((Lane.LOAD, Lane.COMM0, Lane.COMM1)):
        of = np.flatnonzero(images["loads"]["begin_ns"][:, place])
        stamps = images["loads"][of, place]
        records = records_of(of, EventKind.LOAD, stamps["begin_ns"], stamps["end_ns"])
        records["aux"], records["stall_cycles"] = stamps["cycles"], stamps["stall_cycles"]
        yield lane, of, awaited(of, records, images["wait_to"][of])
    for group, lane in enumerate((Lane.MATH0, Lane.MATH1)):
        stamps = images["stamps"][:, group]
        kind = np.where(tile["gemm"] == 1, np.uint8(EventKind.GEMM1), np.uint8(EventKind.GEMM2))
        products = _at(images, cta, group, stamps["products_cycles"])
        end = _at(images, cta, group, stamps["end_cycles"])
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
        yield lane, of, _Spans(records, _TILE)
        first = np.zeros(len(of), np.int64)
        for turn in range(work.ranks):
            to = np.flatnonzero(first < rows)
            path, at = images["returns"][of[to], turn], end[of[to]]
            until_row = np.minimum(path["end"] - tile["row0"][of[to]].astype(np.int64), rows[to])
            records = records_of(of[to], EventKind.PUT, at, at)
            records["peer"] = path["source"]
            records["aux"] = (until_row - first[to]) * row_bytes[to]
            yield lane, of[to], _Spans(records, _TILE)
            first[to] = until_row

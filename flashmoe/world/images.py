"""Records made of what a GPU's kernel left of each tile and launch (csrc/core/images.h).

The kernel copies what a tile's task says anyway as it is, and stamps the ends of a launch's first
steps; to make a dozen records of a tile there, or five of a launch, would cost each SM more than
that.  What comes out is what each lane would have written itself: spans of an actor do not overlap,
and a wait that was over before the actor came is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flashmoe.trace import schema
from flashmoe.trace.rings import from_dump
from flashmoe.trace.schema import EventKind, Lane, RingMode
from flashmoe.world.base import RingDump
from flashmoe.world.image_spans import (
    LONGEST,
    WAITED_TOGETHER,
    Source,
    Spans,
    Work,
    ends_of,
    spans_of_steps,
    spans_of_tiles,
    spans_together,
    with_ends,
)


@dataclass(frozen=True)
class Images:
    """What the kernel left beside the rings, of n CTAs.

    ``tiles``: TILE_IMAGE [n, tiles each]; ``tiles_made``: int64 [n], how many each has made, of
    which a full log kept what its rings keep.  ``steps``: STEP_IMAGE [n, launches, lanes], zero
    where there is none; ``launches``: how many there were, of which some may have had no room.
    """

    tiles: np.ndarray
    tiles_made: np.ndarray
    steps: np.ndarray
    launches: int

    def behind(self, others: Images) -> Images:
        """With the launches of ``others``, which came before."""
        steps = np.concatenate([others.steps, self.steps], axis=1)
        return Images(self.tiles, self.tiles_made, steps, others.launches + self.launches)


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
    for lane, cta, steps in spans_of_steps(images.steps, dump.headers, work):
        made.add(lane, cta, steps)
    for cta, waits in spans_together(made.own):
        for lane in Lane:
            if lane is not Lane.SCHED:
                made.add(lane, cta, waits)
    for lane, tile, spans in spans_of_tiles(made.tiles, made.cta, images.steps, work):
        made.add(lane, made.cta[tile], spans)
    return made.merged(capacity)


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
        kept_launches = int(images.steps["begin_ns"].any(axis=(0, 2)).sum())
        self._launches_lost = max(0, images.launches - kept_launches)
        kept = [
            np.roll(own, -(int(count) % room)) if self._last and count > room else own[:count]
            for own, count in zip(images.tiles, images.tiles_made, strict=True)
        ]
        self.cta = np.repeat(np.arange(len(kept)), [len(own) for own in kept])
        """Of each of ``tiles``."""
        self.tiles: np.ndarray = np.concatenate([images.tiles[:0].reshape(-1), *kept])
        self._spans: list[Spans] = []
        self._actors: list[np.ndarray] = []

    def add(self, lane: Lane, cta: np.ndarray, spans: Spans) -> None:
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
        dropped = lost[Source.OWN] + lost[Source.STEP] + gone + over
        moves = np.isin(np.arange(actors) % schema.N_LANES, (Lane.COMM0, Lane.COMM1))
        dropped += np.where(moves, 0, lost[Source.TILE])
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
             np.full(sum(sizes), Source.OWN, np.int8)]
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
        time = ends_of(records)
        mine = len(records) - sum(sizes)
        time[mine:] = _latest(time[mine:], actor[mine:])
        is_launch = records["kind"] == EventKind.LAUNCH
        # What a lane wrote, and took time, ends before what ends at the same tick of the clock.
        is_own = np.isin(source, (Source.OWN, Source.TOGETHER)) & (records["dur_ns"] != 0)
        order = np.lexsort((~is_own, is_launch, time, actor))
        return _Every(
            records[order], actor[order], source[order], time[order], wait[order], waits, wait_to
        )

    def _lost(self) -> dict[int, np.ndarray]:
        """int64 [actors] by source: how much of it, of an actor, is not there."""
        return {
            Source.OWN: self.rings.dropped,
            Source.STEP: self._launches_lost * self.rings.began.astype(np.int64),
            Source.TILE: np.repeat(self._tiles_lost, schema.N_LANES),
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
            if (source == Source.OWN).all():
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
            ends = ends_of(self.own[sched])
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
    ends = ends_of(records)
    is_made = every.source != Source.OWN
    before = np.zeros(len(ends), np.uint64)  # of an actor's first, nothing came before it
    before[1:] = np.where(actor[1:] == actor[:-1], _latest(ends, actor)[:-1], 0)
    at = np.flatnonzero(every.wait >= 0)
    waits, to = every.waits[every.wait[at]], every.wait_to[every.wait[at]]
    waits["t0_ns"] = np.maximum(waits["t0_ns"], before[at])
    awaited = (waits["kind"] != 0) & (waits["t0_ns"] < to)
    at, to = at[awaited], to[awaited]
    waits = with_ends(waits[awaited], to)
    before[at] = to
    late = is_made & (records["kind"] != EventKind.LAUNCH) & (records["t0_ns"] < before)
    records["t0_ns"][late] = np.minimum(before, ends)[late]
    records[late] = with_ends(records[late], ends[late])
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

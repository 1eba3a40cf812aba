"""Perfetto's binary trace format, packed by NumPy.

A process a rank, a track an (SM, lane), a slice an event; all values of an event are annotations
(``debug.*`` in SQL), payload is a counter track per (source, destination), and flows lead from a
dispatch to the tile that used it and from a tile to its combine.  Field numbers are those of
Perfetto's trace_packet.proto, track_event.proto, track_descriptor.proto and interned_data.proto.

Packets of one kind have one length, so a block of events is a few arrays of rows (protobuf.py) that
are stored to their places as 64-bit words.  A slice that nothing nests in has its begin and its end
in one row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import numpy as np

from flashmoe.trace.columns import Events
from flashmoe.trace.export import layout
from flashmoe.trace.export.protobuf import (
    Fixed,
    Message,
    Part,
    Slot,
    number,
    text,
    width_of,
    words,
)
from flashmoe.trace.flows import Flows
from flashmoe.trace.schema import (
    CLASS_OF,
    KIND_NAME,
    NO_EXPERT,
    NO_PEER,
    NO_TILE,
    STALL_REASON,
    EventKind,
)

# TracePacket
_PACKET, _TIMESTAMP, _SEQUENCE, _TRACK_EVENT, _INTERNED, _SEQUENCE_FLAGS, _DESCRIPTOR = (
    1, 8, 10, 11, 12, 13, 60,
)  # fmt: skip
_STATE_CLEARED, _NEEDS_STATE = 1, 2
# TrackEvent
_CATEGORY, _ANNOTATION, _TYPE, _NAME, _TRACK, _COUNTER_VALUE, _FLOW, _FLOW_END = (
    3, 4, 9, 10, 11, 30, 47, 48,
)  # fmt: skip
_BEGIN, _END, _INSTANT, _COUNTER = 1, 2, 3, 4

_UNITS_A_BLOCK: Final = 1 << 16
_THREADS: Final = 2
_ANNOTATIONS: Final = (
    "iter", "expert", "tile", "peer", "bytes", "stall_ns", "cycles", "tokens", "lacking", "flags",
)  # fmt: skip
_ANNOTATION_ID: Final = {name: i for i, name in enumerate(_ANNOTATIONS, start=1)}
# Bits of a unit's shape, above its kind: which annotations it has, and what it is.
_PEER, _EXPERT, _TILE, _FLAGS, _LAUNCH_END = (1 << bit for bit in range(8, 13))
_LEADS_TO: Final = (EventKind.DISPATCH, EventKind.GEMM2)


def packets(events: Events, flows: Flows, meta: dict[str, Any]) -> Iterator[bytes | memoryview]:
    """The trace in pieces, to be written one after the other."""
    plan = layout.lay_out(events)
    carried = layout.payload(events)
    uuids = _Uuids(plan, carried)
    yield _preamble(plan, carried, uuids, meta)
    packer = _Packer(events, flows, plan, uuids)
    blocks = range(0, len(plan.event), _UNITS_A_BLOCK)
    pending: deque[Future[memoryview]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for at in blocks:
            pending.append(pool.submit(packer.block, at))
            if len(pending) > 2 * _THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    yield _counters(carried, uuids)


class _Uuids:
    """Numbers of the tracks: processes, then SMs, lanes, counters."""

    def __init__(self, plan: layout.Layout, carried: layout.Payload) -> None:
        ranks = {track.rank for track in plan.tracks} | {pair[0] for pair in carried.pairs}
        sms = sorted({(track.rank, track.sm) for track in plan.tracks})
        self.process = {rank: i for i, rank in enumerate(sorted(ranks), start=1)}
        first = 1 + len(ranks)
        self.sm = {sm: i for i, sm in enumerate(sms, start=first)}
        first += len(sms)
        self.track = np.arange(first, first + len(plan.tracks))
        first += len(plan.tracks)
        self.pair = np.arange(first, first + len(carried.pairs))
        self.width = width_of(first + len(carried.pairs))


def _packet(content: bytes) -> bytes:
    return text(_PACKET, number(_SEQUENCE, 1) + content)


def _interned(field: int, entries: dict[int, str]) -> bytes:
    return b"".join(text(field, number(1, i) + text(2, name)) for i, name in entries.items())


def _preamble(
    plan: layout.Layout, carried: layout.Payload, uuids: _Uuids, meta: dict[str, Any]
) -> bytes:
    names = _interned(2, {int(kind): name for kind, name in KIND_NAME.items() if kind})
    names += _interned(1, {int(c) + 1: name for c, name in layout.CATEGORY.items()})
    names += _interned(3, {i: name for name, i in _ANNOTATION_ID.items()})
    out = [_packet(number(_SEQUENCE_FLAGS, _STATE_CLEARED) + text(_INTERNED, names))]

    def describe(uuid: int, parent: int, name: str, rank: int, extra: bytes = b"") -> None:
        content = number(1, uuid) + number(5, parent) + text(2, name) + number(12, rank) + extra
        out.append(_packet(text(_DESCRIPTOR, content)))

    label = layout.world_label(meta)
    dropped = (meta.get("rings") or {}).get("dropped", 0)
    in_order = number(11, 3)  # child_ordering EXPLICIT: by sibling_order_rank
    for rank, uuid in uuids.process.items():
        process = number(1, rank + 1) + text(6, f"rank {rank}" + (f" ({label})" if label else ""))
        if dropped:
            process += text(8, f"{dropped} records of the run were dropped")
        content = number(1, uuid) + text(3, process) + in_order + number(12, rank)
        out.append(_packet(text(_DESCRIPTOR, content)))
    for i, (source, to) in enumerate(carried.pairs):
        unit = text(8, number(3, 3))  # CounterDescriptor, UNIT_SIZE_BYTES
        name = f"payload rank {source} to rank {to}"
        describe(int(uuids.pair[i]), uuids.process[source], name, i, unit)
    for (rank, sm), uuid in uuids.sm.items():
        describe(uuid, uuids.process[rank], f"SM {sm}", len(carried.pairs) + sm, in_order)
    for i, track in enumerate(plan.tracks):
        parent = uuids.sm[track.rank, track.sm]
        describe(int(uuids.track[i]), parent, track.name, track.lane)
    return b"".join(out)


class _Packer:
    """Packs blocks of units; safe to call from several threads."""

    def __init__(self, events: Events, flows: Flows, plan: layout.Layout, uuids: _Uuids) -> None:
        self.events, self.plan, self.uuids = events, plan, uuids
        self.start = events.start_ns()
        self.uuid_of = uuids.track.astype(np.uint32)
        ends = np.concatenate([flows.source, flows.target])
        ids = np.tile(np.arange(1, len(flows.source) + 1, dtype=np.uint64), 2)
        order = np.argsort(ends, kind="stable")
        self.flow_ids = ids[order]
        counts = np.bincount(ends, minlength=len(events)) if len(ends) else np.zeros(0, np.int64)
        self.flow_count = counts if len(ends) else None
        self.flow_first = np.cumsum(counts) - counts
        self.widths = {
            "iter": _widest(events.iter),
            "expert": _widest(events.expert, NO_EXPERT),
            "tile": _widest(events.tile, NO_TILE),
            "peer": _widest(events.peer, NO_PEER),
            "stall_ns": _widest(events.stall_ns),
            "flags": _widest(events.flags),
        }
        aux = _widest(events.aux)
        self.widths |= dict.fromkeys(("cycles", "tokens", "lacking"), aux)
        self.widths["bytes"] = _widest(events.bytes)
        self.templates: dict[tuple[int, int], Any] = {}

    def block(self, first: int) -> memoryview:
        unit = slice(first, first + _UNITS_A_BLOCK)
        event = self.plan.event[unit]
        shape = self._shapes(event, self.plan.is_end[unit])
        flows = None if self.flow_count is None else self.flow_count[event]
        groups: list[tuple[np.ndarray, int, int]] = []
        if flows is not None and (carrying := np.flatnonzero(flows * (shape < _LAUNCH_END))).size:
            both = (flows[carrying].astype(np.int64) << 16) | shape[carrying]
            for value in np.unique(both).tolist():
                rows = carrying[both == value]
                groups.append((rows, value & 0xFFFF, value >> 16))
            shape = shape.copy()
            shape[carrying] = 0
        for value in np.flatnonzero(np.bincount(shape)).tolist():
            if value:
                groups.append((np.flatnonzero(shape == value), value, 0))
        size = np.empty(len(event), np.int64)
        for rows, value, count in groups:
            size[rows] = self._template(value, count).size // 8
        place = np.cumsum(size) - size
        out = np.empty(int(size.sum()), np.uint64)
        for rows, value, count in groups:
            template = self._template(value, count)
            filled = template.fill(self._values(event[rows], value, count), len(rows))
            length = template.size // 8
            out[place[rows][:, None] + np.arange(length)] = filled.view(np.uint64)
        return out.view(np.uint8).data

    def _shapes(self, event: np.ndarray, is_end: np.ndarray) -> np.ndarray:
        e = self.events
        shape = e.kind[event].astype(np.uint16)
        shape |= (e.peer[event] != NO_PEER).astype(np.uint16) * np.uint16(_PEER)
        shape |= (e.expert[event] != NO_EXPERT).astype(np.uint16) * np.uint16(_EXPERT)
        shape |= (e.tile[event] != NO_TILE).astype(np.uint16) * np.uint16(_TILE)
        shape |= (e.flags[event] != 0).astype(np.uint16) * np.uint16(_FLAGS)
        if is_end.any():
            shape[is_end] = _LAUNCH_END
        return shape

    def _values(self, event: np.ndarray, shape: int, flows: int) -> dict[str, np.ndarray]:
        e = self.events
        begin = e.t0_ns[event] - self.start
        values = {
            "track": self.uuid_of[self.plan.track[event]],
            "begin": begin,
            "end": begin + e.dur_ns[event],
        }
        for name in _annotations(shape):
            of = "aux" if name in ("cycles", "tokens", "lacking") else name
            values[name] = getattr(e, of)[event]
        if flows:
            values["flow"] = self.flow_ids[self.flow_first[event][:, None] + np.arange(flows)]
        return values

    def _template(self, shape: int, flows: int) -> Any:
        found = self.templates.get((shape, flows))
        if found is None:
            found = words(self._parts, shape, flows)
            self.templates[shape, flows] = found
        return found

    def _parts(self, pad: int, shape: int, flows: int) -> list[Part]:
        track = Slot(_TRACK, "track", self.uuids.width)
        end: list[Part] = [number(_TYPE, _END), track]
        if shape == _LAUNCH_END:
            return [_event("end", end, pad)]
        kind = EventKind(shape & 0xFF)
        type_ = _INSTANT if kind in layout.INSTANTS else _BEGIN
        body: list[Part] = [
            number(_TYPE, type_),
            track,
            number(_NAME, int(kind)),
            number(_CATEGORY, int(CLASS_OF[kind]) + 1),
        ]
        for name in _annotations(shape):
            value = Slot(3, name, self.widths[name])  # uint_value
            body.append(Message(_ANNOTATION, [number(1, _ANNOTATION_ID[name]), value]))
        body.append(Fixed(_FLOW if kind in _LEADS_TO else _FLOW_END, "flow", flows))
        if type_ == _INSTANT or kind == EventKind.LAUNCH:
            return [_event("begin", body, pad)]
        return [_event("begin", body, pad), _event("end", end, 0)]


def _event(time: str, body: Sequence[Part], pad: int) -> Message:
    # A varint has at most 10 bytes, so what one cannot take goes into the other.
    head = number(_SEQUENCE, 1, 1 + min(pad, 8))
    head += number(_SEQUENCE_FLAGS, _NEEDS_STATE, 1 + max(pad - 8, 0))
    return Message(_PACKET, [head, Slot(_TIMESTAMP, time, 8), Message(_TRACK_EVENT, body)])


def _annotations(shape: int) -> list[str]:
    """Names of the values that a unit of this shape carries."""
    if shape == _LAUNCH_END:
        return []
    kind = EventKind(shape & 0xFF)
    names = ["iter"]
    for bit, name in ((_EXPERT, "expert"), (_TILE, "tile"), (_PEER, "peer"), (_FLAGS, "flags")):
        if shape & bit:
            names.append(name)
    if kind in layout.AUX_NAME:
        names.append(layout.AUX_NAME[kind])
    if kind in STALL_REASON:
        names.append("stall_ns")
    return names


def _widest(values: np.ndarray, none: int | None = None) -> int:
    largest = int(values.max(initial=0))
    if none is not None and largest == none:
        largest = int(values[values != none].max(initial=0))
    return width_of(largest)


def _counters(carried: layout.Payload, uuids: _Uuids) -> memoryview:
    def parts(pad: int) -> list[Part]:
        body: list[Part] = [number(_TYPE, _COUNTER), Slot(_TRACK, "track", uuids.width)]
        return [_event("time", [*body, Slot(_COUNTER_VALUE, "total", 8)], pad)]

    template = words(parts)
    values = {"track": uuids.pair[carried.pair], "time": carried.t_ns, "total": carried.total}
    return template.fill(values, len(carried.t_ns)).reshape(-1).data

"""Chrome's JSON trace format: readable by Perfetto, chrome://tracing and speedscope.

Times are microseconds from the run's start with three decimals, which a double holds exactly enough
for a run of days; absolute times it would not.  The same processes, tracks, annotations, flows and
counters as the binary format, only larger and slower to load.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flashmoe.trace.columns import Events
from flashmoe.trace.export import layout
from flashmoe.trace.flows import Flows
from flashmoe.trace.schema import (
    CLASS_OF,
    KIND_NAME,
    NO_EXPERT,
    NO_PEER,
    NO_TILE,
    STALL_REASON,
    EventKind,
    TimeClass,
)

_EVENTS_A_BLOCK: Final = 1 << 17
_THOUSANDTHS: Final = pa.array([f".{i:03d}" for i in range(1000)])
_END: Final = pa.scalar("},\n")


def pieces(events: Events, flows: Flows, meta: dict[str, Any]) -> Iterator[bytes | memoryview]:
    """The file in pieces, to be written one after the other."""
    plan = layout.lay_out(events)
    carried = layout.payload(events)
    start = events.start_ns()
    yield b'{"displayTimeUnit":"ns","otherData":'
    yield json.dumps(_about(meta)).encode()
    yield b',\n"traceEvents":[\n'
    yield _names(plan, carried, meta)
    # Arrows come before slices: one binds to the innermost slice open at its time, and readers take
    # what happens at one time longest first, then in the order of lines, so that instants which lie
    # where the arrow's slice begins do not come between the two.
    for side, index in (("s", flows.source), ("f", flows.target)):
        yield from _flow_ends(events, plan, index, side, start)
    order = plan.event[~plan.is_end]
    for at in range(0, len(order), _EVENTS_A_BLOCK):
        yield from _slices(events, plan, order[at : at + _EVENTS_A_BLOCK], start)
    yield from _counters(carried)
    # Every line above ends in a comma: one event without a time closes the list.
    yield b'{"ph":"M","name":"process_sort_index","pid":1,"args":{"sort_index":0}}\n]}\n'


def _about(meta: dict[str, Any]) -> dict[str, Any]:
    """Of run.json, what a reader of the file alone must know."""
    return {
        "tool": meta.get("tool"),
        "command": meta.get("command"),
        "world": layout.world_label(meta),
        "config": meta.get("config"),
        "dropped_records": (meta.get("rings") or {}).get("dropped", 0),
    }


def _names(plan: layout.Layout, carried: layout.Payload, meta: dict[str, Any]) -> bytes:
    lines = []

    def name(kind: str, pid: int, tid: int | None, args: dict[str, Any]) -> None:
        line = {"ph": "M", "name": kind, "pid": pid, "args": args}
        lines.append(json.dumps(line if tid is None else line | {"tid": tid}) + ",\n")

    label = layout.world_label(meta)
    ranks = {track.rank for track in plan.tracks} | {source for source, _ in carried.pairs}
    for rank in sorted(ranks):
        title = f"rank {rank}" + (f" ({label})" if label else "")
        name("process_name", rank + 1, None, {"name": title})
        name("process_sort_index", rank + 1, None, {"sort_index": rank})
    for i, track in enumerate(plan.tracks):
        name("thread_name", track.rank + 1, i + 1, {"name": track.name})
        name("thread_sort_index", track.rank + 1, i + 1, {"sort_index": i})
    return "".join(lines).encode()


def _micros(ns: np.ndarray) -> pa.Array:
    whole, rest = np.divmod(ns, 1000)
    text = pc.cast(pa.array(whole), pa.string())
    return pc.binary_join_element_wise(text, _THOUSANDTHS.take(pa.array(rest)), "")


def _whole(values: np.ndarray) -> pa.Array:
    return pc.cast(pa.array(values), pa.string())


def _lines(*parts: Any) -> memoryview:
    """Joins texts, element by element, into one run of lines."""
    given = [pa.scalar(part) if isinstance(part, str) else part for part in parts]
    joined = pc.binary_join_element_wise(*given, _END, "")
    _, offsets, data = joined.buffers()
    ends = np.frombuffer(offsets, np.int32)[joined.offset : joined.offset + len(joined) + 1]
    return memoryview(data)[int(ends[0]) : int(ends[-1])]


def _slices(
    events: Events, plan: layout.Layout, order: np.ndarray, start: int
) -> Iterator[memoryview]:
    kinds = events.kind[order]
    for kind in np.unique(kinds).tolist():
        mine = order[kinds == kind]
        has = {
            "peer": events.peer[mine] != NO_PEER,
            "expert": events.expert[mine] != NO_EXPERT,
            "tile": events.tile[mine] != NO_TILE,
            "flags": events.flags[mine] != 0,
        }
        shape = sum(present.astype(np.uint8) << i for i, present in enumerate(has.values()))
        for value in np.unique(shape).tolist():
            rows = mine[shape == value]
            names = [name for i, name in enumerate(has) if value >> i & 1]
            yield _slices_of(events, plan, rows, EventKind(kind), names, start)


def _slices_of(
    events: Events,
    plan: layout.Layout,
    rows: np.ndarray,
    kind: EventKind,
    names: list[str],
    start: int,
) -> memoryview:
    category = layout.CATEGORY[TimeClass(int(CLASS_OF[kind]))]
    instant = kind in layout.INSTANTS
    phase = '"ph":"i","s":"t"' if instant else '"ph":"X"'
    head = f'{{{phase},"name":"{KIND_NAME[kind]}","cat":"{category}","pid":'
    parts: list[Any] = [head, _whole(events.rank[rows].astype(np.int32) + 1), ',"tid":']
    parts += [_whole(plan.track[rows] + 1), ',"ts":', _micros(events.t0_ns[rows] - start)]
    if not instant:
        parts += [',"dur":', _micros(events.dur_ns[rows])]
    parts += [',"args":{"iter":', _whole(events.iter[rows])]
    for name in names:
        parts += [f',"{name}":', _whole(getattr(events, name)[rows])]
    if kind in layout.AUX_NAME:
        values = events.bytes if layout.AUX_NAME[kind] == "bytes" else events.aux
        parts += [f',"{layout.AUX_NAME[kind]}":', _whole(values[rows])]
    if kind in STALL_REASON:
        parts += [',"stall_ns":', _whole(events.stall_ns[rows])]
    return _lines(*parts, "}")


def _flow_ends(
    events: Events, plan: layout.Layout, index: np.ndarray, side: str, start: int
) -> Iterator[memoryview]:
    if not len(index):
        return
    binding = ',"bp":"e"' if side == "f" else ""
    head = f'{{"ph":"{side}"{binding},"name":"flow","cat":"flow","id":'
    numbers = _whole(np.arange(1, len(index) + 1))
    yield _lines(
        head, numbers, ',"pid":', _whole(events.rank[index].astype(np.int32) + 1), ',"tid":',
        _whole(plan.track[index] + 1), ',"ts":', _micros(events.t0_ns[index] - start),
    )  # fmt: skip


def _counters(carried: layout.Payload) -> Iterator[memoryview]:
    for i, (source, to) in enumerate(carried.pairs):
        mine = carried.pair == i
        yield _lines(
            f'{{"ph":"C","name":"payload rank {source} to rank {to}","pid":{source + 1},"ts":',
            _micros(carried.t_ns[mine]), ',"args":{"bytes":', _whole(carried.total[mine]), "}",
        )  # fmt: skip

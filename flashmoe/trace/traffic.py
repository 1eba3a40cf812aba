"""Who sent how many bytes to whom, and what other ways of moving the rows would have sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from flashmoe.trace.columns import Events, column
from flashmoe.trace.links import link_figures
from flashmoe.trace.rundir import Run
from flashmoe.trace.schema import EventKind

TRAFFIC_SCHEMA = 1
CAPACITY_FACTOR = 1.25


def traffic_summary(run: Run, iteration: int | None = None, bins: int = 64) -> dict[str, Any]:
    """Every figure of `flashmoe traffic --json`: bytes are int, rates GB/s (1e9 bytes a second).

    ``iteration`` None: all of the run's; ``bins``: of the rate over time.
    """
    events, meta = Events.of(run.events), run.meta
    world, config = meta.get("world") or {}, meta.get("config") or {}
    ranks = _ranks(events, world)
    moves = {
        "dispatch": _moved(events, EventKind.DISPATCH, iteration),
        "return": _moved(events, EventKind.PUT, iteration),
    }
    matrices = {name: matrix(events, rows, ranks) for name, rows in moves.items()}
    both = np.sort(np.concatenate(list(moves.values())))
    crossing = both[events.rank[both] != events.peer[both]]
    total = matrices["dispatch"] + matrices["return"]
    payload = int(total.sum() - np.trace(total))
    start, end = window(events, iteration)
    launches = 1 if iteration is not None else _iterations(events)
    of_counts = int(events.bytes[_moved(events, EventKind.COUNTS, iteration)].sum())
    links = link_figures(meta.get("nvlink"))
    row_bytes = world.get("row_bytes")
    counts, plan = (_of_iteration(table, iteration) for table in (run.counts, run.plan))
    other = None
    if row_bytes and len(counts["rows"]):
        other = alternatives(
            counts,
            world["experts_of_rank"],
            world["tokens"],
            int(config["experts"]),
            int(config["top_k"]),
            int(row_bytes),
            plan,
        )
    return {
        "schema": TRAFFIC_SCHEMA,
        "run": run.path.name,
        "world": world.get("kind"),
        "topology": world.get("topology"),
        "iteration": iteration,
        "iterations": launches,
        "ranks": ranks,
        "bounds": bool(meta["rings"]["dropped"]),
        "payload_bytes": payload,
        "local_bytes": int(np.trace(total)),
        "matrix_bytes": total.tolist(),
        "dispatch_bytes": matrices["dispatch"].tolist(),
        "return_bytes": matrices["return"].tolist(),
        "counts_bytes": of_counts,
        # Every rank tells every rank 8 bytes an expert; some of it goes unrecorded.
        "counts_bounds": of_counts < 8 * config.get("experts", 0) * ranks**2 * launches,
        "span_ns": end - start,
        "mean_gb_per_s": payload / (end - start) if end > start else None,
        "rate": rate(events, crossing, start, end, bins),
        "way": way_of(world, links),
        "per_gpu": per_gpu(events, crossing, start, end, bins, ranks)
        if world.get("topology") == "several-gpus"
        else None,
        "nvlink": links,
        "alternatives": other,
    }


def matrix(events: Events, rows: np.ndarray, ranks: int) -> np.ndarray:
    """int64 [W, W]: bytes of the events ``rows``, by source (axis 0) and destination."""
    place = events.rank[rows].astype(np.int64) * ranks + events.peer[rows]
    # Exact below 2^53 bytes.
    return np.bincount(place, events.bytes[rows], ranks * ranks).astype(np.int64).reshape(ranks, -1)


def rate(events: Events, rows: np.ndarray, start: int, end: int, bins: int) -> dict[str, Any]:
    """Bytes of the transfers ``rows`` by the time bin in which each ended, and GB/s."""
    width = max(1, -(-(end - start) // bins))
    at = (events.t0_ns[rows] + events.dur_ns[rows] - start) // width
    per_bin = np.bincount(np.clip(at, 0, bins - 1), events.bytes[rows], bins).astype(np.int64)
    return {
        "bin_ns": width,
        "bytes": per_bin.tolist(),
        "gb_per_s": (per_bin / width).tolist(),
        "peak_gb_per_s": float(per_bin.max(initial=0) / width),
    }


def way_of(world: dict[str, Any], links: dict[str, Any] | None) -> str:
    """What the bytes between ranks went over, as far as the run knows: in words."""
    topology, processes = world.get("topology"), world.get("processes") or {}
    if world.get("kind") == "host":
        return f"{'processes' if processes else 'threads'} of one host: no link"
    if topology != "several-gpus":
        several = len({rank.get("gpu") for rank in processes.get("ranks", ())}) > 1
        return "several ranks a GPU: not a link's rate" if several else "within one GPU"
    nodes = processes.get("nodes", 1)
    how = "by pointer" if processes.get("pointers", True) else "by put-with-signal"
    if nodes > 1:
        return f"between GPUs of {nodes} nodes"
    share = links["total"]["data_over_payload"] if links and links["total"] else None
    if share is None:
        return f"between GPUs of one node, {how}"
    # The counters see all that goes over NVLink: at least the payload, or it went elsewhere.
    return f"{'over NVLink' if share > 0.9 else 'between GPUs, not over NVLink'}, {how}"


def per_gpu(
    events: Events, rows: np.ndarray, start: int, end: int, bins: int, ranks: int
) -> dict[str, Any] | None:
    """What a GPU of its own sends to the others, GB/s, where each rank has one.

    ``mean_gb_per_s`` by rank; ``peak_gb_per_s`` of ``peak_rank``, in the fullest of the time bins.
    It is what nccl-tests call the bus bandwidth of an all-to-all.  None where nothing ran.
    """
    if end <= start:
        return None
    source = events.rank[rows]
    rates = [rate(events, rows[source == rank], start, end, bins) for rank in range(ranks)]
    peaks = [each["peak_gb_per_s"] for each in rates]
    return {
        "mean_gb_per_s": [sum(each["bytes"]) / (end - start) for each in rates],
        "peak_gb_per_s": max(peaks),
        "peak_rank": int(np.argmax(peaks)),
    }


def alternatives(
    counts: dict[str, np.ndarray],
    experts_of_rank: list[list[int]],
    tokens: list[int],
    experts: int,
    top_k: int,
    row_bytes: int,
    plan: dict[str, np.ndarray],
) -> dict[str, Any]:
    """Bytes that would have crossed, both ways, had the rows been moved otherwise.

    ``counts`` and ``plan``: columns of counts.parquet and plan.parquet.  ``expected``: exactly the
    rows routed.  ``padded``: each (source, expert) rounded up to whole tiles of the height that the
    expert's had in that launch, of which ``tile_rows`` is the range.  ``capacity``: each source
    sends every expert a buffer of ceil(factor x T x k / E) rows, and drops what does not fit;
    ``capacity_lossless`` is the smallest such buffer that drops nothing.
    """
    ranks, launches = len(tokens), len(np.unique(counts["iter"]))
    owner = np.zeros(experts, np.int64)
    for rank, (a, b) in enumerate(experts_of_rank):
        owner[a:b] = rank
    which, launch = np.unique(counts["iter"], return_inverse=True)
    place = (launch * ranks + counts["source"]) * experts + counts["expert"]
    rows = np.bincount(place, counts["rows"], len(which) * ranks * experts).astype(np.int64)
    rows = rows.reshape(-1, ranks, experts)
    tile = _tallest(plan, which, experts)
    crosses = owner[None, :] != np.arange(ranks)[:, None]
    back_and_forth = 2 * row_bytes

    def bytes_of(sent: np.ndarray) -> int:
        return int((sent * crosses).sum()) * back_and_forth

    mean = np.array(tokens) * top_k / experts
    fixed = np.ceil(CAPACITY_FACTOR * mean).astype(np.int64)[:, None]
    largest = int(rows.max(initial=0))
    used = tile[rows.any(axis=1)]
    top = int(used.max(initial=1))
    return {
        "expected": {"bytes": bytes_of(rows)},
        "padded": {
            "bytes": bytes_of(-(-rows // tile[:, None]) * tile[:, None]),
            "tile_rows": [int(used.min(initial=top)), top],
        },
        "capacity": {
            "bytes": bytes_of(np.broadcast_to(fixed, rows.shape)),
            "factor": CAPACITY_FACTOR,
            "rows_per_expert": int(fixed.max()),
            "rows_dropped": int(np.maximum(rows - fixed, 0).sum()),
        },
        "capacity_lossless": {
            "bytes": int(crosses.sum()) * launches * largest * back_and_forth,
            "factor": largest / float(mean.max()) if mean.max() else None,
            "rows_per_expert": largest,
        },
    }


def _tallest(plan: dict[str, np.ndarray], launches: np.ndarray, experts: int) -> np.ndarray:
    """int64 [launches, E]: height of the expert's tallest tile, 1 where it has none."""
    height = np.ones((len(launches), experts), np.int64)
    known = np.flatnonzero((plan["gemm"] == 1) & (plan["col_tile"] == 0))
    known = known[np.isin(plan["iter"][known], launches)]
    at = np.searchsorted(launches, plan["iter"][known])
    np.maximum.at(height, (at, plan["expert"][known]), plan["height"][known])
    return height


def window(events: Events, iteration: int | None) -> tuple[int, int]:
    """First begin and last end of the run's launches, or of one iteration's, ns; (0, 0) if none."""
    rows = np.flatnonzero(events.kind == EventKind.LAUNCH)
    if iteration is not None:
        rows = rows[events.iter[rows] == iteration]
    if not len(rows):
        rows = np.arange(len(events))
        if iteration is not None:
            rows = np.flatnonzero(events.iter == iteration)
    if not len(rows):
        return 0, 0
    t0 = events.t0_ns[rows]
    return int(t0.min()), int((t0 + events.dur_ns[rows]).max())


def _moved(events: Events, kind: EventKind, iteration: int | None) -> np.ndarray:
    rows = np.flatnonzero(events.kind == kind)
    return rows if iteration is None else rows[events.iter[rows] == iteration]


def _ranks(events: Events, world: dict[str, Any]) -> int:
    return int(world.get("ranks") or int(events.rank.max(initial=0)) + 1)


def _iterations(events: Events) -> int:
    return len(np.unique(events.iter)) if len(events) else 0


def _of_iteration(table: pa.Table, iteration: int | None) -> dict[str, np.ndarray]:
    """The table's columns of numbers, of all iterations or of one."""
    numbers = [field.name for field in table.schema if not pa.types.is_string(field.type)]
    get = {name: column(table, name).astype(np.int64) for name in numbers}
    if iteration is None:
        return get
    mine = get["iter"] == iteration
    return {name: values[mine] for name, values in get.items()}

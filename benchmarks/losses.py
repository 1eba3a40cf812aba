"""Where the time of traced launches goes: a table with a column a run, an SM's mean share in us.

    flashmoe trace qwen3-30b -T 8192 -n 5 -o big.fmoe
    python benchmarks/losses.py big.fmoe [MORE.fmoe ...] [--json FILE]

An SM's share is the mean of its two math groups'.  Each row is the mean over all SMs of a launch,
then the median over the run's launches.  The whole launch is its rank's wall (docs/numbers.md):
from the first begin to the last end of any actor.  A math group's part of it is cut at four times:

    gate            from the wall's begin to the end of the group's last `gate`
    counts, plan    until the end of its `plan`, or of its SM's where it has none itself (host
                    engine); `counts` that come later are taken here from where they are
    until the first tile begins, of either GEMM
    tiles           until the end of its last `gemm1`, `gemm2` or `give_back`
    after the last tile, of which most is `combine`

Waits before the plan's end have a row of their own where there are any, and so has what is behind
the plan of groups without a tile.  Products are `gemm1` and `gemm2` without `stall_ns`, the time
they wait for operands; those of GEMM1 hold the activation.  Between tiles is whatever of theirs is
none of these: waits, hand-over, by units also `combine`.  So a launch's parts add up to it exactly,
and medians over several nearly: said below the table where they are off by more than 1 %.

The number before the products is how many tiles a group worked at.  On a GPU both groups of an SM
work at each of its tiles, but a unit (few tokens) is one group's, so that an SM has twice as many;
a unit's span begins when its first operands are there, and what it waited for them is between.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe.errors import FlashmoeError
from flashmoe.trace import schema
from flashmoe.trace.account import Account, Actors, account
from flashmoe.trace.columns import Events
from flashmoe.trace.intervals import NEVER, least_by
from flashmoe.trace.metadata import require_described
from flashmoe.trace.rundir import Run, open_run
from flashmoe.trace.schema import EventKind, Lane, RecordFlag, TimeClass
from flashmoe.trace.tensor import TensorWork

#: The parts of a launch in order, and what the table calls them.
PARTS = {
    "gate": "gate",
    "waits": "waiting for logits, barrier and counts",
    "plan": "counts and plan",
    "first": "until the first tile begins",
    "gemm1": "products of GEMM1",
    "gemm1_operands": "waiting for operands there",
    "gemm2": "products of GEMM2",
    "gemm2_operands": "waiting for operands there",
    "give_back": "giving back",
    "between": "between tiles",
    "last": "after the last tile",
    "no_tile": "groups without a tile, after the plan",
}
#: Left out of the table where no run has any.
RARE = ("waits", "no_tile")
#: How far the parts may be from the whole launch before that is said.
NEAR = 0.01


@dataclass(frozen=True)
class Spans:
    """A run's events by cell, which is an actor and an iteration: ``actor`` * N + ``iter``.

    ``cell``, ``begin``, ``end`` (ns), ``stall`` (ns), ``kind``: integers [events].
    """

    cells: int
    cell: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    stall: np.ndarray
    kind: np.ndarray

    @classmethod
    def of(cls, events: Events, spent: Account) -> Spans:
        """Of the events whose actors the account has; ``launch`` events are no spans."""
        actor = spent.actors.index(events.rank, events.cta, events.lane)
        rows = np.flatnonzero((actor >= 0) & (events.kind != EventKind.LAUNCH))
        n = len(spent.iterations)
        begin = events.t0_ns[rows]
        return cls(
            len(spent.actors) * n,
            actor[rows] * n + events.iter[rows],
            begin,
            begin + events.dur_ns[rows],
            events.stall_ns[rows].astype(np.int64),
            events.kind[rows],
        )

    def of_kinds(self, *kinds: EventKind) -> np.ndarray:
        """Which spans are of one of ``kinds``."""
        return np.flatnonzero(schema.among(self.kind, kinds))

    def first(self, rows: np.ndarray) -> np.ndarray:
        """int64 [cells]: the first begin among ``rows``, NEVER where a cell has none."""
        return least_by(self.cell[rows], self.begin[rows], self.cells)

    def last(self, rows: np.ndarray) -> np.ndarray:
        """int64 [cells]: the last end among ``rows``, 0 where a cell has none."""
        out = np.zeros(self.cells, np.int64)
        np.maximum.at(out, self.cell[rows], self.end[rows])
        return out

    def inside(self, rows: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """int64 [cells]: ns of ``rows`` between the times ``a`` and ``b`` [cells]."""
        cell = self.cell[rows]
        length = np.minimum(self.end[rows], b[cell]) - np.maximum(self.begin[rows], a[cell])
        return self.total(rows, np.maximum(length, 0))

    def total(self, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        """int64 [cells]: the sum of ``values``, one for each of ``rows``."""
        return np.bincount(self.cell[rows], values, self.cells).astype(np.int64)


def parts_of(spans: Spans, spent: Account) -> dict[str, np.ndarray]:
    """What every actor's wall divides into, int64 ns [actors, N] each: by PARTS, and ``tiles1`` and
    ``tiles2``, how many gemm1 and gemm2 it has.

    Meant for math lanes.  The parts add up to the wall of the actor's rank.
    """
    actors, n = spent.actors, len(spent.iterations)
    windows = {rank: spent.rank_window(rank) for rank in np.unique(actors.rank).tolist()}
    begin = np.concatenate([windows[rank][0] for rank in actors.rank.tolist()])
    end = np.concatenate([windows[rank][1] for rank in actors.rank.tolist()])

    waits = np.flatnonzero(schema.CLASS_OF[spans.kind] == TimeClass.WAIT)
    gemm1, gemm2 = spans.of_kinds(EventKind.GEMM1), spans.of_kinds(EventKind.GEMM2)
    give_back, counts = spans.of_kinds(EventKind.GIVE_BACK), spans.of_kinds(EventKind.COUNTS)
    tiles = np.concatenate([gemm1, gemm2])

    first = np.minimum(spans.first(tiles), end)
    gated = np.clip(spans.last(spans.of_kinds(EventKind.GATE)), begin, first)
    planned = spans.last(spans.of_kinds(EventKind.PLAN)).reshape(-1, n)
    planned = np.where(planned > 0, planned, _of_sm(planned, actors)).ravel()
    planned = np.clip(planned, gated, first)
    has_tile = spans.first(tiles) < NEVER
    first = np.where(has_tile, first, planned)
    last = np.where(has_tile, spans.last(np.concatenate([tiles, give_back])), planned)

    out = {
        "waits": spans.inside(waits, begin, planned),
        "gemm1_operands": spans.total(gemm1, spans.stall[gemm1]),
        "gemm2_operands": spans.total(gemm2, spans.stall[gemm2]),
        "give_back": spans.inside(give_back, first, last),
        "tiles1": np.bincount(spans.cell[gemm1], minlength=spans.cells),
        "tiles2": np.bincount(spans.cell[gemm2], minlength=spans.cells),
    }
    out["gate"] = gated - begin - spans.inside(waits, begin, gated)
    out["gemm1"] = spans.inside(gemm1, first, last) - out["gemm1_operands"]
    out["gemm2"] = spans.inside(gemm2, first, last) - out["gemm2_operands"]
    late = {
        "first": spans.inside(counts, planned, first),
        "between": spans.inside(counts, first, last),
        "last": spans.inside(counts, last, end),
    }
    out["plan"] = planned - gated - spans.inside(waits, gated, planned) + sum(late.values())
    out["first"] = first - planned - late["first"]
    of_tiles = ("gemm1", "gemm1_operands", "gemm2", "gemm2_operands", "give_back")
    out["between"] = last - first - sum(out[name] for name in of_tiles) - late["between"]
    after = end - last - late["last"]
    out["last"], out["no_tile"] = np.where(has_tile, after, 0), np.where(has_tile, 0, after)
    return {name: values.reshape(-1, n) for name, values in out.items()}


def _of_sm(values: np.ndarray, actors: Actors) -> np.ndarray:
    """int64 [actors, N]: the largest of ``values`` among the actors of each one's SM."""
    place = actors.rank * (int(actors.cta.max(initial=0)) + 1) + actors.cta
    sms, of_sm = np.unique(place, return_inverse=True)
    most = np.zeros((len(sms), values.shape[1]), np.int64)
    np.maximum.at(most, of_sm, values)
    return most[of_sm]


def losses(run: Run) -> dict[str, Any]:
    """A run's column: its parts in us, by PARTS, and what is known of the run.

    Raises FlashmoeError where the run was not traced, or a launch's records are not all there.
    """
    meta = run.meta
    events, actors = Events.of(run.events), Actors.of(meta)
    spent = account(events, actors, int(meta.get("iterations") or 1))
    _require_whole(run, events, spent)
    require_described(meta, run.path / "run.json")
    launches = np.flatnonzero(spent.wall_ns.any(axis=0))
    math = np.isin(actors.lane, (Lane.MATH0, Lane.MATH1))
    found = {
        name: values[math][:, launches].mean(axis=0)
        for name, values in parts_of(Spans.of(events, spent), spent).items()
    }
    walls = spent.wall_ns[math][:, launches].mean(axis=0) / 1000
    parts = {name: statistics.median((found[name] / 1000).tolist()) for name in PARTS}
    work = TensorWork(run, events, spent)
    use = [_tensor_use(work, actors.rank[math], int(at)) for at in launches]
    known = [share for share in use if share is not None]
    world, tokens = meta["world"], meta["world"]["tokens"]
    return {
        "run": run.path.name,
        "title": f"{meta['config'].get('name') or run.path.stem} {sum(tokens)}"
        + (f", {len(tokens)} ranks" if len(tokens) > 1 else ""),
        "commit": (meta.get("tool") or {}).get("commit"),
        "device": (meta.get("device") or {}).get("name"),
        "launches": len(launches),
        "by_units": world["kind"] != "host" and _by_units(events),
        "launch_us": statistics.median(walls.tolist()),
        "launch_us_each": [round(wall, 3) for wall in walls.tolist()],
        "parts_us": parts,
        "parts_sum_us": sum(parts.values()),
        "tiles": {
            "gemm1": statistics.median(found["tiles1"].tolist()),
            "gemm2": statistics.median(found["tiles2"].tolist()),
        },
        "overlap_us": spent.overlap_ns / 1000,
        "tensor_use": statistics.median(known) if known else None,
        "tile_fill": work.tiles()["fill"],
    }


def _require_whole(run: Run, events: Events, spent: Account) -> None:
    """Raises FlashmoeError where records of a launch were dropped, or it did not end well."""
    if not len(events):
        raise FlashmoeError(f"{run.path} holds no events", "record a run with `flashmoe trace`", 2)
    ended = np.bincount(
        events.iter[events.kind == EventKind.LAUNCH], minlength=len(spent.iterations)
    )
    failed = (events.flags & (RecordFlag.OPEN | RecordFlag.GAVE_UP)).any()
    if failed or spent.bound.any() or (ended != (spent.wall_ns > 0).sum(axis=0)).any():
        dropped = run.meta["rings"].get("dropped")
        raise FlashmoeError(
            f"{run.path} does not hold whole launches: "
            + (f"{dropped} records were dropped" if dropped else "one did not end well"),
            "trace again" + (" with a larger --ring-capacity" if dropped else ""),
        )


def _by_units(events: Events) -> bool:
    """Whether every tile that ran was one math group's alone, which those of a GPU are by units."""
    rows = np.flatnonzero(schema.among(events.kind, schema.TENSOR_KINDS))
    tiles = np.stack([getattr(events, name)[rows] for name in ("iter", "rank", "tile")])
    return len(rows) > 0 and np.unique(tiles, axis=1).shape[1] == len(rows)


def _tensor_use(work: TensorWork, ranks: np.ndarray, at: int) -> float | None:
    """The useful share of the tensor cores in a launch, the mean over the SMs of ``ranks``."""
    share = {rank: work.of_rank(rank, at)["useful_share"] for rank in np.unique(ranks).tolist()}
    if None in share.values():
        return None
    return statistics.fmean(share[rank] for rank in ranks.tolist())


def table(columns: list[dict[str, Any]]) -> str:
    """The markdown table, and lines below it: which run each column is, and what is off."""
    same = Counter(column["title"] for column in columns)
    titles = [
        c["title"] if same[c["title"]] == 1 else f"{c['title']} ({c['run']})" for c in columns
    ]
    rows = [["us", *titles]]
    rows.append(["whole launch, traced", *(_us(c["launch_us"]) for c in columns)])
    for name, label in PARTS.items():
        us = [c["parts_us"][name] for c in columns]
        if name in RARE and not any(us):
            continue
        cells = [_us(value) for value in us]
        if name in ("gemm1", "gemm2"):
            cells = [
                f"{c['tiles'][name]:.1f} {'units' if c['by_units'] else 'tiles'}, {cell}"
                for c, cell in zip(columns, cells, strict=True)
            ]
        rows.append([label, *cells])
    rows.append(["parts added up", *(_us(c["parts_sum_us"]) for c in columns)])
    rows.append(["tensor use", *(_percent(c["tensor_use"]) for c in columns)])
    rows.append(["tile fill", *(_percent(c["tile_fill"]) for c in columns)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---" * (len(columns) + 1) + "|")
    lines.append("")
    for title, column in zip(titles, columns, strict=True):
        lines += _notes(title, column)
    return "\n".join(lines)


def _notes(title: str, column: dict[str, Any]) -> list[str]:
    commit, launches = column["commit"], column["launches"]
    about = [
        *([] if column["run"] in title else [column["run"]]),
        f"{launches} launch{'es' if launches > 1 else ''}",
        column["device"] or "no GPU",
        f"commit {commit[:7]}" if commit else "commit unknown",
    ]
    lines = [f"{title}: {', '.join(about)}"]
    whole, added = column["launch_us"], column["parts_sum_us"]
    if abs(added - whole) > NEAR * whole:
        lines.append(f"{title}: the parts add up to {_percent(added / whole)} of the whole launch")
    if column["overlap_us"]:
        lines.append(f"{title}: {column['overlap_us']:.1f} us are claimed by two spans of an actor")
    return lines


def _us(value: float) -> str:
    return f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _write(path: Path, columns: list[dict[str, Any]]) -> None:
    try:
        path.write_text(json.dumps({"unit": "us", "runs": columns}, indent=1) + "\n")
    except OSError as error:
        raise FlashmoeError(
            f"{path} cannot be written: {error.strerror}", "give --json another file"
        ) from error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN.fmoe", help="a traced run's directory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    given = parser.parse_args(arguments)
    try:
        columns = [losses(open_run(path)) for path in given.runs]
        print(table(columns))
        if given.json:
            _write(given.json, columns)
    except FlashmoeError as error:
        print(f"error: {error.message}\nhint:  {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

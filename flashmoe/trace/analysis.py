"""Every figure of `flashmoe timeline --json`: docs/numbers.md derives each."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashmoe.errors import FlashmoeError
from flashmoe.trace import schema
from flashmoe.trace.account import Account, Actors, account
from flashmoe.trace.breakdown import Breakdown
from flashmoe.trace.causality import order_of
from flashmoe.trace.columns import Events
from flashmoe.trace.overlap import hidden_communication
from flashmoe.trace.routed import RoutedWork
from flashmoe.trace.rundir import Run
from flashmoe.trace.tensor import TensorWork

TIMELINE_SCHEMA = 1


def timeline_summary(run: Run, iteration: int | None = None) -> dict[str, Any]:
    """Every figure of `flashmoe timeline --json`; times are int ns, shares in 0..1.

    ``iteration`` None adds up all of the run's, each apart in ``iterations``.  ``tracer``,
    ``rings`` and ``overlap_ns`` are of the whole run always.  Raises FlashmoeError where the run
    has no such iteration.
    """
    events, meta = Events.of(run.events), run.meta
    spent = account(events, Actors.of(meta), int(meta.get("iterations") or 1))
    clock, world = meta.get("clock") or {}, meta.get("world") or {}
    tracer = _tracer(clock, spent)
    if iteration is not None:
        spent = one_iteration(spent, iteration)
    actors, rings = spent.actors, meta["rings"]
    spending, work = Breakdown(spent), TensorWork(run, events, spent)
    hidden, routed = hidden_communication(events, spent), RoutedWork(run, spent.iterations)

    def figures(rank: int, at: int | slice = slice(None)) -> dict[str, Any]:
        more = {"hidden": hidden[rank].of(at), "tensor": work.of_rank(rank, at)}
        return more | routed.of_rank(rank, at)

    ranks, of_rank = np.unique(actors.rank, return_inverse=True)
    ctas, first, of_cta = np.unique(
        actors.rank * (int(actors.cta.max(initial=0)) + 1) + actors.cta,
        return_index=True,
        return_inverse=True,
    )
    lanes, of_lane = np.unique(actors.lane, return_inverse=True)
    begin = spent.begin_ns[spent.begin_ns > 0]
    start = int(begin.min(initial=spent.end_ns.max(initial=0)))
    total = spending.grouped(np.zeros(len(actors), np.int64), 1)[0]
    return {
        "schema": TIMELINE_SCHEMA,
        "run": run.path.name,
        "world": world.get("kind"),
        "topology": world.get("topology"),
        "iteration": iteration,
        "start_ns": start,
        "span_ns": int(spent.end_ns.max(initial=0)) - start,
        "events": len(events) if iteration is None else int((events.iter == iteration).sum()),
        "bounds": total["bounds"],
        "overlap_ns": spent.overlap_ns,
        "clock": clock | {"sm_mhz_mean": work.sm_mhz, "order": order_of(run, events)},
        "tracer": tracer,
        "rings": {name: rings.get(name) for name in ("n", "capacity", "mode", "records", "dropped")}
        | {
            "with_drops": int((actors.dropped > 0).sum()),
            "never_began": sum(not ring["began"] for ring in rings["per_ring"]),
        },
        "total": total,
        "ranks": [
            {"rank": rank} | entry | figures(rank)
            for rank, entry in zip(
                ranks.tolist(), spending.grouped(of_rank, len(ranks)), strict=True
            )
        ],
        "iterations": [
            {"iter": int(spent.iterations[at]), "rank": rank} | entry | figures(rank, at)
            for at, entries in enumerate(spending.by_iteration(of_rank, len(ranks)))
            for rank, entry in zip(ranks.tolist(), entries, strict=True)
        ],
        "lanes": [
            {"lane": schema.LANE_NAME[schema.Lane(lane)]} | entry
            for lane, entry in zip(
                lanes.tolist(), spending.grouped(of_lane, len(lanes)), strict=True
            )
        ],
        "sms": [
            {"rank": int(actors.rank[i]), "sm": int(actors.sm[i]), "cta": int(actors.cta[i])}
            | entry
            for i, entry in zip(first, spending.grouped(of_cta, len(ctas)), strict=True)
        ],
        "actors": _per_actor(spent, spending),
        "tiles": work.tiles(),
        "experts": routed.experts(),
    }


def one_iteration(spent: Account, iteration: int) -> Account:
    """The same account, of one iteration alone; FlashmoeError where there is no such one."""
    if not 0 <= iteration < len(spent.iterations):
        raise FlashmoeError(
            f"the run has no iteration {iteration}",
            f"it has {len(spent.iterations)}, counted from 0",
            2,
        )
    at = slice(iteration, iteration + 1)
    return Account(
        actors=spent.actors,
        iterations=spent.iterations[at],
        kind_ns=spent.kind_ns[:, at],
        stall_ns=spent.stall_ns[:, at],
        class_ns=spent.class_ns[:, at],
        wall_ns=spent.wall_ns[:, at],
        begin_ns=spent.begin_ns[:, at],
        end_ns=spent.end_ns[:, at],
        bound=spent.bound[:, at],
        overlap_ns=spent.overlap_ns,
    )


def _per_actor(spent: Account, spending: Breakdown) -> list[dict[str, Any]]:
    actors = spent.actors
    names = [schema.LANE_NAME[lane] for lane in schema.Lane]
    rows = zip(
        actors.rank.tolist(), actors.sm.tolist(), actors.cta.tolist(), actors.lane.tolist(),
        actors.dropped.tolist(), spending.grouped(np.arange(len(actors)), len(actors)),
        strict=True,
    )  # fmt: skip
    return [
        {"rank": rank, "sm": sm, "cta": cta, "lane": names[lane], "dropped": dropped} | entry
        for rank, sm, cta, lane, dropped, entry in rows
    ]


def _tracer(clock: dict[str, Any], spent: Account) -> dict[str, Any]:
    """What tracing took in the whole run: records written, also dropped, times one's cost."""
    cost, records = clock.get("record_cost_ns"), int(spent.actors.count.sum())
    total = None if cost is None else cost * records
    wall = int(spent.wall_ns.sum())
    return {
        "records": records,
        "record_cost_ns": cost,
        "cost_ns": total,
        "share": None if total is None or not wall else total / wall,
    }

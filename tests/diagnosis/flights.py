"""Flight recorders as engines leave them, made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashmoe.trace.diagnosis import HangReport, diagnose
from flashmoe.trace.schema import (
    FLIGHT_SLOT,
    NO_EXPERT,
    NO_PEER,
    NO_TILE,
    ActorState,
    EventKind,
    Lane,
)

DEADLINE_NS = 1_000_000_000
BEGIN_NS = 5_000_000_000
WAIT_NS = BEGIN_NS + 1_000_000  # when the waits of a hang began
RAISED_NS = WAIT_NS + DEADLINE_NS  # when the first gave up
NOW_NS = RAISED_NS + 20_000_000


class Launch:
    """All actors of W ranks in launch ``epoch``, at work until told otherwise."""

    def __init__(self, ranks: int = 4, ctas: int = 2, epoch: int = 1) -> None:
        self.ranks, self.ctas = ranks, ctas
        self.slots = np.zeros(ranks * ctas * len(Lane), FLIGHT_SLOT)
        self.epoch = epoch
        for rank in range(ranks):
            self.set(rank, ActorState.RUNNING, EventKind.LAUNCH, since=BEGIN_NS)

    def _index(self, rank: int, cta: int | None, lane: Lane | None) -> np.ndarray:
        grid = np.arange(len(self.slots)).reshape(self.ranks, self.ctas, len(Lane))
        picked = grid[rank]
        picked = picked if cta is None else picked[cta : cta + 1]
        return (picked if lane is None else picked[:, int(lane)]).ravel()

    def set(
        self,
        rank: int,
        state: ActorState,
        kind: EventKind,
        cta: int | None = None,
        lane: Lane | None = None,
        since: int = WAIT_NS,
        **values: int,
    ) -> Launch:
        for i in self._index(rank, cta, lane):
            slot = self.slots[i]
            slot["since_ns"], slot["epoch"] = since, self.epoch
            slot["state"], slot["kind"] = state, kind
            slot["peer"] = values.get("peer", NO_PEER)
            slot["expert"] = values.get("expert", NO_EXPERT)
            slot["tile"] = values.get("tile", NO_TILE)
            slot["expected"] = values.get("expected", 0)
            slot["seen"] = values.get("seen", 0)
            slot["rank"] = rank
            slot["cta"] = i // len(Lane) % self.ctas
            slot["sm"] = slot["cta"]
            slot["lane"] = i % len(Lane)
        return self

    def waits(
        self,
        rank: int,
        kind: EventKind,
        cta: int | None = None,
        lane: Lane | None = None,
        gave_up: bool = False,
        **values: int,
    ) -> Launch:
        state = ActorState.GAVE_UP if gave_up else ActorState.ABORTED
        return self.set(rank, state, kind, cta, lane, **values)

    def left(self, rank: int, cta: int | None = None, lane: Lane | None = None) -> Launch:
        """Left at the abort without waiting for anything, as an actor does between two tiles."""
        return self.set(
            rank, ActorState.ABORTED, EventKind.LAUNCH, cta, lane, since=RAISED_NS + 1_000
        )

    def never(self, rank: int, cta: int | None = None) -> Launch:
        self.slots[self._index(rank, cta, None)] = np.zeros(1, FLIGHT_SLOT)
        return self

    def diagnose(self, **given: Any) -> HangReport:
        settings = {"ranks": self.ranks, "deadline_s": DEADLINE_NS / 1e9, "now_ns": NOW_NS} | given
        return diagnose(self.slots, **settings)

"""The flight recorder read as a whole: who each slot belongs to, and what it says of its actor."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from flashmoe.trace.schema import (
    LANE_NAME,
    NAME_OF,
    NO_EXPERT,
    NO_PEER,
    NO_TILE,
    WAIT_REASON,
    ActorState,
    EventKind,
    Lane,
)

# A launch's waits in the order in which an actor meets them: what one waits for is held up by
# waits of the same or an earlier kind, never of a later one.
STAGES: Final = (
    EventKind.WAIT_LOGITS,
    EventKind.WAIT_BARRIER,
    EventKind.WAIT_COUNTS,
    EventKind.WAIT_ROWS,
    EventKind.WAIT_H,
    EventKind.WAIT_RETURN,
)
_STATE_NAME: Final = {
    ActorState.WAITING: "waiting",
    ActorState.GAVE_UP: "gave up",
    ActorState.ABORTED: "left at the abort",
}
# Words of these hold a counter; those of the others hold an epoch, of which nothing can lack.
_COUNTED: Final = (EventKind.WAIT_BARRIER, EventKind.WAIT_ROWS, EventKind.WAIT_H)


def seconds(ns: float) -> str:
    """A duration in the unit that suits it."""
    if ns >= 1e9:
        return f"{ns / 1e9:.1f} s"
    return f"{ns / 1e6:.1f} ms" if ns >= 1e6 else f"{ns / 1e3:.1f} us"


@dataclass(frozen=True)
class Wait:
    """One actor's wait: what it awaits and how long it has.

    ``kind`` is an EventKind's name; ``expected`` and ``seen`` are the word awaited and as last
    read, ``lacking`` their difference where the word is a counter.  ``state``: "waiting", "gave up"
    (its deadline passed) or "left at the abort" that another raised.
    """

    rank: int
    cta: int
    sm: int
    lane: str
    kind: str
    peer: int | None
    expert: int | None
    tile: int | None
    expected: int
    seen: int
    lacking: int | None
    waited_ns: int
    state: str

    def awaited(self) -> str:
        """What it awaits, in words."""
        expert = "" if self.expert is None else f" of expert {self.expert}"
        match self.kind:
            case "wait_logits" if self.expert is None:
                return f"what token {self.tile} of its rank chooses"
            case "wait_logits":
                return f"logits of its rank's gate (expert {self.expert} is the first lacking)"
            case "wait_barrier":
                return f"{self.lacking} more arrivals at its rank's barrier"
            case "wait_counts":
                return f"the counts of rank {self.peer} (expert {self.expert} is the first lacking)"
            case "wait_rows":
                source = "" if self.peer is None else f" from rank {self.peer}"
                rows = f"{self.lacking} of the {self.expected} rows of row tile {self.tile}"
                return f"{rows}{expert}{source}"
            case "wait_h":
                return (
                    f"{self.lacking} of the {self.expected} column tiles of h of row tile "
                    f"{self.tile}{expert}"
                )
            case "wait_return":
                return f"the result rows of row tile {self.tile}{expert} from rank {self.peer}"
        return self.kind

    def sentence(self) -> str:
        """Who, how long, for what."""
        return (
            f"rank {self.rank} (SM {self.sm}, {self.lane}) waited {seconds(self.waited_ns)} "
            f"for {self.awaited()}"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Flight:
    """All slots of a launch, each with the actor it belongs to.

    Slots lie in (rank, CTA, lane) order, the same number a rank; a slot that was never written says
    nothing of itself, so its place does.  ``deadline_ns`` is what each wait was allowed.
    """

    def __init__(self, slots: np.ndarray, ranks: int, now_ns: int, deadline_ns: int) -> None:
        self.slots = slots
        self.deadline_ns = deadline_ns
        self.ranks = ranks
        self.now_ns = now_ns
        each = max(len(slots) // max(ranks, 1), 1)
        place = np.arange(len(slots))
        lanes = len(Lane)
        regular = len(slots) % max(ranks * lanes, 1) == 0
        self.rank = place // each if regular else slots["rank"].astype(np.int64)
        self.cta = place % each // lanes if regular else slots["cta"].astype(np.int64)
        self.lane = place % lanes if regular else slots["lane"].astype(np.int64)
        self.state = slots["state"]
        self.epoch = int(slots["epoch"].max(initial=0))
        # Not in this launch: its slot is empty, or still tells of an earlier one.
        self.absent = (self.state == ActorState.NEVER_STARTED) | (slots["epoch"] < self.epoch)
        since = slots["since_ns"].astype(np.int64)
        self.age_ns = np.where(self.absent, 0, np.maximum(now_ns - since, 0))
        # Who came to a wait only after the abort was raised, or finished then, was at work when it
        # was.  What such a wait found says nothing of the cause: its slot counts as at no wait.
        left = np.isin(self.state, [ActorState.ABORTED, ActorState.DONE]) & ~self.absent
        at_wait = np.isin(slots["kind"], list(WAIT_REASON))
        gave_up = (self.state == ActorState.GAVE_UP) & ~self.absent
        raised = (
            int(since[gave_up].min()) + deadline_ns if gave_up.any() else np.iinfo(np.int64).max
        )
        self.late = left & (at_wait | (self.state == ActorState.DONE)) & (since >= raised)
        # Others leave at once; one that took this long was at work too.
        grace = max(deadline_ns // 4, 50_000_000)
        self.tardy = self.late | (left & ~at_wait & (since - grace >= raised))
        self.kind = np.where(self.late, np.uint8(EventKind.LAUNCH), slots["kind"])
        held = np.isin(self.state, list(_STATE_NAME)) & np.isin(self.kind, list(WAIT_REASON))
        self.waiting = held & ~self.absent

    def waits(self) -> list[Wait]:
        """Every wait, those that gave up first, then the longest."""
        found = [self._wait(int(i)) for i in np.flatnonzero(self.waiting)]
        return sorted(found, key=lambda w: (w.state != "gave up", -w.waited_ns))

    def _wait(self, i: int) -> Wait:
        slot = self.slots[i]
        kind = EventKind(int(slot["kind"]))
        expected, seen = int(slot["expected"]), int(slot["seen"])
        gave_up = slot["state"] == ActorState.GAVE_UP
        return Wait(
            rank=int(self.rank[i]),
            cta=int(self.cta[i]),
            sm=int(slot["sm"]),
            lane=LANE_NAME[Lane(int(self.lane[i]))],
            kind=NAME_OF[kind],
            peer=_or_none(slot["peer"], NO_PEER),
            expert=_or_none(slot["expert"], NO_EXPERT),
            tile=_or_none(slot["tile"], NO_TILE),
            expected=expected,
            seen=seen,
            lacking=max(expected - seen, 0) if kind in _COUNTED else None,
            # Who gave up has waited its deadline, whatever the clocks of two processes say.
            waited_ns=max(int(self.age_ns[i]), self.deadline_ns if gave_up else 0),
            state=_STATE_NAME[ActorState(int(slot["state"]))],
        )

    def of(self, rank: int, cta: int | None = None) -> np.ndarray:
        """Indices of the slots of a rank, or of one of its CTAs."""
        mine = self.rank == rank
        return np.flatnonzero(mine if cta is None else mine & (self.cta == cta))

    def ctas(self, rank: int) -> list[int]:
        return np.unique(self.cta[self.rank == rank]).tolist()

    def doing(self, index: np.ndarray) -> str:
        """What the actors in ``index`` were at, in words, the commonest first."""
        said: dict[str, int] = {}
        for i in index.tolist():
            lane = LANE_NAME[Lane(int(self.lane[i]))]
            kind = int(self.kind[i])
            what = "at " + NAME_OF[kind] if EventKind.LAUNCH < kind < len(NAME_OF) else ""
            said[f"{lane} {what}".strip()] = said.get(f"{lane} {what}".strip(), 0) + 1
        return ", ".join(sorted(said, key=lambda k: (-said[k], k))[:4])

    def summary(self, rank: int) -> dict[str, Any]:
        """How many actors of a rank are in which state."""
        mine = self.of(rank)
        absent = self.absent[mine]
        out: dict[str, Any] = {
            "rank": rank,
            "actors": len(mine),
            "never_started": int(absent.sum()),
        }
        for state in ActorState:
            if state != ActorState.NEVER_STARTED:
                count = int(((self.state[mine] == state) & ~absent).sum())
                out[state.name.lower()] = count
        return out


def _or_none(value: Any, none: int) -> int | None:
    return None if int(value) == none else int(value)

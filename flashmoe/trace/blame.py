"""The wait-for graph: from a wait to the rank that it comes from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Final, Literal

import numpy as np

from flashmoe.trace.flight import STAGES, Flight, Wait
from flashmoe.trace.schema import NAME_OF, ActorState, EventKind, Lane

Cause = Literal[
    "none", "never-started", "dead", "stopped", "wrong-count", "lost-signal", "slow", "unknown"
]
_STAGE: Final = {NAME_OF[kind]: i for i, kind in enumerate(STAGES)}
_COMM: Final = (Lane.COMM0, Lane.COMM1)
_TILE_WORK: Final = (EventKind.GEMM1, EventKind.GEMM2, EventKind.LOAD, EventKind.GIVE_BACK)
_UNTIL_DISPATCH: Final = (
    EventKind.GATE,
    EventKind.PLAN,
    EventKind.COUNTS,
    EventKind.WAIT_LOGITS,
    EventKind.WAIT_BARRIER,
    EventKind.WAIT_COUNTS,
    EventKind.DISPATCH,
)
# Comm lanes combine when they have dispatched, math lanes when no tile is left.
_AFTER_DISPATCH: Final = (EventKind.WAIT_RETURN, EventKind.COMBINE)
_AFTER_COUNTS: Final = (EventKind.WAIT_COUNTS, EventKind.WAIT_ROWS, EventKind.WAIT_H,
                        EventKind.WAIT_RETURN, EventKind.COMBINE, EventKind.DISPATCH,
                        *_TILE_WORK)  # fmt: skip
_SLOW_HINT: Final = "it was alive: give it longer with --deadline"


@dataclass(frozen=True)
class Verdict:
    """Why, and who."""

    cause: Cause
    culprit: int | None
    reason: str
    hint: str
    candidates: tuple[int, ...] = ()


class WaitGraph:
    """Who waits on whom, and what there is to tell a lost signal from a slow rank."""

    def __init__(
        self,
        flight: Flight,
        waits: list[Wait],
        chunk_counts: np.ndarray | None,
        counts_seen: np.ndarray | None,
        tiles: np.ndarray | None,
    ) -> None:
        self.flight, self.waits = flight, waits
        self.chunk_counts, self.counts_seen, self.tiles = chunk_counts, counts_seen, tiles

    def follow(self, wait: Wait) -> tuple[Verdict, list[Wait]]:
        """Walks from a wait to the cause; the waits on the way are the chain.

        It ends: each step goes to a wait of an earlier stage (``flight.STAGES``), or stays at the
        stage on another rank, and no wait is passed twice.
        """
        chain = [wait]
        while True:
            verdict, following = self._step(chain[-1])
            if verdict is not None:
                return verdict, chain
            assert following is not None
            if following in chain:
                ring = sorted({w.rank for w in chain[chain.index(following) :]})
                reason = f"ranks {', '.join(map(str, ring))} wait for each other in a circle"
                return Verdict("unknown", None, reason, "", tuple(ring)), chain
            chain.append(following)

    def _step(self, wait: Wait) -> tuple[Verdict | None, Wait | None]:
        match wait.kind:
            case "wait_logits":
                before = self._logits_before(wait)
                return (None, before) if before is not None else (self._logits(wait), None)
            case "wait_barrier":
                held = self._held_up(wait.rank, wait.kind)
                return (None, held) if held is not None else (self._barrier(wait), None)
            case "wait_counts":
                return self._counts(wait)
            case "wait_rows":
                return self._rows(wait)
            case "wait_h":
                return self._h(wait)
            case _:
                return self._return(wait)

    def _held_up(self, rank: int, before: str) -> Wait | None:
        """The earliest-stage wait of a rank, of a stage before ``before``."""
        found = [w for w in self.waits if w.rank == rank and _STAGE[w.kind] < _STAGE[before]]
        order = {"gave up": 0, "waiting": 1}
        return min(
            found,
            key=lambda w: (_STAGE[w.kind], order.get(w.state, 2), -w.waited_ns),
            default=None,
        )

    def _at(self, index: np.ndarray, kinds: Iterable[EventKind]) -> np.ndarray:
        """Which of the slots are at one of the kinds, in this launch."""
        flight = self.flight
        return np.isin(flight.kind[index], list(kinds)) & ~flight.absent[index]

    def _routing(self, rank: int, past: Iterable[EventKind], lacked: str) -> Verdict | None:
        """CTAs of a rank that are at none of ``past``, which follows what others lack of them."""
        flight = self.flight
        late = [c for c in flight.ctas(rank) if not self._at(flight.of(rank, c), past).any()]
        if not late:
            return None
        doing = flight.doing(np.concatenate([flight.of(rank, cta) for cta in late]))
        reason = (
            f"rank {rank} was still routing: CTA {', '.join(map(str, late[:6]))} {lacked} ({doing})"
        )
        return Verdict("slow", rank, reason, _SLOW_HINT)

    def _logits_before(self, wait: Wait) -> Wait | None:
        """Of a wait for a token's choice one for logits, without which that token cannot choose."""
        if wait.expert is not None:
            return None
        found = (w for w in self.waits if (w.rank, w.kind) == (wait.rank, wait.kind))
        return next((w for w in found if w.expert is not None), None)

    def _logits(self, wait: Wait) -> Verdict:
        past = (EventKind.WAIT_LOGITS, EventKind.WAIT_BARRIER, *_AFTER_COUNTS)
        share = "its share of the logits" if wait.expert is not None else "what its tokens choose"
        verdict = self._routing(wait.rank, past, f"had not worked out {share}")
        if verdict is not None:
            return verdict
        reason = f"rank {wait.rank} lost logits: all of its CTAs say they are past their share"
        return Verdict("lost-signal", wait.rank, reason, "the gate's words are broken: report it")

    def _barrier(self, wait: Wait) -> Verdict:
        rank, past = wait.rank, (EventKind.WAIT_BARRIER, *_AFTER_COUNTS)
        if (verdict := self._routing(rank, past, "had not reached its barrier")) is not None:
            return verdict
        reason = (
            f"rank {rank} lost a barrier arrival: all of its CTAs say they arrived, and "
            f"{wait.lacking} are not counted"
        )
        return Verdict("lost-signal", rank, reason, "the barrier's counter is broken: report it")

    def _counts(self, wait: Wait) -> tuple[Verdict | None, Wait | None]:
        source = wait.peer
        if source is None:
            return Verdict("unknown", None, f"{wait.sentence()}, of no rank", ""), None
        if (held := self._held_up(source, wait.kind)) is not None:
            return None, held
        if self._at(self.flight.of(source), _AFTER_COUNTS).any():
            reason = (
                f"a signal of rank {source} was lost: it is past sending its counts, and rank "
                f"{wait.rank} has none of it for expert {wait.expert}"
            )
            return Verdict("lost-signal", source, reason, ""), None
        return self._slow(source, f"had not sent its counts to rank {wait.rank}"), None

    def _slow(self, rank: int, lacked: str) -> Verdict:
        mine = self.flight.of(rank)
        busy = mine[self.flight.state[mine] == ActorState.RUNNING]
        doing = self.flight.doing(busy if len(busy) else mine)
        reason = f"rank {rank} was too slow: it waited for nobody, and {lacked} ({doing})"
        return Verdict("slow", rank, reason, _SLOW_HINT)

    def _rows(self, wait: Wait) -> tuple[Verdict | None, Wait | None]:
        units = self._units(wait)
        if units is None:
            sources = [r for r in range(self.flight.ranks) if not self._dispatched(r, None)]
        else:
            sources = sorted({s for s, c, _ in units if not self._dispatched(s, c)})
        if wait.peer is not None:  # put-with-signal: the word awaited is this source's alone
            sources = [r for r in (wait.peer,) if not self._dispatched(r, None)]
        for source in sources:
            if (held := self._held_up(source, wait.kind)) is not None:
                return None, held
        if sources:
            # Rows of the one with the most to deliver lack, or of one of them.
            weight = {s: sum(n for t, _, n in units or [] if t == s) for s in sources}
            slowest = max(sources, key=lambda s: weight[s])
            text = f"had not dispatched its rows for expert {wait.expert} of rank {wait.rank}"
            return self._slow(slowest, text), None
        return self._lost_rows(wait), None

    def _dispatched(self, source: int, chunk: int | None) -> bool:
        """Whether the comm lanes of a rank, or of one chunk's CTA, have sent all they had to.

        They have unless one of them is seen at it, or was still at work when the deadline passed.
        """
        flight = self.flight
        everyone = flight.of(source, chunk)
        mine = everyone[np.isin(flight.lane[everyone], _COMM)]
        if self._at(mine, _UNTIL_DISPATCH).any() or flight.tardy[mine].any():
            return False
        # Between two pieces of work a slot names none: a lane of the CTA that combines tells.
        inside = (flight.state[mine] == ActorState.RUNNING) & ~flight.absent[mine]
        return not inside.any() or bool(self._at(everyone, _AFTER_DISPATCH).any())

    def _units(self, wait: Wait) -> list[tuple[int, int, int]] | None:
        """(source, chunk, rows) with rows in the row tile that a wait_rows lacks."""
        if self.chunk_counts is None or self.tiles is None or wait.tile is None:
            return None
        tiles = self.tiles
        mine = tiles[(tiles["rank"] == wait.rank) & (tiles["gemm"] == 1)]
        here = mine[mine["row_tile"] == wait.tile]
        if not len(here):
            return None
        expert = int(here["expert"][0])
        _, first = np.unique(mine["row_tile"], return_index=True)
        of_expert = mine[first][mine["expert"][first] == expert]
        begin = int(of_expert["rows"][of_expert["row_tile"] < wait.tile].sum())
        end = begin + int(here["rows"][0])
        rows = self.chunk_counts[:, :, expert].astype(np.int64)
        upto = np.cumsum(rows.ravel()).reshape(rows.shape)
        inside = np.minimum(upto, end) - np.maximum(upto - rows, begin)
        return [(int(s), int(c), int(inside[s, c])) for s, c in np.argwhere(inside > 0)]

    def _per_source(self, wait: Wait) -> dict[int, int] | None:
        units = self._units(wait)
        if units is not None:
            out: dict[int, int] = {}
            for source, _, rows in units:
                out[source] = out.get(source, 0) + rows
            return out
        if self.counts_seen is None or wait.expert is None:
            return None
        # Without the plan: all rows of the expert, which is the row tile's where it has only one.
        seen = self.counts_seen[wait.rank, :, wait.expert].astype(np.int64)
        if int(seen.sum()) != wait.expected:
            return None
        return {s: n for s, n in enumerate(seen.tolist()) if n}

    def _lost_rows(self, wait: Wait) -> Verdict:
        """All sources say they dispatched: the rows that lack tell whose signal it is."""
        if wait.peer is not None:
            reason = (
                f"a signal of rank {wait.peer} was lost: rank {wait.rank} has {wait.seen} of its "
                f"{wait.expected} rows for row tile {wait.tile} of expert {wait.expert}, and it "
                "says it sent them"
            )
            hint = "the rows were put and not announced: report it"
            return Verdict("lost-signal", wait.peer, reason, hint, (wait.peer,))
        sources = self._fitting(wait)
        # Another row tile that lacks rows too is further evidence, where it leaves any.
        for other in self.waits:
            if other.kind == "wait_rows" and other != wait and sources:
                both = sources & self._fitting(other)
                sources = both or sources
        where = f"row tile {wait.tile} of expert {wait.expert} on rank {wait.rank}"
        lost = f"lacks {wait.lacking} of {wait.expected} rows, and every source says it sent them"
        hint = "the rows were moved and not announced: report it"
        names = sorted({s for group in sources for s in group})
        if len(sources) == 1 and len(names) == 1:
            culprit = names[0]
            share = (self._per_source(wait) or {}).get(culprit)
            given = f"has exactly {share} there" if share == wait.lacking else "is the one it fits"
            reason = f"a signal of rank {culprit} was lost: {where} {lost}; rank {culprit} {given}"
            return Verdict("lost-signal", culprit, reason, hint, (culprit,))
        if names:
            fits = ", or ".join(
                " and ".join(map(str, sorted(g))) for g in sorted(sources, key=sorted)
            )
            reason = f"a signal was lost: {where} {lost}; the number fits rank {fits}"
            return Verdict("lost-signal", None, reason, hint, tuple(names))
        reason = f"a signal was lost: {where} {lost}"
        everyone = tuple(sorted(self._per_source(wait) or range(self.flight.ranks)))
        return Verdict("lost-signal", None, reason, hint, everyone)

    def _fitting(self, wait: Wait) -> set[frozenset[int]]:
        """The smallest sets of sources whose rows in the row tile are as many as lack."""
        own = self._per_source(wait) or {}
        for size in (1, 2, 3):
            found = {
                frozenset(group)
                for group in combinations(sorted(own), size)
                if sum(own[s] for s in group) == wait.lacking
            }
            if found:
                return found
        # Part of one source's rows: of some of its chunks.
        units = self._units(wait) or []
        return {
            frozenset([s]) for s in own if wait.lacking in _sums([n for t, _, n in units if t == s])
        }

    def _h(self, wait: Wait) -> tuple[Verdict | None, Wait | None]:
        rank = wait.rank
        if (held := self._held_up(rank, wait.kind)) is not None:
            return None, held
        mine = self.flight.of(rank)
        if self._at(mine, (EventKind.GEMM1, EventKind.LOAD)).any():
            return self._slow(rank, f"had not computed h of row tile {wait.tile}"), None
        reason = (
            f"rank {rank} lost a signal of its own: {wait.lacking} column tiles of h of row tile "
            f"{wait.tile} are not counted, and none of its actors computes one"
        )
        return Verdict("lost-signal", rank, reason, "the h counter is broken: report it"), None

    def _return(self, wait: Wait) -> tuple[Verdict | None, Wait | None]:
        owner = wait.peer
        if owner is None:
            return Verdict("unknown", None, f"{wait.sentence()}, of no rank", ""), None
        if (held := self._held_up(owner, wait.kind)) is not None:
            return None, held
        mine = self.flight.of(owner)
        if self._at(mine, _TILE_WORK).any() or self.flight.tardy[mine].any():
            return self._slow(owner, f"had not computed row tile {wait.tile}"), None
        reason = (
            f"a signal of rank {owner} was lost: none of its actors computes or waits for rows, "
            f"and rank {wait.rank} has no result of row tile {wait.tile} (expert {wait.expert})"
        )
        return Verdict("lost-signal", owner, reason, ""), None


def _sums(numbers: list[int]) -> set[int]:
    """All sums of some of the numbers; of at most 16, since they double with each."""
    out = {0}
    for n in numbers[:16]:
        out |= {n + s for s in out}
    return out - {0}

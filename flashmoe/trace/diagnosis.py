"""From the flight recorder to a sentence: who waits, on whom, for what, and who is the culprit.

Pure: it takes what an engine left behind and decides nothing by the clock but the age of a slot.
The causes are tried from the plainest to the one that needs the most evidence:

1. a rank, or a CTA of one, that never entered the launch;
2. a rank that died, or whose slots stopped changing while the others left;
3. a rank whose counts another rank holds differently from the rest;
4. else the wait-for graph is followed from the wait that gave up first.  Every wait names the rank
   it needs; that rank is held up by an earlier wait of its own, or is still working (slow), or has
   done its part, so that its signal was lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashmoe.trace.blame import Cause, Verdict, WaitGraph
from flashmoe.trace.flight import Flight, Wait, seconds
from flashmoe.trace.schema import ActorState

# In `counts_seen`: this rank had not received that source's counts.
NOT_SEEN = 0xFFFFFFFF


@dataclass(frozen=True)
class HangReport:
    """What a hang was.

    ``hang`` is false where no wait has passed its deadline: then ``culprit`` is None and ``reason``
    says what is awaited longest.  ``candidates`` are the ranks it may be where the evidence fits
    several.  ``chain`` leads from the wait that was noticed to the culprit.
    """

    hang: bool
    cause: Cause
    culprit: int | None
    candidates: tuple[int, ...]
    reason: str
    hint: str
    waits: list[Wait]
    chain: list[Wait]
    ranks: list[dict[str, Any]]
    deadline_s: float

    @property
    def text(self) -> list[str]:
        """The report in words, a line each: the reason, the chain, then every rank."""
        return _lines(self)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json`` and run.json: everything, in plain types."""
        return {
            "hang": self.hang,
            "cause": self.cause,
            "culprit": self.culprit,
            "candidates": list(self.candidates),
            "reason": self.reason,
            "hint": self.hint,
            "deadline_s": self.deadline_s,
            "chain": [wait.as_dict() for wait in self.chain],
            "waits": [wait.as_dict() for wait in self.waits],
            "ranks": self.ranks,
            "text": self.text,
        }


def diagnose(
    slots: np.ndarray,
    *,
    ranks: int,
    deadline_s: float,
    now_ns: int,
    counts_seen: np.ndarray | None = None,
    chunk_counts: np.ndarray | None = None,
    tiles: np.ndarray | None = None,
    rank_status: Mapping[int, str] | None = None,
) -> HangReport:
    """Says why a launch did not end.

    ``slots``: ``schema.FLIGHT_SLOT`` [n] in (rank, CTA, lane) order.  ``deadline_s``: what a wait
    of this launch was allowed.  ``now_ns``: when the slots were read, by the engine's clock.
    ``counts_seen``: uint32 [W, W, E], entry [p][s][e] the rows that rank p believes source s sends
    to expert e, ``NOT_SEEN`` where it had none yet.  ``chunk_counts``: uint32 [W, chunks, E], what
    each source routed.  ``tiles``: the plan, with the columns of plan.parquet.  ``rank_status``:
    what the host knows of ranks that are gone ("killed by SIGKILL"), by rank.
    """
    deadline_ns = int(deadline_s * 1e9)
    flight = Flight(slots, ranks, now_ns, deadline_ns)
    waits = flight.waits()
    late = [w for w in waits if w.state == "gave up" or w.waited_ns > deadline_ns]
    found: Found
    if rank_status:
        found = _dead(rank_status, waits)
    elif late:
        found = (
            _never_started(flight, waits)
            or _stopped(flight, waits)
            or _wrong_count(flight, waits, counts_seen, chunk_counts)
            or WaitGraph(flight, waits, chunk_counts, counts_seen, tiles).follow(late[0])
        )
    else:
        found = _no_hang(waits, deadline_s), waits[:1]
    verdict, chain = found
    return HangReport(
        hang=verdict.cause != "none",
        cause=verdict.cause,
        culprit=verdict.culprit,
        candidates=verdict.candidates,
        reason=verdict.reason,
        hint=verdict.hint,
        waits=waits,
        chain=chain,
        ranks=[flight.summary(rank) for rank in range(ranks)],
        deadline_s=deadline_s,
    )


Found = tuple[Verdict, list[Wait]]


def _no_hang(waits: list[Wait], deadline_s: float) -> Verdict:
    longest = max(waits, key=lambda w: w.waited_ns, default=None)
    said = f"; the longest: {longest.sentence()}" if longest else ""
    return Verdict("none", None, f"no wait has passed its deadline of {deadline_s:g} s{said}", "")


def _on(waits: list[Wait], rank: int) -> list[Wait]:
    """The waits that name a rank, one of each rank that waits."""
    seen: dict[int, Wait] = {}
    for wait in waits:
        if wait.peer == rank and wait.rank != rank:
            seen.setdefault(wait.rank, wait)
    return list(seen.values())


def _never_started(flight: Flight, waits: list[Wait]) -> Found | None:
    absent = [r for r in range(flight.ranks) if flight.absent[flight.of(r)].all()]
    if absent and len(absent) < flight.ranks:
        awaited = [r for r in absent if _on(waits, r)]
        culprit = (awaited or absent)[0]
        chain = _on(waits, culprit)
        others = sorted(w.rank for w in chain)
        reason = (
            f"rank {culprit} never started: none of its {len(flight.of(culprit))} actors entered"
        )
        reason += f" launch {flight.epoch}"
        if others:
            reason += f", and {_ranks(others)} {_verb(others, 'waits')} for it"
        if len(absent) > 1:
            reason += f"; nor did {_ranks([r for r in absent if r != culprit])}"
        hint = "look at that rank's own output: it may have failed to load or to launch"
        return Verdict("never-started", culprit, reason, hint, tuple(absent)), chain[:1]
    for rank in range(flight.ranks):
        ctas = [c for c in flight.ctas(rank) if flight.absent[flight.of(rank, c)].all()]
        if ctas and len(ctas) < len(flight.ctas(rank)):
            reason = (
                f"{len(ctas)} of the {len(flight.ctas(rank))} CTAs of rank {rank} never started "
                f"(CTA {_some(ctas)}), and its barrier counts them all"
            )
            hint = "something else holds SMs of that GPU, or fewer fit than were launched"
            routing = ("wait_logits", "wait_barrier")
            chain = [w for w in waits if w.rank == rank and w.kind in routing][:1]
            return Verdict("never-started", rank, reason, hint), chain
    return None


def _dead(gone: Mapping[int, str], waits: list[Wait]) -> Found:
    awaited = [r for r in gone if _on(waits, r)]
    culprit = (awaited or sorted(gone))[0]
    chain = _on(waits, culprit)
    reason = f"rank {culprit} is gone: {gone[culprit]}"
    if chain:
        reason += f"; {_ranks(sorted(w.rank for w in chain))} still awaited it"
    return Verdict("dead", culprit, reason, "", tuple(sorted(gone))), chain[:1]


def _stopped(flight: Flight, waits: list[Wait]) -> Found | None:
    """Actors still in the launch, unchanged, long after others left it for their deadline.

    A wait ends by its deadline at the latest, and a working actor sees the abort at its next wait;
    one that did neither for longer than that is not running.
    """
    left = np.isin(flight.state, [ActorState.GAVE_UP, ActorState.ABORTED]) & ~flight.absent
    inside = np.isin(flight.state, [ActorState.RUNNING, ActorState.WAITING]) & ~flight.absent
    grace = max(flight.deadline_ns // 4, 50_000_000)
    stale = inside & (flight.age_ns > flight.deadline_ns + grace)
    best: tuple[int, int] | None = None
    for rank in range(flight.ranks):
        mine = flight.of(rank)
        # A rank of which some actor left does run; its others are held inside a tile or a barrier.
        if stale[mine].any() and not left[mine].any() and left.any():
            age = int(flight.age_ns[mine][stale[mine]].min())
            best = max(best or (age, rank), (age, rank))
    if best is None:
        return None
    age, culprit = best
    mine = flight.of(culprit)
    reason = (
        f"rank {culprit} stopped: its actors have not changed state for {seconds(age)} "
        f"({flight.doing(mine[stale[mine]])}) and did not leave when the others did"
    )
    hint = "its process was stopped or killed, or its GPU no longer runs the kernel"
    return Verdict("stopped", culprit, reason, hint), _on(waits, culprit)[:1]


def _wrong_count(
    flight: Flight,
    waits: list[Wait],
    counts_seen: np.ndarray | None,
    chunk_counts: np.ndarray | None,
) -> Found | None:
    """A source that told one rank another number than it told the rest, or than it routed."""
    if counts_seen is None:
        return None
    lacking = {w.rank for w in waits if w.kind == "wait_counts"}
    seen = counts_seen.astype(np.int64)
    for source in range(flight.ranks):
        if chunk_counts is not None:
            truth, said = chunk_counts[source].astype(np.int64).sum(axis=0), "it routed"
        else:
            truth, said = seen[source, source], "it holds itself"
        for rank in range(flight.ranks):
            told = seen[rank, source]
            known = told != NOT_SEEN
            # A row of zeros where there are rows is one that had not arrived either.
            if rank in lacking or not known.any() or (truth.any() and not told.any()):
                continue
            known &= truth != NOT_SEEN
            wrong = np.flatnonzero(known & (told != truth))
            if not len(wrong):
                continue
            e = int(wrong[0])
            reason = (
                f"rank {source} told rank {rank} a wrong count: {told[e]} rows for expert {e}, "
                f"where {said} {truth[e]}"
            )
            if len(wrong) > 1:
                reason += f" (and {len(wrong) - 1} more experts)"
            chain = [w for w in waits if w.rank == rank] or waits
            verdict = Verdict(
                "wrong-count", source, reason, "the counts exchange is broken: report it"
            )
            return verdict, sorted(chain, key=lambda w: w.expert != e)[:1]
    return None


def _lines(report: HangReport) -> list[str]:
    lines = [report.reason]
    lines += [f"  {wait.sentence()}" for wait in report.chain]
    if not report.hang:
        return lines
    for entry in report.ranks:
        states = [
            f"{n} {name.replace('_', ' ')}"
            for name, n in entry.items()
            if n and name not in ("rank", "actors")
        ]
        lines.append(f"rank {entry['rank']}: {entry['actors']} actors, {', '.join(states)}")
        groups: dict[tuple[str, str], list[Wait]] = {}
        for wait in report.waits:
            if wait.rank == entry["rank"]:
                groups.setdefault((wait.kind, wait.awaited()), []).append(wait)
        for (_, awaited), same in list(groups.items())[:4]:
            longest = max(wait.waited_ns for wait in same)
            lines.append(f"  {len(same)} waited {seconds(longest)} for {awaited}")
        if len(groups) > 4:
            lines.append(f"  and for {len(groups) - 4} other things")
    if report.hint:
        lines.append(f"hint: {report.hint}")
    return lines


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {_some(list(ranks))}"


def _verb(ranks: Sequence[int], singular: str) -> str:
    return singular if len(ranks) == 1 else singular.removesuffix("s")


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    return shown + (f" and {len(numbers) - 6} more" if len(numbers) > 6 else "")

"""From the parts that PEs left to one result and one run directory.

Pure but for writing: whoever ran the PEs says what became of each process, and hands over the parts
that came whole.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmoe import saving, verdict
from flashmoe.config import MoEConfig
from flashmoe.errors import EXIT_HANG, EXIT_STOPPED, EXIT_WRONG, FlashmoeError
from flashmoe.part import Part
from flashmoe.pe import stopped_text
from flashmoe.session import Progress, Request, Result
from flashmoe.trace import schema
from flashmoe.trace.align import Alignment, Exchange, align_rings
from flashmoe.trace.rings import Rings
from flashmoe.trace.tighten import Tightened, pairs, tighten
from flashmoe.world.base import Routing, Status
from flashmoe.world.tiles import tile_plan

if TYPE_CHECKING:
    from flashmoe.trace.diagnosis import HangReport


@dataclass
class Outcome:
    """What became of the PEs.

    ``parts``: by rank, those that came whole.  ``gone``: ranks whose process ended as it should not
    have ("killed by SIGKILL"), the one that went first at the front.  ``flight``: all ranks' slots
    in (rank, CTA, lane) order, where the launcher could read them.  ``stopped``: Ctrl-C.
    ``halted``: ranks that ended as stopped though they may have left no part, in the order of their
    ends as far as that is known.
    """

    parts: dict[int, Part]
    gone: dict[int, str] = field(default_factory=dict)
    flight: np.ndarray | None = None
    stopped: bool = False
    pids: dict[int, int] = field(default_factory=dict)
    halted: list[int] = field(default_factory=list)
    launcher: str = "flashmoe"
    nodes: int = 1
    transport: str = "host"
    why_transport: str = ""


class Merged:
    """All ranks' parts as one run."""

    def __init__(self, request: Request, outcome: Outcome, why_world: str) -> None:
        self.request, self.outcome, self.why_world = request, outcome, why_world
        self.parts = outcome.parts
        self.reports = {rank: part.report for rank, part in outcome.parts.items()}
        known = [r for r in self.reports.values() if "inputs" in r]
        self.inputs: dict[str, Any] = known[0]["inputs"] if known else {}
        built = [r for r in self.reports.values() if "engine" in r]
        self.engine: dict[str, Any] | None = built[0]["engine"] if built else None
        self.routings = self._routings()
        self.clocks = {rank: _alignment(r) for rank, r in self.reports.items()}
        self.tightened = self._tighten()
        if self.tightened is not None:
            self.clocks = dict(enumerate(self.tightened.clocks))

    @property
    def config(self) -> MoEConfig:
        if self.inputs:
            return MoEConfig.from_dict(self.inputs["config"])
        if self.request.config is None:
            raise FlashmoeError("no rank came so far as to read its layer", "see its lines above")
        return self.request.config

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(self.inputs["tokens"]) if self.inputs else self.request.tokens

    def launches(self) -> int:
        """Launches that all surviving ranks have measured."""
        return min((len(p.arrays.get("counts", ())) for p in self.parts.values()), default=0)

    def _tighten(self) -> Tightened | None:
        """The clocks as the order of events tightens them; None where a rank or a clock lacks."""
        ranks = range(self.request.ranks)
        known = [self.clocks.get(rank) for rank in ranks]
        clocks = [how for how in known if how is not None and how.drift is not None]
        ended = all(report["status"] == Status.OK for report in self.reports.values())
        if len(clocks) < max(len(ranks), 2) or not ended or not self.routings:
            return None
        rings = [self._own_rings(rank) for rank in ranks]
        spans = [span for own in rings if (span := _span(own)) is not None]
        if len(spans) < len(ranks):
            return None
        step_ns = max(r["engine"]["clock"]["step_ns"] for r in self.reports.values())
        found = pairs(rings, [routing.tiles for routing in self.routings])
        return tighten(clocks, found, spans, step_ns)

    def _routings(self) -> list[Routing]:
        """Counts and tiles of each launch of which all ranks have left their counts."""
        ranks = self.request.ranks
        if len(self.parts) < ranks or self.engine is None:
            return []
        found = []
        plans: dict[bytes, np.ndarray] = {}
        for i in range(self.launches()):
            counts = np.stack([self.parts[r].arrays["counts"][i] for r in range(ranks)])
            key = counts.tobytes()
            if key not in plans:
                plans[key] = self.plan(counts)
            found.append(Routing(counts, plans[key]))
        return found

    def plan(self, chunk_counts: np.ndarray) -> np.ndarray:
        """The tiles of all ranks for uint32 [W, chunks, E]; see ``Routing.tiles``."""
        assert self.engine is not None
        return tile_plan(self.engine["shape"], chunk_counts, self.engine["family"])

    def rings(self) -> Rings:
        """All ranks' rings on rank 0's clock, to be asked for once: records are moved in place."""
        per_rank = max(
            (len(p.arrays.get("ring_headers", ())) for p in self.parts.values()), default=0
        )
        if per_rank == 0 and self.outcome.flight is not None:  # none could be read any more
            per_rank = len(self.outcome.flight) // self.request.ranks
        headers, stored = [], []
        for rank in range(self.request.ranks):
            own = self._own_rings(rank, per_rank)
            clock = self.clocks.get(rank)
            if clock is not None:
                align_rings(own.headers, own.stored, clock)
            headers.append(own.headers)
            stored += own.stored
        return Rings(np.concatenate(headers), stored)

    def _own_rings(self, rank: int, per_rank: int = 0) -> Rings:
        """A rank's rings on its own clock; of one that left none ``per_rank`` that never began."""
        part = self.parts.get(rank)
        if part is not None and "ring_headers" in part.arrays:
            headers = part.arrays["ring_headers"]
            return Rings(headers, [part.arrays[f"ring{i}"] for i in range(len(headers))])
        lost = np.zeros(per_rank, schema.RING_HEADER)
        lost["rank"] = rank
        place = np.arange(per_rank)
        lost["cta"], lost["lane"] = place // schema.N_LANES, place % schema.N_LANES
        return Rings(lost, [np.zeros(0, schema.RECORD)] * per_rank)

    def flight(self) -> np.ndarray | None:
        """All ranks' slots on rank 0's clock, as the launcher read them, else from the parts."""
        slots = self.outcome.flight
        if slots is None:
            sizes = [len(p.arrays["flight"]) for p in self.parts.values() if "flight" in p.arrays]
            if not sizes:
                return None
            empty = np.zeros(max(sizes), schema.FLIGHT_SLOT)
            own = [self.parts[r].arrays.get("flight", empty) if r in self.parts else empty
                   for r in range(self.request.ranks)]  # fmt: skip
            slots = np.concatenate(own)
        slots = slots.copy()
        each = len(slots) // self.request.ranks
        for rank, clock in self.clocks.items():
            if clock is not None and each:
                mine = slots[rank * each : (rank + 1) * each]
                mine["since_ns"] = clock.to_reference(mine["since_ns"])
        return slots

    def _all_ranks(self, name: str, missing: int) -> np.ndarray | None:
        """An array that each part has of its own rank, [W, ...]; ``missing`` where it has none."""
        own = {r: p.arrays[name][0] for r, p in self.parts.items() if name in p.arrays}
        if not own:
            return None
        one = next(iter(own.values()))
        empty = np.full_like(one, missing)
        return np.stack([own.get(r, empty) for r in range(self.request.ranks)])

    def begun(self) -> int:
        """Launches that some rank has entered, as far as it left a trace of them."""
        last = [
            int(records["iter"].max()) + 1
            for part in self.parts.values()
            for name, records in part.arrays.items()
            if name.startswith("ring") and name != "ring_headers" and len(records)
        ]
        return max([*last, *(len(r["launch_ms"]) for r in self.reports.values())], default=0)

    def diagnose(self, slots: np.ndarray, gone: Mapping[int, str]) -> HangReport:
        """Why the launch did not end."""
        from flashmoe.trace.diagnosis import NOT_SEEN, diagnose

        engine = self.engine or {}
        first = int(slots["epoch"].max(initial=0)) <= 1
        deadline_s = engine.get("first_deadline_s" if first else "deadline_s", 0.0)
        counts = self._all_ranks("chunk_counts", 0)
        # Counts of a launch that did not get so far make no plan.
        whole = counts is not None and len(self.parts) == self.request.ranks
        now_ns = time.monotonic_ns() if engine.get("world") == "host" else 0
        return diagnose(
            slots,
            ranks=self.request.ranks,
            deadline_s=deadline_s,
            now_ns=now_ns or int(slots["since_ns"].max(initial=0)),
            counts_seen=self._all_ranks("counts_seen", NOT_SEEN),
            chunk_counts=counts if whole else None,
            tiles=self.plan(counts) if whole and counts is not None else None,
            rank_status=gone or None,
        )

    def result(self) -> Result:
        """The run as it ended, not judged yet."""
        config, ranks = self.config, self.request.ranks
        rows, traffic = verdict.traffic_of(self.routings[-1:], config, ranks)
        times = [r["launch_ms"] for r in self.reports.values()]
        count = min((len(t) for t in times), default=0)
        engine = self.engine or {}
        return Result(
            name=self.inputs.get("name", self.request.name),
            config=config,
            world=engine.get("world", "host"),
            why_world=self.why_world,
            tokens=self.tokens,
            sms_per_rank=engine.get("sms_per_rank", 0),
            # A launch lasts until its last rank has left it.
            launch_ms=[max(t[i] for t in times) for i in range(count)],
            status=Status.OK,
            traffic=traffic,
            rows=rows,
            shared_expert=bool(self.inputs.get("shared_expert")),
            remarks=list(self.inputs.get("remarks", [])),
            device=next((r["device"] for r in self.reports.values() if "device" in r), None),
            clock=self.clock() if self.request.traced else None,
            processes=self.describe(),
            tiling=engine.get("tiling"),
            topology=saving.topology(engine.get("world", "host"), ranks, self._ranks_per_gpu()),
            nvlink=self.nvlink(),
        )

    def _ranks_per_gpu(self) -> int:
        """As asked for, or as other launchers may have put several ranks on one GPU."""
        gpus = [
            r["device"]["uuid"] for r in self.reports.values() if r.get("device", {}).get("uuid")
        ]
        return max([self.request.ranks_per_gpu, *(gpus.count(gpu) for gpu in gpus)])

    def nvlink(self) -> dict[str, Any] | None:
        """``nvlink`` of run.json; None where not all ranks came to its end, or one GPU is all."""
        found = [(rank, self.reports[rank]["nvlink"]) for rank in sorted(self.reports)]
        if len(found) < self.request.ranks or any(said is None for _, said in found):
            return None
        return {
            "launches": found[0][1]["launches"],  # alike on all
            "ranks": [
                {"rank": rank} | {name: said[name] for name in said if name != "launches"}
                for rank, said in found
            ],
        }

    def clock(self) -> dict[str, Any] | None:
        """``clock`` of run.json: rank 0's clock, and how the others' were put on it."""
        built = [r for r in sorted(self.reports) if "engine" in self.reports[r]]
        if not built:
            return None
        clock = dict(self.reports[built[0]]["engine"]["clock"] or {})
        clock["ranks"] = [
            None if (how := self.clocks.get(rank)) is None else how.as_dict()
            for rank in range(self.request.ranks)
        ]
        closer = self.tightened
        clock["tightening"] = None if closer is None else {
            "pairs": closer.pairs, "contradiction_ns": closer.contradiction_ns,
        }  # fmt: skip
        return clock

    def describe(self) -> dict[str, Any]:
        """``world.processes`` of run.json."""
        outcome = self.outcome
        pes = []
        for rank in range(self.request.ranks):
            report = self.reports.get(rank)
            said = "left no report" if report is None else report["message"]
            pes.append(
                {
                    "rank": rank,
                    "pid": report["pid"] if report else outcome.pids.get(rank),
                    "message": outcome.gone.get(rank, said),
                    "gpu": ((report or {}).get("device") or {}).get("uuid"),
                }
            )
        return {
            "launcher": outcome.launcher,
            "nodes": outcome.nodes,
            "transport": outcome.transport,
            "why_transport": outcome.why_transport,
            "pointers": not self.request.no_pointers,
            "ranks": pes,
        }


def _span(own: Rings) -> tuple[int, int] | None:
    """First and last time of a rank's events, by its own clock; None where there are none."""
    begins = [int(records["t0_ns"].min()) for records in own.stored if len(records)]
    ends = own.headers["end_ns"][own.began]
    return (min(begins), int(ends.max())) if begins and ends.any() else None


def _alignment(report: dict[str, Any]) -> Alignment | None:
    start, end = report["clock"]["start"], report["clock"]["end"]
    if start is None:
        return None
    return Alignment.of(Exchange(**start), None if end is None else Exchange(**end))


def conclude(request: Request, outcome: Outcome, why_world: str, progress: Progress) -> Result:
    """The result of a run of PEs, judged and saved.

    Raises FlashmoeError where a rank failed in a way that leaves no result: bad ids, no memory.
    A run that was stopped is saved with what it had, and KeyboardInterrupt raised; where a rank of
    it was stopped, and none failed, FlashmoeError with the same exit code.
    """
    merged = Merged(request, outcome, why_world)
    reports = merged.reports
    hung = [r for r in reports.values() if r["status"] == Status.HANG]
    failed = {r: s for r, s in reports.items() if s["exit_code"] not in (0, EXIT_STOPPED)}
    halted = None if outcome.gone or hung or failed else _first_halted(merged)
    if outcome.stopped or halted is not None:
        message = "interrupted" if outcome.stopped or halted is None else stopped_text(halted)
        if merged.inputs:
            result = merged.result()
            result.exit_code, result.message = EXIT_STOPPED, message
            result.status = Status.HOST_ABORT
            with contextlib.suppress(FlashmoeError):
                _save(merged, result, progress, only_with_launches=True)
        if outcome.stopped:
            raise KeyboardInterrupt
        raise FlashmoeError(message, "a signal ended its process: run it again", EXIT_STOPPED)
    result = merged.result()
    slots = merged.flight() if outcome.gone or hung else None
    if outcome.gone or hung:
        progress("diagnosing the hang", 0, 0)
        result.status = Status.HANG if hung else Status.HOST_ABORT
        if slots is not None and len(slots):
            result.flight = slots
            result.hang = merged.diagnose(slots, outcome.gone)
        if outcome.gone:
            rank, how = next(iter(outcome.gone.items()))
            result.exit_code, result.message = EXIT_WRONG, f"rank {rank} is gone: {how}"
            if result.hang is None:
                raise FlashmoeError(result.message, "see its own lines, if it printed any")
        else:
            result.exit_code, result.message = EXIT_HANG, "a wait passed its deadline"
    elif failed:
        rank, report = min(failed.items(), key=lambda item: item[0])
        raise FlashmoeError(f"rank {rank}: {report['message']}", "see its lines above",
                            report["exit_code"])  # fmt: skip
    else:
        _judge(merged, result, progress)
    with result.keeping():
        _save(merged, result, progress)
    return result


def _first_halted(merged: Merged) -> int | None:
    """The rank whose stop ended the run, as far as the ranks tell; None where none was stopped.

    Those behind it ended for its sake: they say so, or, having left no part, come after it.
    """
    codes = {rank: report["exit_code"] for rank, report in merged.reports.items()}
    ended = {rank: at for at, rank in enumerate(merged.outcome.halted)}
    halted = ended.keys() | {rank for rank, code in codes.items() if code == EXIT_STOPPED}

    def order(rank: int) -> tuple[int, int, int]:
        report = merged.reports.get(rank)
        told = 1 if report is None else 0 if report["interrupted"] else 2
        return told, ended.get(rank, len(ended)), rank

    return min(halted, key=order, default=None)


def _judge(merged: Merged, result: Result, progress: Progress) -> None:
    """Raises FlashmoeError where a rank lacks that all others' results are nothing without."""
    request = merged.request
    for rank in range(request.ranks):
        report = merged.reports.get(rank)
        if report is None or (request.check and not report["check"]):
            lacks = "no part of the run" if report is None else "no verdict on its result"
            raise FlashmoeError(f"rank {rank} left {lacks}", "see its lines above; run it again")
    if request.check:
        result.check = verdict.combine([merged.reports[r]["check"] for r in range(request.ranks)])
        if not result.check["ok"]:
            result.exit_code, result.message = EXIT_WRONG, "wrong result"
    else:
        result.message = "ok, not checked"
    if request.save_output is not None:
        progress("writing the output", 0, 0)
        with result.keeping():
            result.saved_output = _save_output(merged, request.save_output)


def _save_output(merged: Merged, path: Path) -> Path:
    import torch

    from flashmoe.tokens import save_outputs
    from flashmoe.weights import torch_dtype

    whole = {
        name: torch.from_numpy(
            np.concatenate([merged.parts[r].arrays[name] for r in sorted(merged.parts)])
        )
        for name in ("y", "ids", "weights")
    }
    y = whole["y"].view(torch_dtype(merged.config))
    save_outputs(path, y, whole["ids"], whole["weights"], force=merged.request.force)
    return path


def _save(
    merged: Merged, result: Result, progress: Progress, only_with_launches: bool = False
) -> None:
    from flashmoe.trace.rundir import RunWriter

    request = merged.request
    out = request.out or (request.hang_out if result.hang is not None else None)
    if out is None or (only_with_launches and not merged.launches()):
        return
    progress("writing the run", 0, 0)
    with RunWriter(out, force=request.force) as writer:
        writer.meta |= saving.metadata_of(
            request,
            result,
            deadline_s=(merged.engine or {}).get("deadline_s"),
            launches=len(result.launch_ms) if result.status is Status.OK else merged.begun(),
        )
        if request.traced:
            writer.add_rings(merged.rings())
        for i, routing in enumerate(merged.routings):
            writer.add_routing(i, routing)
        if result.flight is not None:
            writer.add_flight(result.flight)
    result.path = out

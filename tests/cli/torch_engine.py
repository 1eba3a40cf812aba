"""An engine of plain torch, for tests of what surrounds an engine; its trace is one span an actor.

It computes in the layer's dtype like a real one, so that the check has something to judge, and can
be told to spoil its work: ``wrong`` result, ``hang``, ``overflow``.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from flashmoe.config import MoEConfig, MoEWeights
from flashmoe.inputs import Inputs
from flashmoe.reference import moe, route
from flashmoe.session import Request
from flashmoe.trace import schema
from flashmoe.verdict import experts_of_rank
from flashmoe.world.base import (
    DEADLINE_S,
    ClockInfo,
    EngineOptions,
    Launch,
    RankOutput,
    RingDump,
    Routing,
    Status,
    WorldKind,
)

_SMS = 2
_TILES = np.dtype(
    [
        *((name, "<u4") for name in ("rank", "tile", "gemm", "expert", "row_tile")),
        *((name, "<u4") for name in ("row_tile_global", "col_tile", "rows", "height")),
        *((name, "<u4") for name in ("cols", "depth")),
        ("family", "U16"),
    ]
)
_STEP_NS = 1000


class TorchEngine:
    """See the module's text; ``spoil`` may also be "nan" or "interrupt"."""

    spoil: str | None = None
    world: WorldKind = "host"
    sms_per_rank = _SMS
    ring_capacity = 16
    tiling = None

    def __init__(
        self, config: MoEConfig, weights: MoEWeights, tokens: list[int], options: EngineOptions
    ) -> None:
        self.config, self.weights, self.options = config, weights, options
        self.tokens = tuple(tokens)
        self.launches = 0
        self.began: list[int] = []
        self.closed = False

    @classmethod
    def of(cls, request: Request, inputs: Inputs) -> TorchEngine:
        options = EngineOptions(
            ranks=request.ranks,
            traced=request.traced,
            deadline_s=request.deadline_s or DEADLINE_S,
        )
        return cls(inputs.config, inputs.weights, list(inputs.tokens), options)

    def load(
        self, tokens: list[torch.Tensor], ids: Any = None, routing_weights: Any = None
    ) -> None:
        self.x = tokens

    def launch(self) -> Launch:
        self.launches += 1
        self.began.append(time.monotonic_ns())
        iteration = len(self.began) - 1
        if self.spoil == "interrupt":
            raise KeyboardInterrupt
        if self.spoil == "hang":
            return Launch(Status.HANG, 1.0, iteration)
        if self.spoil == "overflow":
            return Launch(Status.OVERFLOW, 1.0, iteration, rows_needed=777)
        self.routed = [route(x, self.weights, self.config) for x in self.x]
        return Launch(Status.OK, 0.5 + iteration, iteration)

    def outputs(self) -> list[RankOutput]:
        found = []
        for x, routed in zip(self.x, self.routed, strict=True):
            y = moe(x, self.weights, self.config, routed.ids, routed.weights).to(x.dtype)
            if self.spoil == "wrong" and len(y):
                y = y.roll(1, dims=0)
            if self.spoil == "nan" and len(y):
                y[0, 0] = torch.nan
            found.append(RankOutput(y, routed.ids, routed.weights))
        return found

    def routing(self) -> Routing:
        ranks, experts = self.options.ranks, self.config.experts
        counts = np.zeros((ranks, _SMS, experts), np.uint32)
        if self.spoil != "hang":
            for source, routed in enumerate(self.routed):
                for chunk, ids in enumerate(routed.ids.tensor_split(_SMS)):
                    counts[source, chunk] = np.bincount(ids.flatten().numpy(), minlength=experts)
        return Routing(counts, self._tiles(counts.sum(axis=(0, 1))))

    def _tiles(self, rows: np.ndarray) -> np.ndarray:
        found = []
        for rank, (a, b) in enumerate(experts_of_rank(self.config.experts, self.options.ranks)):
            of_rank = [e for e in range(a, b) if rows[e]]
            for gemm in (1, 2):
                for n, e in enumerate(of_rank):
                    tile = n + (gemm - 1) * len(of_rank)
                    found.append((rank, tile, gemm, e, n, e, 0, rows[e], rows[e], 8, 8, "none"))
        return np.array(found, _TILES)

    def rings(self) -> RingDump:
        ranks, lanes = self.options.ranks, schema.N_LANES
        headers = np.zeros(ranks * _SMS * lanes, schema.RING_HEADER)
        records = np.zeros((len(headers), self.ring_capacity), schema.RECORD)
        if not self.options.traced:
            return RingDump(headers[:0], records[:0])
        for i, header in enumerate(headers):
            header["rank"], header["cta"] = i // lanes // _SMS, i // lanes % _SMS
            header["sm"], header["lane"] = i // lanes, i % lanes
            header["magic"], header["capacity"] = schema.RING_MAGIC, self.ring_capacity
            self._fill(header, records[i])
        return RingDump(headers, records)

    def _fill(self, header: Any, records: np.ndarray) -> None:
        n = 0
        for iteration, began in enumerate(self.began):
            work = schema.EventKind.GEMM1 if header["lane"] >= 4 else schema.EventKind.LOAD
            for kind, t0, dur in (
                (work, began + _STEP_NS, 2 * _STEP_NS),
                (schema.EventKind.LAUNCH, began, 5 * _STEP_NS),
            ):
                record = records[n]
                record["t0_ns"], record["dur_ns"], record["kind"] = t0, dur, kind
                record["iter"], record["peer"] = iteration, schema.NO_PEER
                record["expert"], record["tile"], record["aux"] = 0, 0, dur
                header["begin_ns"], header["end_ns"] = began, began + 5 * _STEP_NS
                n += 1
        header["count"] = n

    def reset_rings(self) -> None:
        self.began = []

    def flight(self) -> np.ndarray:
        """Rank 0 gave up waiting for the counts of the last rank, which never started."""
        ranks, lanes = self.options.ranks, schema.N_LANES
        slots = np.zeros(ranks * _SMS * lanes, schema.FLIGHT_SLOT)
        for i, slot in enumerate(slots):
            slot["rank"], slot["cta"] = i // lanes // _SMS, i // lanes % _SMS
            slot["sm"], slot["lane"] = i // lanes, i % lanes
            if slot["rank"] == ranks - 1:
                continue
            slot["state"], slot["epoch"] = schema.ActorState.GAVE_UP, 1
            slot["kind"], slot["peer"] = schema.EventKind.WAIT_COUNTS, ranks - 1
            slot["expert"], slot["since_ns"] = 0, self.began[-1]
        return slots

    def counts_seen(self) -> np.ndarray:
        return np.zeros((self.options.ranks, self.options.ranks, self.config.experts), np.uint32)

    def clock(self) -> ClockInfo:
        return ClockInfo("monotonic", 1.0, 50.0)

    def reset(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

"""The ``host`` world: ranks as threads, of this process or of one each, with the kernel's protocol.

For machines without a GPU, for CI and for the sanitizers.  Its times are never compared with a
GPU's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from flashmoe.errors import FlashmoeError
from flashmoe.trace import schema
from flashmoe.weights import torch_dtype
from flashmoe.world import sizing
from flashmoe.world.base import (
    ClockInfo,
    EngineOptions,
    Launch,
    RankOutput,
    RingDump,
    Routing,
    Status,
    WorldKind,
)
from flashmoe.world.memory import available_bytes
from flashmoe.world.tiles import extension, tile_plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flashmoe.config import MoEConfig, MoEWeights
    from flashmoe.world import peers as processes

DEFAULT_SMS = 2
"""CTAs of a rank where none are asked for: six threads each."""

RING_LAUNCHES = 8
"""Launches that a ring of the default capacity holds, were tiles spread evenly."""

RING_MEMORY = 256 << 20
"""Bytes that all rings of the default capacity take at most, and are touched only as they fill."""

SLOWEST_FLOPS = 1e9
"""Floating-point operations per second that even a crowded machine sustains; two idle cores were
seen to reach 30 to 60 times as many."""

MAX_ROWS = 2**31
"""Rows of all ranks: core counts rows and tiles in 32 bits."""


class Peers(Protocol):
    """What joins engines that run one rank each: see ``flashmoe.world.shared``."""

    rank: int

    def share(self, heap_bytes: int) -> list[int]:
        """Addresses of all ranks' heaps of ``heap_bytes`` zeros, anew; collective."""

    def least(self, value: int) -> int:
        """The least of what the ranks say; collective."""

    def ready(self) -> None:
        """Returns when every rank has come here: no rank writes into another's heap before."""

    def slots(self, actors: int) -> int:
        """Address of this rank's ``actors`` flight-recorder slots."""


class HostEngine:
    """``options.ranks`` ranks of ``options.sms_per_rank`` (None: 2) thread groups each.

    ``tokens``: T of each rank.  ``pool_rows``: rows that each rank's pool holds; more needed is
    Status.OVERFLOW.  None sizes the pool as ``sizing.pool_rows`` does, and :meth:`launch` grows it
    when that overflows.  Arithmetic on a CPU may take longer than any sensible deadline, so that
    each wait is allowed the time of the whole layer at ``SLOWEST_FLOPS`` on top of what ``options``
    say: next to nothing for a small layer.  ``self.options`` holds the deadlines with that time
    added.

    With ``peers`` only the rank ``peers.rank`` runs here, the others in processes of their own;
    methods that give or take something a rank then do so for this one alone.

    Implements :class:`flashmoe.world.base.Engine`.  Raises FlashmoeError for a layer or a number of
    ranks that no host engine runs, and, before allocating, where memory does not suffice.
    """

    world: WorldKind = "host"
    lost = False  # what lies in memory can always be read
    gpus: tuple[bytes, ...] = ()

    def __init__(
        self,
        config: MoEConfig,
        weights: MoEWeights,
        tokens: Sequence[int],
        options: EngineOptions | None = None,
        *,
        pool_rows: int | None = None,
        peers: Peers | None = None,
    ) -> None:
        options = options or EngineOptions()
        config.validate()
        self._host = extension()
        self.config = config
        self.options = options
        self.tokens = tuple(tokens)
        self.sms_per_rank = DEFAULT_SMS if options.sms_per_rank is None else options.sms_per_rank
        self._peers = peers
        self.local = range(options.ranks) if peers is None else range(peers.rank, peers.rank + 1)
        self._validate()
        self.options = self._with_time_for_arithmetic()
        self._grows = pool_rows is None
        self._shape = self._make_shape(pool_rows)
        self.tiling: dict[str, Any] | None = (
            None  # its tiles are of one height, and orders cost it nothing
        )
        self.ring_capacity = options.ring_capacity or self._default_ring_capacity()
        settings = self._settings()
        # Other ranks' processes take as much of the same memory.
        _require_memory(settings.bytes_needed * (1 if peers is None else options.ranks))
        self._engine = self._host.Engine(
            settings,
            _bits(weights.gate, config),
            None if weights.bias is None else _array(weights.bias, torch.float32),
            _bits(weights.up, config),
            _bits(weights.down, config),
            self._shared_heaps(),
            0 if peers is None else peers.slots(self.sms_per_rank * self._host.LANES),
        )
        if peers is not None:
            peers.ready()
        self._clock: ClockInfo | None = None

    def _validate(self) -> None:
        ranks = self.options.ranks
        most = self._host.MAX_RANKS
        if not 1 <= ranks <= most:
            raise FlashmoeError(
                f"{ranks} ranks: the host engine runs 1 to {most}",
                f"use --ranks 1 to {most}",
                exit_code=2,
            )
        if len(self.tokens) != ranks or min(self.tokens) < 0:
            raise FlashmoeError(
                f"{len(self.tokens)} numbers of tokens for {ranks} ranks",
                "give each rank's T, 0 or more",
                exit_code=2,
            )
        rows = sum(self.tokens) * self.config.top_k
        if rows > MAX_ROWS:
            raise FlashmoeError(
                f"{rows} rows: tokens times experts a token may be {MAX_ROWS}",
                "use fewer tokens (-T)",
                exit_code=2,
            )
        if self.sms_per_rank < 1:
            raise FlashmoeError(
                f"{self.sms_per_rank} SMs a rank", "give each rank at least one", exit_code=2
            )
        for fault in self.options.faults:
            if not 0 <= fault.rank < ranks:
                raise FlashmoeError(
                    f"a fault on rank {fault.rank} of {ranks}", "ranks count from 0", exit_code=2
                )

    def _shared_heaps(self) -> list[int]:
        if self._peers is None:
            return []
        return self._peers.share(int(self._host.heap_layout(self._shape)["bytes"]))

    def _make_shape(self, pool_rows: int | None) -> dict[str, Any]:
        config, routing, ranks = self.config, self.config.routing, self.options.ranks
        shape: dict[str, Any] = {
            "world": ranks,
            "experts": config.experts,
            "top_k": config.top_k,
            "hidden": config.hidden,
            "inter": config.intermediate,
            "max_tokens": max(self.tokens),
            "pool_rows": 1,
            "chunks": self.sms_per_rank,
            "tile_m": self._host.TILE_M,
            "tile_step": self._host.TILE_STEP,
            "tile_n1": self._host.TILE_N1,
            "tile_n2": self._host.TILE_N2,
            "wave_experts": self._host.WAVE_EXPERTS,
            "activation": config.activation,
            "routing": routing.kind,
            "renormalize": routing.renormalize,
            "scale": routing.scale,
            "groups": routing.groups,
            "top_groups": routing.top_groups,
        }
        worst = max(1, self._host.heap_layout(shape)["worst_pool_rows"])
        if pool_rows is not None:
            return shape | {"pool_rows": max(1, pool_rows)}
        heaps = ranks * self._host.heap_layout(shape | {"pool_rows": worst})["bytes"]
        rows = sum(self.tokens) * config.top_k
        fitting = sizing.pool_rows(config, ranks, rows, worst, heaps, available_bytes())
        shape["pool_rows"] = max(1, fitting)
        if (
            self._peers is not None
        ):  # each saw the memory at another moment, and all need one layout
            shape["pool_rows"] = self._peers.least(shape["pool_rows"])
        return shape

    def _default_ring_capacity(self) -> int:
        """Records of one actor in RING_LAUNCHES launches in which its SM does twice its share."""
        config, ranks, host = self.config, self.options.ranks, self._host
        rows = sum(self.tokens) * config.top_k
        row_tiles = rows // host.TILE_M + config.experts
        columns = -(-config.intermediate // host.TILE_N1) + -(-config.hidden // host.TILE_N2)
        tiles = 2 * row_tiles * columns // (ranks * self.sms_per_rank) + columns
        own_rows = -(-max(self.tokens) // self.sms_per_rank) * config.top_k
        waves = -(-config.experts // (ranks * host.WAVE_EXPERTS)) + 1
        records = 64 + ranks * waves + (4 + ranks) * tiles + 3 * min(own_rows, row_tiles)
        actors = len(self.local) * self.sms_per_rank * host.LANES
        most = RING_MEMORY // (actors * schema.RECORD.itemsize)
        return int(min(max(records * RING_LAUNCHES, 1024), most))

    def _flops(self) -> int:
        """Floating-point operations of one launch: router, GEMM1 and GEMM2 of all ranks."""
        config = self.config
        per_row = config.hidden * (config.up_rows + config.intermediate)
        per_token = config.hidden * config.experts + config.top_k * per_row
        return 2 * sum(self.tokens) * per_token

    def _with_time_for_arithmetic(self) -> EngineOptions:
        """The options with the deadlines that hold, which is what a diagnosis must know."""
        options, arithmetic = self.options, self._flops() / SLOWEST_FLOPS
        return replace(
            options,
            deadline_s=options.deadline_s + arithmetic,
            first_deadline_s=options.first_s + arithmetic,
        )

    def _settings(self) -> Any:
        options = self.options
        assert options.first_deadline_s is not None
        return self._host.EngineConfig(
            self._shape,
            self.config.dtype,
            list(self.tokens),
            options.traced,
            self.ring_capacity,
            options.ring_mode == "keep-last",
            int(options.deadline_s * 1e9),
            int(options.first_deadline_s * 1e9),
            [(f.kind, f.rank, f.peer, f.expert, f.seconds) for f in options.faults],
            (self.local.start, self.local.stop),
            options.no_pointers,
        )

    def load(
        self,
        tokens: list[torch.Tensor],
        ids: list[torch.Tensor] | None = None,
        routing_weights: list[torch.Tensor] | None = None,
    ) -> None:
        """Sets each rank's input; tensors that already fit are read in place, not copied.

        ``tokens``: x [T, H] of each rank.  With external routing also ``ids`` and
        ``routing_weights`` [T, k].  Raises FlashmoeError for missing inputs or other shapes.
        """
        external = self.config.routing.kind == "external"
        if external and (ids is None or routing_weights is None):
            raise FlashmoeError(
                "external routing needs ids and weights", "give both to load()", exit_code=2
            )
        if len(tokens) != len(self.local):
            raise FlashmoeError(
                f"tokens of {len(tokens)} ranks for {len(self.local)}",
                "give one tensor a rank",
                exit_code=2,
            )
        for i, rank in enumerate(self.local):
            x = tokens[i]
            self._require_shape(f"x of rank {rank}", x, rank, self.config.hidden)
            chosen = share = None
            if external:
                assert ids is not None and routing_weights is not None
                chosen, share = ids[i], routing_weights[i]
                self._require_shape(f"ids of rank {rank}", chosen, rank, self.config.top_k)
                self._require_shape(f"weights of rank {rank}", share, rank, self.config.top_k)
            self._engine.load(
                rank,
                _bits(x, self.config),
                None if chosen is None else _array(chosen, torch.int32),
                None if share is None else _array(share, torch.float32),
            )

    def _require_shape(self, what: str, tensor: torch.Tensor, rank: int, width: int) -> None:
        if tuple(tensor.shape) != (self.tokens[rank], width):
            raise FlashmoeError(
                f"{what} has shape {list(tensor.shape)}",
                f"it must be [{self.tokens[rank]}, {width}]",
                exit_code=2,
            )

    def launch(self) -> Launch:
        """Runs one forward of all ranks.  Ctrl-C ends it; the abort then stays until reset().

        Where ``pool_rows`` was not given, a launch that overflows is undone, the pools grow, and it
        runs again: the result then is the second's, with ``rows_needed`` set.
        """
        launch = self._launch_once()
        if launch.status is Status.OVERFLOW and self._grows:
            rows = launch.rows_needed
            larger = self._shape | {"pool_rows": rows}
            more = self._host.heap_layout(larger)["bytes"]
            more -= self._host.heap_layout(self._shape)["bytes"]
            _require_memory(self.options.ranks * more)
            self._shape = larger
            self._engine.resize_pools(rows, self._shared_heaps())
            if self._peers is not None:
                self._peers.ready()
            launch = replace(self._launch_once(), rows_needed=rows)
        return launch

    def _launch_once(self) -> Launch:
        iteration = self._engine.iteration
        try:
            status, elapsed_ns, rows_needed = self._engine.launch()
        except RuntimeError as exc:
            raise FlashmoeError(str(exc), "use fewer --ranks or SMs a rank") from exc
        return Launch(Status(status), elapsed_ns / 1e6, iteration, rows_needed)

    def outputs(self) -> list[RankOutput]:
        """Results of the last launch, one a rank; y is NaN where it did not end well."""
        dtype = torch_dtype(self.config)
        return [
            RankOutput(
                torch.from_numpy(self._engine.y(rank).copy()).view(dtype),
                torch.from_numpy(self._engine.ids(rank).copy()),
                torch.from_numpy(self._engine.weights(rank).copy()),
            )
            for rank in self.local
        ]

    def routing(self) -> Routing:
        """Counts and tile plan of the last launch."""
        counts = self.chunk_counts()
        return Routing(counts, tile_plan(self.shape, counts, self.family))

    def chunk_counts(self) -> np.ndarray:
        """uint32 [ranks here, chunks, E]: rows of each chunk of the last launch."""
        counts: np.ndarray = self._engine.chunk_counts()
        return counts

    @property
    def shape(self) -> dict[str, Any]:
        """The fields of csrc/core/shape.h by name, as :func:`tile_plan` takes them."""
        return self._shape

    @property
    def family(self) -> str:
        """The one tile family's name."""
        return str(self._host.FAMILY)

    def rings(self) -> RingDump:
        """Every actor's ring, as a view of the engine's memory: valid until the next launch,
        ``reset_rings`` or ``close``."""
        headers = self._engine.rings()
        records = self._engine.records()
        n = len(headers)
        return RingDump(
            headers.reshape(-1).view(schema.RING_HEADER).reshape(n),
            records.reshape(-1).view(schema.RECORD).reshape(n, self.ring_capacity),
        )

    def reset_rings(self) -> None:
        """Empties the rings; iterations restart at 0."""
        self._engine.reset_rings()

    def flight(self) -> np.ndarray:
        """Flight-recorder slots, ``schema.FLIGHT_SLOT`` [n], from any thread, also during a
        launch."""
        slots: np.ndarray = self._engine.flight().reshape(-1).view(schema.FLIGHT_SLOT)
        return slots

    def counts_seen(self) -> np.ndarray:
        """Rows as each rank holds them: uint32 [W, W, E], entry [p][s][e] what rank p believes that
        source s sends to expert e in the last launch; 0xffffffff where it had no word of it."""
        seen: np.ndarray = self._engine.counts_seen()
        return seen

    def clock(self) -> ClockInfo:
        """CLOCK_MONOTONIC: its step, one record's cost and the cycle counter's rate, measured."""
        if self._clock is None:
            self._clock = ClockInfo(
                "CLOCK_MONOTONIC",
                self._host.clock_step_ns(),
                self._host.record_cost_ns(),
                self._host.cycles_mhz(),
            )
        return self._clock

    def now_ns(self) -> int:
        """The clock that stamps the events, now."""
        return int(self._host.now_ns())

    def abort(self) -> None:
        """Ends the launch of all ranks, wherever they run; from any thread."""
        self._engine.abort()

    def reset(self) -> None:
        """Clears a sticky abort: signals zero, epoch 0."""
        self._engine.reset()

    def close(self) -> None:
        """Frees everything, once no array of :meth:`rings` is held; safe to call twice."""
        self.__dict__.pop("_engine", None)


def pe_engine(
    config: MoEConfig,
    weights: MoEWeights,
    tokens: Sequence[int],
    options: EngineOptions,
    peers: processes.Peers,
) -> HostEngine:
    """The engine of one rank among processes; see :mod:`flashmoe.world.processes`."""
    from flashmoe.world.shared import SharedPeers

    return HostEngine(config, weights, tokens, options, peers=SharedPeers(peers))


def _array(tensor: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """The memory of the tensor as an array; a copy only where place or type differ."""
    return tensor.detach().to("cpu", dtype).contiguous().numpy()


def _bits(tensor: torch.Tensor, config: MoEConfig) -> np.ndarray:
    """A tensor in the layer's dtype as uint16, since NumPy has no bf16."""
    rows = tensor.detach().to("cpu", torch_dtype(config)).contiguous()
    return rows.view(torch.uint16).numpy()


def _require_memory(needed: int) -> None:
    """Raises FlashmoeError where the memory left does not hold ``needed`` more bytes."""
    available = available_bytes()
    if available is not None and needed > available:
        raise FlashmoeError(
            f"this run needs {needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are free",
            "use fewer tokens (-T), a smaller layer or a smaller --ring-capacity",
        )

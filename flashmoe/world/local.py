"""The ``local`` world: W virtual ranks on one GPU, all of the protocol in one launch."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flashmoe import tuning
from flashmoe.errors import FlashmoeError
from flashmoe.trace import schema
from flashmoe.world import arguments
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
from flashmoe.world.kernel import (
    ARCH,
    FAMILY,
    LANES,
    MAX_RANKS,
    UNTUNED,
    Kernel,
    check_experts,
    even_share,
    launch_shape,
    tiling,
)
from flashmoe.world.tiles import extension, tile_plan

if TYPE_CHECKING:
    from flashmoe.config import MoEConfig, MoEWeights

LAUNCHES_PER_RING = 16

_TORCH_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


class LocalEngine:
    """W virtual ranks on GPU ``options.device``, each with its own arena and its own SMs.

    ``tokens``: T of each rank.  ``pool_rows`` overrides the pool's capacity (None: the worst case,
    in which nothing can overflow).  Implements :class:`flashmoe.world.base.Engine`.  Raises
    FlashmoeError for a shape that the kernel does not take, and before allocating where the
    device's memory does not hold it, with the bytes needed.
    """

    world: WorldKind = "local"

    def __init__(
        self,
        config: MoEConfig,
        weights: MoEWeights,
        tokens: list[int],
        options: EngineOptions,
        pool_rows: int | None = None,
    ) -> None:
        config.validate()
        check_experts(config)
        if not 1 <= options.ranks <= MAX_RANKS or len(tokens) != options.ranks:
            raise FlashmoeError(
                f"{options.ranks} virtual ranks: one GPU takes 1 to {MAX_RANKS}",
                f"use --ranks 1 to {MAX_RANKS}",
                2,
            )
        self.config = config
        self.options = options
        self.tokens = tuple(tokens)
        self.device = torch.device("cuda", options.device)
        self._kernel = Kernel.moe(self.device, config, options.traced)
        properties = torch.cuda.get_device_properties(self.device)
        share = properties.multi_processor_count // options.ranks
        self.sms_per_rank = options.sms_per_rank or even_share(share)
        if self.sms_per_rank * options.ranks > properties.multi_processor_count:
            raise FlashmoeError(
                f"{options.ranks} ranks of {self.sms_per_rank} SMs need more than the "
                f"{properties.multi_processor_count} of this GPU",
                "give fewer ranks, or fewer SMs a rank",
                2,
            )
        self._cut = options.tiling or tiling(config)
        self.tiling: dict[str, Any] | None = tuning.described(config, ARCH, self._cut, UNTUNED)
        self._fixed_pool = pool_rows is not None
        self._shape = self._make_shape(pool_rows, properties.total_memory)
        self._layout = extension().heap_layout(self._shape)
        self.ring_capacity = options.ring_capacity or self._default_ring_capacity()
        self._check_memory(weights)
        self._weights = self._place_weights(weights)
        self._allocate()
        self._iteration_base = 0
        self._launches = 0
        self._write_args()
        self._clock: ClockInfo | None = None

    # -- construction ---------------------------------------------------------------------------

    def _make_shape(self, pool_rows: int | None, memory: int) -> dict[str, Any]:
        shape = launch_shape(
            self.config, self.options.ranks, self.sms_per_rank, max(self.tokens), self._cut
        )
        if pool_rows is None:
            # The worst case while the arenas then take less than a quarter of the memory, else
            # twice the mean; launch() grows the pools should that overflow.
            pool_rows = extension().heap_layout(shape)["worst_pool_rows"]
            arenas = extension().heap_layout({**shape, "pool_rows": pool_rows})["bytes"]
            if arenas * self.options.ranks > memory // 4:
                mean = sum(self.tokens) * self.config.top_k // self.options.ranks
                pool_rows = min(pool_rows, 2 * mean)
        shape["pool_rows"] = max(8, pool_rows)
        return shape

    def _default_ring_capacity(self) -> int:
        """Records an actor may write in LAUNCHES_PER_RING launches, were all rows of one rank."""
        shape, config = self._shape, self.config
        rows = sum(self.tokens) * config.top_k
        row_tiles = rows // self._cut.tile_rows + config.experts
        columns = -(-config.intermediate // shape["tile_n1"]) + -(
            -config.hidden // shape["tile_n2"]
        )
        tiles = 2 * row_tiles * columns // self.sms_per_rank
        own = -(-max(self.tokens) // self.sms_per_rank)
        records = 64 + 2 * self._cut.waves * self.options.ranks + (3 + self.options.ranks) * tiles
        records += 2 * min(own * config.top_k, 512)
        return int(min(records * LAUNCHES_PER_RING, 1 << 16))

    def _bytes_needed(self) -> int:
        arenas = self._layout["bytes"] * self.options.ranks
        rings = self.options.traced * self.options.ranks * self.sms_per_rank * LANES
        rings *= self.ring_capacity * schema.RECORD.itemsize + schema.RING_HEADER.itemsize
        rows = 2 * sum(self.tokens) * self.config.row_bytes
        return int(arenas + rings + rows)

    def _check_memory(self, weights: MoEWeights) -> None:
        on_device = weights.up.device == self.device
        tensors = (weights.gate, weights.up, weights.down)
        moved = 0 if on_device else sum(t.numel() * t.element_size() for t in tensors)
        needed = self._bytes_needed() + moved
        free, _ = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        if needed > free:
            raise FlashmoeError(
                f"this run needs {needed / 1e9:.1f} GB on the GPU and {free / 1e9:.1f} GB are free",
                "use fewer tokens (-T) or a smaller layer",
                1,
            )

    def _place_weights(self, weights: MoEWeights) -> MoEWeights:
        from flashmoe.config import MoEWeights as Weights

        dtype = _TORCH_DTYPE[self.config.dtype]

        def put(tensor: torch.Tensor, to: torch.dtype) -> torch.Tensor:
            return tensor.to(self.device, to).contiguous()

        bias = None if weights.bias is None else put(weights.bias, torch.float32)
        return Weights(
            gate=put(weights.gate, dtype),
            bias=bias,
            up=put(weights.up, dtype),
            down=put(weights.down, dtype),
        )

    def _allocate(self) -> None:
        ranks, config = self.options.ranks, self.config
        dtype = _TORCH_DTYPE[config.dtype]
        actors = ranks * self.sms_per_rank * LANES
        empty: dict[str, Any] = {"device": self.device}
        self._allocate_heaps()
        self._x = [torch.empty(t, config.hidden, dtype=dtype, **empty) for t in self.tokens]
        self._y = [torch.empty(t, config.hidden, dtype=dtype, **empty) for t in self.tokens]
        external = config.routing.kind == "external"
        shape = [(t, config.top_k) for t in self.tokens]
        self._ids = (
            [torch.empty(s, dtype=torch.int32, **empty) for s in shape] if external else None
        )
        self._routing_weights = (
            [torch.empty(s, dtype=torch.float32, **empty) for s in shape] if external else None
        )
        self._slots = torch.zeros(
            actors, schema.FLIGHT_SLOT.itemsize, dtype=torch.uint8
        ).pin_memory()
        traced = self.options.traced
        self._rings = torch.zeros(
            actors if traced else 0, schema.RING_HEADER.itemsize, dtype=torch.uint8, **empty
        )
        self._records = torch.empty(
            (actors if traced else 0, self.ring_capacity, schema.RECORD.itemsize),
            dtype=torch.uint8,
            **empty,
        )
        self._args: ctypes.Array[ctypes.c_char] | None = None
        self.reset()

    def _allocate_heaps(self) -> None:
        # What the kernel must not rely on is poison, not zeros: 0xff.. is NaN in both dtypes.
        self._heaps = [
            torch.full((self._layout["bytes"],), 0xFF, dtype=torch.uint8, device=self.device)
            for _ in range(self.options.ranks)
        ]

    def _rank_args(self, rank: int) -> dict[str, Any]:
        config, weights, x = self.config, self._weights, self._x[rank]
        heap, up, down = (t.data_ptr() for t in (self._heaps[rank], weights.up, weights.down))
        pool, h = heap + self._layout["pool"], heap + self._layout["h"]
        gate, chunks = weights.gate.data_ptr(), self.sms_per_rank
        maps = {
            **arguments.row_maps(config, pool, h, self._shape["pool_rows"]),
            **arguments.weight_maps(config, up, down, rank, self.options.ranks),
            **arguments.gate_maps(config, gate, x.data_ptr(), x.shape[0], chunks),
        }
        ids = self._ids[rank] if self._ids else None
        routing = self._routing_weights[rank] if self._routing_weights else None
        return arguments.rank_args(maps, weights, x, self._y[rank], ids, routing, rank)

    def _write_args(self) -> None:
        options = self.options
        self._args = arguments.pack(
            self._shape,
            [heap.data_ptr() for heap in self._heaps],
            [self._rank_args(rank) for rank in range(options.ranks)],
            deadline_s=options.deadline_s,
            first_deadline_s=options.first_deadline_s,
            slots=self._slots.data_ptr(),
            fault=arguments.fault_args(options.faults),
            rings=self._rings.data_ptr() if options.traced else 0,
            records=self._records.data_ptr() if options.traced else 0,
            ring_capacity=self.ring_capacity,
            keep_last=options.ring_mode == "keep-last",
            iteration_base=self._iteration_base,
        )

    # -- running --------------------------------------------------------------------------------

    def load(
        self,
        tokens: list[torch.Tensor],
        ids: list[torch.Tensor] | None = None,
        routing_weights: list[torch.Tensor] | None = None,
    ) -> None:
        """Sets each rank's input; see :class:`flashmoe.world.base.Engine`."""
        if (ids is None or routing_weights is None) and self._ids is not None:
            raise FlashmoeError("external routing needs ids and weights", "give both to load()", 2)
        for rank, x in enumerate(tokens):
            self._x[rank].copy_(x)
            if self._ids is not None and self._routing_weights is not None:
                assert ids is not None and routing_weights is not None
                self._ids[rank].copy_(ids[rank])
                self._routing_weights[rank].copy_(routing_weights[rank])

    def enqueue(self) -> None:
        """One launch on torch's current stream, without waiting for it."""
        assert self._args is not None
        self._kernel.launch_moe(self.options.ranks, self.sms_per_rank, self._args)
        self._launches += 1

    def launch(self) -> Launch:
        """Runs one forward of all ranks and waits for it.

        Grows the pools and runs again where the routed rows did not fit, unless ``pool_rows`` was
        given.
        """
        launch = self._launch_once()
        if launch.status is Status.OVERFLOW and not self._fixed_pool:
            self._grow_pools(launch.rows_needed)
            launch = self._launch_once()
        return launch

    def _grow_pools(self, rows: int) -> None:
        """Makes room for ``rows`` rows a pool.  The epoch goes back to 0; iterations go on."""
        self._shape = {**self._shape, "pool_rows": rows}
        self._heaps = []
        self._layout = extension().heap_layout(self._shape)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        needed = self._layout["bytes"] * self.options.ranks
        if needed > free:
            raise FlashmoeError(
                f"routing sends {rows} rows to one rank, which needs {needed / 1e9:.1f} GB on "
                f"the GPU and {free / 1e9:.1f} GB are free",
                "use fewer tokens (-T)",
            )
        iteration = self._launches - 1 - self._iteration_base
        self._allocate_heaps()
        self.reset()
        self._iteration_base = -iteration
        self._write_args()

    def _launch_once(self) -> Launch:
        with torch.cuda.device(self.device):
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            begin.record()
            self.enqueue()
            end.record()
            end.synchronize()
        words = [self._word(rank, "status_word") for rank in range(self.options.ranks)]
        aborts = [self._word(rank, "abort_word") for rank in range(self.options.ranks)]
        # A rank whose CTAs never started leaves no status; its abort word tells.
        status = max((w & 0xFFFFFFFF for w in (*words, *aborts)), default=0)
        if Status.HANG in aborts:
            status = Status.HANG
        return Launch(
            status=Status(status),
            elapsed_ms=begin.elapsed_time(end),
            iteration=self._launches - 1 - self._iteration_base,
            rows_needed=max(w >> 32 for w in words),
        )

    def outputs(self) -> list[RankOutput]:
        """Results of the last launch, one a rank, on the CPU."""
        k = self.config.top_k
        result = []
        for rank, tokens in enumerate(self.tokens):
            ids = self._section(rank, "ids", 4 * tokens * k).view(torch.int32).reshape(tokens, k)
            weights = self._section(rank, "weights", 4 * tokens * k).view(torch.float32)
            result.append(RankOutput(self._y[rank].cpu(), ids, weights.reshape(tokens, k)))
        return result

    def routing(self) -> Routing:
        """Counts and tile plan of the last launch."""
        experts = self.config.experts
        size = 4 * self.sms_per_rank * experts
        counts = np.stack(
            [
                self._section(rank, "histogram", size)
                .numpy()
                .view(np.uint32)
                .reshape(self.sms_per_rank, experts)
                for rank in range(self.options.ranks)
            ]
        )
        return Routing(chunk_counts=counts, tiles=tile_plan(self._shape, counts, FAMILY))

    def rings(self) -> RingDump:
        """Every actor's ring since construction or ``reset_rings``."""
        headers = self._rings.cpu().numpy().reshape(-1).view(schema.RING_HEADER)
        stored = int(min(self.ring_capacity, headers["count"].max(initial=0)))
        records = self._records[:, :stored].contiguous().cpu().numpy()
        shape = (len(headers), stored)
        return RingDump(headers, records.reshape(-1).view(schema.RECORD).reshape(shape))

    def reset_rings(self) -> None:
        """Empties the rings; iterations restart at 0."""
        self._rings.zero_()
        self._iteration_base = self._launches
        self._write_args()

    def flight(self) -> np.ndarray:
        """Flight-recorder slots, also while hung."""
        return self._slots.numpy().reshape(-1).view(schema.FLIGHT_SLOT).copy()

    def counts_seen(self) -> np.ndarray:
        """Counts as each rank holds them, uint32 [W, W, E]: [holder, source, expert].

        0xffffffff where that source's count has not arrived.
        """
        ranks, experts = self.options.ranks, self.config.experts
        seen = np.zeros((ranks, ranks, experts), np.uint32)
        for rank in range(ranks):
            words = self._section(rank, "counts", 16 * ranks * experts).numpy().view(np.uint64)
            epoch = self._launches
            both = words.reshape(2, ranks, experts)[epoch & 1]
            arrived = both >> np.uint64(32) == epoch
            seen[rank] = np.where(arrived, both & np.uint64(0xFFFFFFFF), 0xFFFFFFFF)
        return seen

    def clock(self) -> ClockInfo:
        """The GPU's global timer: its step, one record's cost and the SM clock, measured once."""
        if self._clock is None:
            self._clock = self._measure_clock()
        return self._clock

    def _measure_clock(self) -> ClockInfo:
        probe = Kernel(self.device, "flashmoe_clock_probe")
        out = torch.zeros(4, dtype=torch.int64, device=self.device)
        scratch = torch.zeros(256 * 32 + 256, dtype=torch.uint8, device=self.device)
        slot = torch.zeros(64, dtype=torch.uint8).pin_memory()
        pointers = (out.data_ptr(), scratch.data_ptr(), slot.data_ptr())
        for _ in range(2):  # the first one fetches instructions
            probe.launch(1, 1, pointers, (ctypes.c_void_p,) * 3)
        step, nanoseconds, cycles, records = out.cpu().tolist()
        mhz = cycles / nanoseconds * 1e3
        return ClockInfo("globaltimer", step, cycles / records / mhz * 1e3, mhz)

    def reset(self) -> None:
        """Clears a sticky abort: signals zero, epoch 0."""
        for heap in self._heaps:
            heap[: self._layout["pool"]].zero_()
        self._slots.zero_()
        self._launches = 0
        self._iteration_base = 0
        if self._args is not None:
            self._write_args()

    def close(self) -> None:
        """Frees everything; safe to call twice."""
        for name in ("_heaps", "_x", "_y", "_ids", "_routing_weights", "_rings", "_records"):
            setattr(self, name, [])
        self.__dict__.pop("_weights", None)

    def _section(self, rank: int, name: str, size: int) -> torch.Tensor:
        at = self._layout[name]
        return self._heaps[rank][at : at + size].cpu()

    def _word(self, rank: int, name: str) -> int:
        return int(self._section(rank, name, 8).view(torch.int64).item())

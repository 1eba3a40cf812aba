"""The engine of ranks on a GPU: some of a launch's W ranks in this process, or all of them.

Where heaps come from, and how ranks elsewhere are reached, is a :class:`HeapMemory`'s to know.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from flashmoe import tuning
from flashmoe.errors import FlashmoeError
from flashmoe.trace import schema
from flashmoe.trace.schema import RingMode
from flashmoe.weights import torch_dtype
from flashmoe.world import arguments, sizing
from flashmoe.world.base import (
    ClockInfo,
    DeviceLost,
    EngineOptions,
    Launch,
    RankOutput,
    RingDump,
    Routing,
    Status,
    WorldKind,
)
from flashmoe.world.gpu_abort import AbortWords
from flashmoe.world.gpu_clock import GpuClock, measure_clock
from flashmoe.world.gpu_results import HeapReader
from flashmoe.world.image_spans import Work
from flashmoe.world.kernel import (
    ARCH,
    LANES,
    Kernel,
    check_experts,
    even_share,
    launch_shape,
    tile_family,
    tiling,
    unit_family,
    untuned,
)
from flashmoe.world.tiles import extension, tile_plan
from flashmoe.world.trace_memory import TraceMemory

if TYPE_CHECKING:
    from flashmoe.config import MoEConfig, MoEWeights

SPIN_S = 0.002
"""A launch is polled without a pause for so long; most have ended by then."""


class HeapMemory(Protocol):
    """The heaps of all ranks, as this process reaches them.

    Where ranks are processes every method is collective: all of them call it, in the same order.
    """

    def allocate(self, nbytes: int) -> list[torch.Tensor]:
        """A heap for each rank of this process, uint8 [nbytes] on the device, of any content.

        Those before have been freed.  Raises FlashmoeError where the memory is not there.
        """

    def peers(self) -> list[int]:
        """Addresses of all W heaps, 0 where no pointer reaches.

        Called once what ``allocate`` gave is ready to be written into by the others.
        """

    def barrier(self) -> None:
        """Returns when every process has come here."""

    def free(self) -> None:
        """Gives back what was allocated, once no process maps it; none is inside a launch."""

    def close(self) -> None:
        """The last ``free``, where the process goes on; safe to call twice.  No failure is raised:
        where not all ranks come, the process's end frees what is left."""


class GpuEngine:
    """The ranks ``local`` of ``options.ranks``, in launches of their own on GPU ``options.device``.

    ``tokens``: T of each of all ranks.  ``on_gpu`` of them share this GPU, in this process and in
    others (None: those of this process).  ``pool_rows`` overrides the pool's capacity, which then
    does not grow (None: the worst case, or what memory allows).  What a method takes or gives one
    a rank is of the ranks in ``local``.  Raises FlashmoeError for a shape that the kernel does not
    take, and before allocating where the device's memory does not hold it, with the bytes needed.
    """

    world: WorldKind
    flavour = "p2p"
    """Of the cubin: how the kernel reaches ranks that no pointer does."""

    def __init__(
        self,
        config: MoEConfig,
        weights: MoEWeights,
        tokens: list[int],
        options: EngineOptions,
        memory: HeapMemory,
        local: range,
        on_gpu: int | None = None,
        pool_rows: int | None = None,
    ) -> None:
        config.validate()
        check_experts(config)
        self.config = config
        self.options = options
        self.tokens = tuple(tokens)
        self.local = local
        self.on_gpu = on_gpu or len(local)
        self.device = torch.device("cuda", options.device)
        self._memory = memory
        self._lost = False
        self._kernel = Kernel.moe(self.device, config, options.traced, self.flavour)
        self.sms_per_rank = self._choose_sms()
        cut = options.tiling or tiling(config, max(tokens))
        # The tuning tables of two nodes may differ, the tiles of two ranks may not.
        self._cut = tuning.Tiling(self._agree(cut.tile_rows), self._agree(cut.waves))
        default = untuned(config, max(tokens))
        self.tiling: dict[str, Any] | None = tuning.described(config, ARCH, self._cut, default)
        self._fixed_pool = pool_rows is not None
        total = torch.cuda.get_device_properties(self.device).total_memory
        self._shape = self._make_shape(pool_rows, total)
        self._layout = self._heap_layout(self._shape)
        self._trace_room = sizing.trace_room(
            config, self.tokens, self._shape, self._cut.waves, options.ring_capacity
        )
        self.ring_capacity = self._trace_room.records
        self._check_memory(weights)
        self._weights = self._place_weights(weights)
        self._iteration_base = 0
        self._launches = 0
        self._allocate()
        self._write_args()
        self._clock: ClockInfo | None = None
        self._asked: GpuClock | None = None
        self._abort = AbortWords(self.device)

    # -- construction ---------------------------------------------------------------------------

    def _agree(self, value: int) -> int:
        """The least of what all processes say; collective."""
        return value

    def _sm_share(self) -> int:
        """The SMs that a rank may have."""
        sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        return sms // self.on_gpu

    def _choose_sms(self) -> int:
        share = self._sm_share()
        sms = self._agree(self.options.sms_per_rank or even_share(share))
        if not 1 <= sms <= share:
            raise FlashmoeError(
                f"{self.on_gpu} ranks of {max(sms, 1)} SMs need more than this GPU has: "
                f"{share} a rank",
                "give fewer ranks, or fewer SMs a rank",
                2,
            )
        return sms

    def _make_shape(self, pool_rows: int | None, memory: int) -> dict[str, Any]:
        shape = launch_shape(
            self.config, self.options.ranks, self.sms_per_rank, max(self.tokens), self._cut
        )
        if pool_rows is None:
            worst = self._heap_layout(shape)["worst_pool_rows"]
            heaps = self._heap_layout({**shape, "pool_rows": worst})["bytes"] * self.on_gpu
            rows = sum(self.tokens) * self.config.top_k
            pool_rows = sizing.pool_rows(
                self.config, self.options.ranks, rows, worst, heaps, memory
            )
        shape["pool_rows"] = self._agree(max(8, pool_rows))
        units = None
        if self.options.in_place:
            units = arguments.units(shape, self.tokens[0], self.flavour, self.options.faults)
        self._by_units = units is not None
        return {**shape, **(units or {})}

    def _heap_layout(self, shape: dict[str, Any]) -> dict[str, int]:
        layout: dict[str, int] = extension().heap_layout(shape, self.options.in_place)
        return layout

    def _actors(self) -> int:
        return len(self.local) * self.sms_per_rank * LANES

    def _check_memory(self, weights: MoEWeights) -> None:
        on_device = weights.up.device == self.device
        tensors = (weights.gate, weights.up, weights.down)
        moved = 0 if on_device else sum(t.numel() * t.element_size() for t in tensors)
        tokens = [self.tokens[r] for r in self.local]
        needed = moved + sizing.gpu_bytes(self.config, tokens, self._layout["bytes"])
        if self.options.traced:
            needed += self._trace_room.bytes_of(len(self.local) * self.sms_per_rank)
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

        dtype = torch_dtype(self.config)

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
        config, tokens = self.config, [self.tokens[r] for r in self.local]
        dtype = torch_dtype(config)
        actors = self._actors()
        empty: dict[str, Any] = {"device": self.device}
        self._x = [torch.empty(t, config.hidden, dtype=dtype, **empty) for t in tokens]
        self._y = [torch.empty(t, config.hidden, dtype=dtype, **empty) for t in tokens]
        external = config.routing.kind == "external"
        shape = [(t, config.top_k) for t in tokens]
        self._ids = (
            [torch.empty(s, dtype=torch.int32, **empty) for s in shape] if external else None
        )
        self._routing_weights = (
            [torch.empty(s, dtype=torch.float32, **empty) for s in shape] if external else None
        )
        self._slots_address, self._slots = self._make_slots(actors)
        # An untraced engine's is of no CTA.
        self._trace = TraceMemory(
            self.local if self.options.traced else (),
            self.sms_per_rank,
            self._trace_room,
            RingMode.KEEP_LAST if self.options.ring_mode == "keep-last" else RingMode.KEEP_FIRST,
            self.device,
        )
        self._allocate_heaps()

    def _make_slots(self, actors: int) -> tuple[int, np.ndarray]:
        """Flight-recorder slots in pinned memory: (the device's address, FLIGHT_SLOT [actors])."""
        pinned = torch.zeros(actors, schema.FLIGHT_SLOT.itemsize, dtype=torch.uint8).pin_memory()
        return pinned.data_ptr(), pinned.numpy().reshape(-1).view(schema.FLIGHT_SLOT)

    def _allocate_heaps(self) -> None:
        """Heaps whose signals are zero, known to all ranks; collective."""
        self._heaps = self._memory.allocate(self._layout["bytes"])
        for heap in self._heaps:
            # What the kernel must not rely on is poison, not zeros: 0xff.. is NaN in both dtypes.
            heap.fill_(0xFF)
            heap[: self._layout["pool"]].zero_()
        torch.cuda.synchronize(self.device)
        self._addresses = self._memory.peers()

    def _rank_args(self, index: int) -> dict[str, Any]:
        config, weights, x = self.config, self._weights, self._x[index]
        rank = self.local[index]
        heap, up, down = self._addresses[rank], weights.up.data_ptr(), weights.down.data_ptr()
        pool, h = heap + self._layout["pool"], heap + self._layout["h"]
        gate, chunks = weights.gate.data_ptr(), self.sms_per_rank
        maps = {
            **arguments.row_maps(config, pool, h, self._shape["pool_rows"]),
            **arguments.weight_maps(config, up, down, rank, self.options.ranks),
            **arguments.gate_maps(config, gate, x.data_ptr(), x.shape[0], chunks),
        }
        ids = self._ids[index] if self._ids else None
        routing = self._routing_weights[index] if self._routing_weights else None
        return arguments.rank_args(maps, weights, x, self._y[index], ids, routing, rank)

    def _write_args(self) -> None:
        options = self.options
        self._args = arguments.pack(
            self._shape,
            self._addresses,
            [self._rank_args(index) for index in range(len(self.local))],
            deadline_s=options.deadline_s,
            first_deadline_s=options.first_deadline_s,
            slots=self._slots_address,
            fault=arguments.fault_args(options.faults),
            **self._trace.arguments(),
            # Below zero once the epoch has begun anew; the kernel subtracts it in 32 bits.
            iteration_base=self._iteration_base & 0xFFFFFFFF,
            by_units=self._by_units,
            in_place=options.in_place,
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
        for index, x in enumerate(tokens):
            self._x[index].copy_(x)
            if self._ids is not None and self._routing_weights is not None:
                assert ids is not None and routing_weights is not None
                self._ids[index].copy_(ids[index])
                self._routing_weights[index].copy_(routing_weights[index])

    def enqueue(self) -> None:
        """One launch on torch's current stream, without waiting for it."""
        with torch.cuda.device(self.device):
            self._kernel.launch_moe(len(self.local), self.sms_per_rank, self._args)
        self._launches += 1

    def launch(self) -> Launch:
        """Runs one forward of all ranks and waits for it.

        Grows the pools and runs again where the routed rows did not fit, unless ``pool_rows`` was
        given.  Whatever interrupts the wait, such as Ctrl-C, aborts the launch and goes on once
        that has ended; the abort stays until ``reset``.  Raises DeviceLost where the device's
        context is broken.
        """
        launch = self._launch_once()
        if launch.status is Status.OVERFLOW and not self._fixed_pool:
            # All ranks hold the same counts, so all see the same overflow and come here.
            self._grow_pools(launch.rows_needed)
            launch = self._launch_once()
        return launch

    def _grow_pools(self, rows: int) -> None:
        """Makes room for ``rows`` rows a pool.  The epoch goes back to 0; iterations go on."""
        self._shape = {**self._shape, "pool_rows": rows}
        self._heaps = []
        self._layout = self._heap_layout(self._shape)
        self._memory.free()
        free, _ = torch.cuda.mem_get_info(self.device)
        needed = self._layout["bytes"] * len(self.local)
        if needed > free:
            raise FlashmoeError(
                f"routing sends {rows} rows to one rank, which needs {needed / 1e9:.1f} GB on "
                f"the GPU and {free / 1e9:.1f} GB are free",
                "use fewer tokens (-T)",
            )
        iteration = self._iterations() - 1
        self._trace.put_steps_aside(self._iterations(), first=iteration)
        self._allocate_heaps()
        self._clear_slots()
        self._launches = 0
        self._iteration_base = -iteration
        self._write_args()

    def _launch_once(self) -> Launch:
        try:
            return self._run_once()
        except RuntimeError as exc:  # torch's word for what the driver says
            self._lost = True
            raise DeviceLost(exc) from exc
        except FlashmoeError as exc:
            if self.lost:
                raise DeviceLost(exc) from exc
            raise

    def _run_once(self) -> Launch:
        with torch.cuda.device(self.device):
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            begin.record()
            self.enqueue()
            end.record()
            self._wait(end)
        words = [self._word(index, "status_word") for index in range(len(self.local))]
        aborts = [self._word(index, "abort_word") for index in range(len(self.local))]
        # A rank whose CTAs never started leaves no status; its abort word tells.
        status = max((w & 0xFFFFFFFF for w in (*words, *aborts)), default=0)
        if Status.HANG in aborts:
            status = Status.HANG
        return Launch(
            status=Status(status),
            elapsed_ms=begin.elapsed_time(end),
            iteration=self._iterations() - 1,
            rows_needed=max(w >> 32 for w in words),
        )

    def _wait(self, end: torch.cuda.Event) -> None:
        # Polled, since a signal's handler runs only between two steps of Python.
        try:
            spin_until = time.monotonic() + SPIN_S
            while not end.query():
                time.sleep(0 if time.monotonic() < spin_until else 5e-5)
            self._settle()
        except RuntimeError:
            raise
        except BaseException:
            self.abort()
            with contextlib.suppress(RuntimeError):
                end.synchronize()  # every wait looks at the abort word, and has its deadline
            raise

    def _settle(self) -> None:
        """Called when the kernel of this process has ended, before its words are read."""

    def abort(self) -> None:
        """Raises abort on every rank within reach, also while a kernel runs; from any thread."""
        at = self._layout["abort_word"]
        reached = [address for address in self._addresses if address]
        own = [self._addresses[rank] for rank in self.local]
        self._abort.store([address + at for address in dict.fromkeys(own + reached)])

    @property
    def lost(self) -> bool:
        """Whether the device's context is broken, so that nothing in its memory can be read.

        To be asked after a failure: it waits for the device.
        """
        if not self._lost:
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError:
                self._lost = True
        return self._lost

    # -- what a launch left -----------------------------------------------------------------------

    @property
    def shape(self) -> dict[str, Any]:
        """The fields of csrc/core/shape.h by name, as :func:`tile_plan` takes them."""
        return self._shape

    @property
    def family(self) -> str:
        """The name of the tile family that launches use."""
        return unit_family() if self._by_units else tile_family(self.config.dtype)

    @property
    def _results(self) -> HeapReader:
        """A reader of the heaps as they are now: pools that grow bring new ones."""
        return HeapReader(self._heaps, self._layout, self._shape, self.local)

    def _word(self, index: int, name: str) -> int:
        return self._results.word(index, name)

    def outputs(self) -> list[RankOutput]:
        """Results of the last launch, one a rank, on the CPU."""
        return self._results.outputs(self._y, self.tokens)

    def chunk_counts(self) -> np.ndarray:
        """uint32 [ranks here, chunks, E]: rows of each chunk of the last launch, 0 where its gate
        has not run yet."""
        return self._results.chunk_counts()

    def routing(self) -> Routing:
        """Counts and tile plan of the last launch; needs all ranks here."""
        counts = self.chunk_counts()
        return Routing(chunk_counts=counts, tiles=tile_plan(self._shape, counts, self.family))

    def rings(self) -> RingDump:
        """Every actor's ring since construction or ``reset_rings``."""
        options = self.options
        work = Work(
            ranks=options.ranks,
            chunks=self.sms_per_rank,
            experts=self.config.experts,
            top_k=self.config.top_k,
            hidden=self.config.hidden,
            columns=extension().TILE_WEIGHT_ROWS // 2,
            gathers=options.ranks == 1 and options.in_place,
        )
        return self._trace.dump(self._iterations(), work)

    def _iterations(self) -> int:
        """Launches since the rings were emptied."""
        return self._launches - self._iteration_base

    def reset_rings(self) -> None:
        """Empties the rings; iterations restart at 0."""
        self._trace.empty()
        self._iteration_base = self._launches
        self._write_args()

    def flight(self) -> np.ndarray:
        """Flight-recorder slots, also while hung."""
        return self._slots.copy()

    def counts_seen(self) -> np.ndarray:
        """Counts as each rank here holds them, uint32 [ranks here, W, E]: [holder, source, expert].

        0xffffffff where that source's count has not arrived.
        """
        return self._results.counts_seen(self._launches)

    # -- clock ----------------------------------------------------------------------------------

    def clock(self) -> ClockInfo:
        """The GPU's global timer: its step, one record's cost and the SM clock, measured once."""
        if self._clock is None:
            self._clock = measure_clock(self.device)
        return self._clock

    def now_ns(self) -> int:
        """The GPU's global timer at some moment of this call, between launches."""
        if self._asked is None:
            self._asked = GpuClock(self.device)
        return self._asked.now_ns()

    # -- end ------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Clears a sticky abort: signals zero, epoch 0."""
        self._memory.barrier()  # nobody is inside a launch
        for heap in self._heaps:
            heap[: self._layout["pool"]].zero_()
        torch.cuda.synchronize(self.device)
        self._clear_slots()
        self._trace.put_steps_aside(self._iterations(), first=0)
        self._launches = 0
        self._iteration_base = 0
        self._write_args()
        self._memory.barrier()  # nobody begins one before all are clear

    def _clear_slots(self) -> None:
        self._slots.view(np.uint8).fill(0)

    def close(self) -> None:
        """Frees everything; safe to call twice."""
        for name in ("_heaps", "_x", "_y", "_ids", "_routing_weights"):
            setattr(self, name, [])
        for name in ("_weights", "_trace"):
            self.__dict__.pop(name, None)
        self._memory.close()

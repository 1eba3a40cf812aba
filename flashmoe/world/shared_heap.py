"""The heap that all layers of a process share on one GPU, and their launches in it, in order.

A heap has signals, which keep their meaning from launch to launch, and rows (pools, h, results and
what belongs to a launch), which do not.  Layers of one shape share signals, and all layers share
the rows, since one launch runs at a time.  So a heap is as large as its largest layer needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flashmoe.errors import EXIT_HANG, FlashmoeError
from flashmoe.trace import schema
from flashmoe.world import arguments
from flashmoe.world.base import DEADLINE_S, Fault, Status
from flashmoe.world.kernel import (
    LANES,
    Kernel,
    check,
    check_experts,
    even_share,
    launch_shape,
    tiling,
)
from flashmoe.world.tiles import extension

if TYPE_CHECKING:
    from flashmoe.config import MoEConfig, MoEWeights

_POISON_THREADS = 256
_POISON_TYPES = (
    ctypes.c_void_p,  # signals
    ctypes.c_uint64,  # signal_bytes
    ctypes.c_void_p,  # status_word
    ctypes.c_void_p,  # abort_word
    ctypes.c_void_p,  # epoch_word
    ctypes.c_void_p,  # y
    ctypes.c_uint64,  # bytes
    ctypes.c_void_p,  # workspace
    ctypes.c_void_p,  # failed
)

_HEAPS: weakref.WeakValueDictionary[int, SharedHeap] = weakref.WeakValueDictionary()
# Graphs hold addresses and events of the heap they were captured on, and nobody says when they go.
_CAPTURED: set[SharedHeap] = set()
_LOCK = threading.Lock()


@dataclass
class _Place:
    """What launches of one layer shape need of the heap."""

    shape: dict[str, Any]
    layout: dict[str, int]
    signals: torch.Tensor
    kernel: Kernel


def heap_of(device: torch.device) -> SharedHeap:
    """The heap of GPU ``device``, made at the first call.  It lives as long as it is referred to,
    or for ever once a graph was captured on it.

    Raises FlashmoeError (exit code 5) where that GPU is not usable.
    """
    with _LOCK:
        heap = _HEAPS.get(device.index)
        if heap is None:
            heap = _HEAPS[device.index] = SharedHeap(device)
        return heap


def find_heap(device: torch.device) -> SharedHeap | None:
    """The heap of GPU ``device``, if there is one."""
    return _HEAPS.get(device.index)


class SharedHeap:
    """See the module; made by :func:`heap_of`.

    ``workspace``: int64 [1] on the device, how the last launch ended.  It stands for the heap where
    an operator must name what it changes: a compiler may copy what an operator changes, and the
    heap's own words must not be copied back.  ``deadline_s`` and ``faults`` hold for every launch
    from now on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._poison = Kernel(device, "flashmoe_poison")
        self.deadline_s = DEADLINE_S
        self.faults: tuple[Fault, ...] = ()
        properties = torch.cuda.get_device_properties(device)
        self.chunks = even_share(properties.multi_processor_count)
        self.workspace = torch.zeros(1, dtype=torch.int64, device=device)
        self._failed = torch.zeros(1, dtype=torch.int64).pin_memory()
        self._failed_now = self._failed.numpy()
        slots = (self.chunks * LANES, schema.FLIGHT_SLOT.itemsize)
        self._slots = torch.zeros(slots, dtype=torch.uint8).pin_memory()
        self._rows = torch.empty(0, dtype=torch.uint8, device=device)
        self._rows_of_graphs: list[torch.Tensor] = []
        self._places: dict[tuple[MoEConfig, int], _Place] = {}
        self._lock = threading.Lock()
        # External: in a captured graph it becomes nodes that wait and record when the graph runs.
        self._last = torch.cuda.Event(external=True)
        self._last.record(torch.cuda.current_stream(device))
        self._capture: tuple[int, torch.cuda.Event] | None = None

    def __del__(self) -> None:
        # The memory goes back to an allocator that does not know which streams used it.
        with contextlib.suppress(AttributeError, RuntimeError):
            self._last.synchronize()

    # -- memory -----------------------------------------------------------------------------------

    def reserve(self, config: MoEConfig, max_tokens: int, more_bytes: int = 0) -> None:
        """Makes room for launches of this layer with ``max_tokens`` tokens or fewer, in any case.

        Raises FlashmoeError with the bytes needed where the GPU does not hold that and
        ``more_bytes`` besides.  May wait for the GPU.
        """
        with self._lock:
            place = self._places.get((config, max_tokens))
            shape = place.shape if place else self._worst_shape(config, max_tokens)
            layout = extension().heap_layout(shape, in_place=True)
            rows = layout["bytes"] - layout["pool"]
            grown = rows if rows > self._rows.numel() else 0
            signals = 0 if place else layout["pool"]
            self._check_memory(grown, grown + signals + more_bytes, max_tokens)
            if grown:
                self._grow(grown)
            if place is None:
                words = torch.zeros(signals, dtype=torch.uint8, device=self.device)
                torch.cuda.current_stream(self.device).synchronize()  # any stream may use them
                kernel = Kernel.moe(self.device, config, traced=False)
                self._places[config, max_tokens] = _Place(shape, layout, words, kernel)

    def _worst_shape(self, config: MoEConfig, max_tokens: int) -> dict[str, Any]:
        config.validate()
        check_experts(config)
        rows = max_tokens * config.top_k
        if rows >= 1 << 32:
            bytes_ = rows * config.row_bytes  # of the pool alone
            raise FlashmoeError(
                f"a layer of max_tokens {max_tokens} needs more than {bytes_ / 1e9:.0f} GB "
                f"({bytes_} bytes) on the GPU",
                "use a smaller max_tokens",
            )
        shape = launch_shape(
            config,
            ranks=1,
            chunks=self.chunks,
            max_tokens=max_tokens,
            cut=tiling(config, max_tokens),
        )
        return {**shape, "pool_rows": max(8, extension().heap_layout(shape)["worst_pool_rows"])}

    def _check_memory(self, grown: int, needed: int, max_tokens: int) -> None:
        free, _ = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        if grown and self not in _CAPTURED:
            free += self._rows.numel()
        if needed > free:
            raise FlashmoeError(
                f"a layer of max_tokens {max_tokens} needs {needed / 1e9:.1f} GB ({needed} bytes) "
                f"on the GPU and {free / 1e9:.1f} GB are free",
                "use a smaller max_tokens",
            )

    def _grow(self, size: int) -> None:
        torch.cuda.synchronize(self.device)
        before = self._rows.numel()
        if self in _CAPTURED:
            self._rows_of_graphs.append(self._rows)
        self._rows = torch.empty(0, dtype=torch.uint8, device=self.device)
        torch.cuda.empty_cache()  # so that what is free is in one piece
        try:
            self._rows = self._poisoned(size)
        except torch.OutOfMemoryError as exc:
            self._rows = self._poisoned(before)
            raise FlashmoeError(
                f"the GPU did not give {size / 1e9:.1f} GB ({size} bytes) in one piece",
                "use a smaller max_tokens",
            ) from exc
        finally:
            torch.cuda.current_stream(self.device).synchronize()

    def _poisoned(self, size: int) -> torch.Tensor:
        # As in the local world: what the kernel must not rely on is NaN in both dtypes.
        return torch.full((size,), 0xFF, dtype=torch.uint8, device=self.device)

    # -- launches ---------------------------------------------------------------------------------

    def launch(
        self,
        config: MoEConfig,
        max_tokens: int,
        weights: MoEWeights,
        x: torch.Tensor,
        y: torch.Tensor,
        ids: torch.Tensor | None,
        routing_weights: torch.Tensor | None,
        workspace: torch.Tensor,
    ) -> None:
        """One forward of x [T, H] to y [T, H] on torch's current stream, without waiting for it.

        All tensors are contiguous and on this GPU, x and y at multiples of 16 bytes; ids int32 and
        routing_weights float32 [T, k], with external routing.  How it ended goes to ``workspace``.
        Runs after all launches before it, whatever stream they are on.  Raises FlashmoeError where
        an earlier launch is known to have failed, or nothing was reserved.
        """
        self.raise_if_failed()
        place = self._places.get((config, max_tokens))
        if place is None:
            raise FlashmoeError(
                f"no workspace was made for this layer with max_tokens {max_tokens}",
                "make a flashmoe.Workspace(config, max_tokens) first, and keep it",
            )
        if x.shape[0] == 0:
            return
        address = place.signals.data_ptr()
        words = [
            address + place.layout[word] for word in ("status_word", "abort_word", "epoch_word")
        ]
        size = y.numel() * y.element_size()
        signals = (address, place.signals.numel())
        told = (workspace.data_ptr(), self._failed.data_ptr())
        poison = (*signals, *words, y.data_ptr(), size, *told)
        blocks = min(self.chunks, -(-size // (16 * _POISON_THREADS)))
        with self._lock, torch.cuda.device(self.device), self._in_order():
            args = self._pack(place, config, weights, x, y, ids, routing_weights)
            place.kernel.launch_moe(1, self.chunks, args)
            self._poison.launch(blocks, _POISON_THREADS, poison, _POISON_TYPES)

    def _pack(
        self,
        place: _Place,
        config: MoEConfig,
        weights: MoEWeights,
        x: torch.Tensor,
        y: torch.Tensor,
        ids: torch.Tensor | None,
        routing_weights: torch.Tensor | None,
    ) -> ctypes.Array[ctypes.c_char]:
        signals, rows = place.signals.data_ptr(), self._rows.data_ptr()
        base, layout = min(signals, rows), place.layout
        h = rows + layout["h"] - layout["pool"]
        gate, up, down = (t.data_ptr() for t in (weights.gate, weights.up, weights.down))
        maps = {
            **arguments.row_maps(config, rows, h, place.shape["pool_rows"]),
            **arguments.weight_maps(config, up, down),
            **arguments.gate_maps(config, gate, x.data_ptr(), x.shape[0], self.chunks),
        }
        fault = arguments.fault_args(self.faults)
        return arguments.pack(
            place.shape,
            [base],
            [arguments.rank_args(maps, weights, x, y, ids, routing_weights)],
            deadline_s=self.deadline_s,
            first_deadline_s=None,
            slots=self._slots.data_ptr(),
            fault=fault,
            signals_at=signals - base,
            rows_at=rows - base,
            by_units=fault[0] == arguments.NONE,
        )

    @contextlib.contextmanager
    def _in_order(self) -> Iterator[None]:
        """What the body launches on the current stream runs after all before and before all after.

        Where the stream is being captured, so does each replay of the graph, by nodes that wait for
        and record the heap's event; only the first launch of a capture has to wait by a node.
        """
        stream = torch.cuda.current_stream(self.device)
        capture = _capture_id(stream)
        if capture is not None:
            _CAPTURED.add(self)
        if self._capture is not None and self._capture[0] == capture:
            self._capture[1].wait(stream)
        else:
            self._last.wait(stream)
        yield
        self._last.record(stream)
        if capture is not None:
            within = torch.cuda.Event()
            within.record(stream)
            self._capture = capture, within

    # -- outcome ----------------------------------------------------------------------------------

    def raise_if_failed(self) -> None:
        """Raises FlashmoeError if a launch that has ended since ``reset`` failed.  Never waits."""
        status = int(self._failed_now[0]) & 0xFFFFFFFF
        if status == Status.OK:
            return
        after = "then call reset(), which makes the layers of this GPU usable again"
        if status == Status.BAD_IDS:
            raise FlashmoeError(
                "a call was given expert ids that are out of range or twice in a token; "
                "its output is NaN",
                f"give each token distinct ids of 0 to E - 1; {after}",
            )
        if status == Status.HANG:
            raise FlashmoeError(
                f"a launch waited {self.deadline_s:g} s in vain and gave up; its output is NaN",
                f"see `flashmoe doctor` and whether `flashmoe run` hangs too; {after}",
                EXIT_HANG,
            )
        raise FlashmoeError(
            f"a launch ended with the status {Status(status).name}; its output is NaN",
            f"please report this; {after}",
        )

    def check(self) -> None:
        """Waits for the GPU; raises FlashmoeError if a launch since ``reset`` failed."""
        torch.cuda.synchronize(self.device)
        self.raise_if_failed()

    def reset(self) -> None:
        """Waits for the GPU and clears a failure: signals zero, epoch 0."""
        torch.cuda.synchronize(self.device)
        for place in self._places.values():
            place.signals.zero_()
        self.workspace.zero_()
        torch.cuda.synchronize(self.device)
        self._slots.zero_()
        self._failed.zero_()


def _capture_id(stream: torch.cuda.Stream) -> int | None:
    """A number for the capture that ``stream`` takes part in, or None."""
    if not torch.cuda.is_current_stream_capturing():
        return None
    from cuda.bindings import driver

    values = check(driver.cuStreamGetCaptureInfo(stream.cuda_stream), "asking for the capture")
    return int(values[1])

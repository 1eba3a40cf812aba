"""The heap that layers share, on a GPU that only counts what is asked of it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashmoe.config import MoEConfig, MoEWeights
from flashmoe.errors import FlashmoeError
from flashmoe.weights import random_weights
from flashmoe.world import shared_heap
from flashmoe.world.base import Fault, Status
from flashmoe.world.shared_heap import SharedHeap, find_heap, heap_of

pytest.importorskip("flashmoe._host")

CONFIG = MoEConfig(64, 96, 8, 2)
WIDE = replace(CONFIG, hidden=128)
DEVICE = torch.device("cpu", 0)


@dataclass
class Gpu:
    """What the heap did to the GPU, and what that has to give."""

    free: int = 1 << 30
    stream: str = "main"
    capture: int | None = None
    done: list[tuple[Any, ...]] = field(default_factory=list)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    gpu = Gpu()

    class Event:
        made = 0

        def __init__(self, external: bool = False) -> None:
            Event.made += 1
            self.name = "heap" if external else f"within {gpu.capture}"

        def record(self, stream: Any) -> None:
            gpu.done.append(("record", self.name, gpu.stream))

        def wait(self, stream: Any) -> None:
            gpu.done.append(("wait", self.name, gpu.stream))

        def synchronize(self) -> None:
            gpu.done.append(("synchronize", self.name))

    class Kernel:
        def __init__(self, device: torch.device, name: str) -> None:
            self.name = name

        @classmethod
        def moe(cls, device: torch.device, config: MoEConfig, traced: bool) -> Kernel:
            assert not traced
            return cls(device, "moe")

        def launch_moe(self, ranks: int, chunks: int, args: Any) -> None:
            gpu.done.append((self.name, gpu.stream, ranks * chunks, args.raw))

        def launch(self, blocks: int, threads: int, values: Any, types: Any) -> None:
            assert len(values) == len(types)
            gpu.done.append((self.name, gpu.stream, values))

    cuda = SimpleNamespace(
        Event=Event,
        synchronize=lambda device: None,
        current_stream=lambda device: SimpleNamespace(synchronize=lambda: None),
        device=lambda device: contextlib.nullcontext(),
        empty_cache=lambda: None,
        mem_get_info=lambda device: (gpu.free, 1 << 30),
        memory_reserved=lambda device: 0,
        memory_allocated=lambda device: 0,
        get_device_properties=lambda device: SimpleNamespace(multi_processor_count=4),
        Stream=object,
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(shared_heap, "Kernel", Kernel)
    monkeypatch.setattr(shared_heap, "_capture_id", lambda stream: gpu.capture)
    monkeypatch.setattr("flashmoe.world.arguments.encode_tensor_map", lambda *_, **__: bytes(128))
    monkeypatch.setattr(shared_heap, "_CAPTURED", set())
    monkeypatch.setattr(shared_heap, "_HEAPS", weakref.WeakValueDictionary())
    yield gpu


def call(heap: SharedHeap, config: MoEConfig, max_tokens: int, tokens: int = 3) -> torch.Tensor:
    weights: MoEWeights = random_weights(config)
    x = torch.zeros(tokens, config.hidden, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    heap.launch(config, max_tokens, weights, x, y, None, None, heap.workspace)
    return y


def rows(heap: SharedHeap) -> int:
    return heap._rows.numel()


def test_layers_share_the_rows_and_only_a_larger_one_grows_them(gpu: Gpu) -> None:
    heap = heap_of(DEVICE)
    heap.reserve(CONFIG, 100)
    first = heap._rows
    heap.reserve(CONFIG, 100)
    heap.reserve(replace(CONFIG, intermediate=48), 100)
    heap.reserve(CONFIG, 10)
    assert heap._rows is first
    heap.reserve(WIDE, 100)
    assert rows(heap) > first.numel()
    layout = heap._places[WIDE, 100].layout
    assert rows(heap) == layout["bytes"] - layout["pool"]
    assert heap_of(DEVICE) is heap


def test_the_pool_is_that_of_the_worst_case(gpu: Gpu) -> None:
    heap = heap_of(DEVICE)
    heap.reserve(CONFIG, 100)
    assert heap._places[CONFIG, 100].shape["pool_rows"] == 100 * CONFIG.top_k


def test_what_does_not_fit_is_told_in_bytes_before_anything_changes(gpu: Gpu) -> None:
    heap = heap_of(DEVICE)
    heap.reserve(CONFIG, 100)
    before = heap._rows
    gpu.free = 1 << 20
    with pytest.raises(
        FlashmoeError, match=r"max_tokens 100000 needs .* \((\d+) bytes\)"
    ) as caught:
        heap.reserve(CONFIG, 100_000)
    needed = int(caught.value.message.split("(")[1].split()[0])
    assert needed > 100_000 * CONFIG.top_k * CONFIG.row_bytes
    assert heap._rows is before and (CONFIG, 100_000) not in heap._places
    heap.reserve(CONFIG, 10)
    with pytest.raises(FlashmoeError, match="needs"):
        heap.reserve(CONFIG, 10, more_bytes=2 << 20)
    with pytest.raises(FlashmoeError, match=r"needs more than \d+ GB"):
        heap.reserve(CONFIG, 1 << 40)


def test_growing_may_use_what_it_frees_unless_a_graph_holds_it(gpu: Gpu) -> None:
    heap = heap_of(DEVICE)
    heap.reserve(CONFIG, 1000)
    gpu.free = 500_000
    assert rows(heap) > 500_000
    heap.reserve(CONFIG, 1200)  # larger by less than what is free
    before = heap._rows
    gpu.capture = 7
    call(heap, CONFIG, 1000)
    gpu.capture = None
    with pytest.raises(FlashmoeError, match="needs"):
        heap.reserve(CONFIG, 1400)
    gpu.free = 1 << 30
    heap.reserve(CONFIG, 1400)
    assert heap._rows is not before
    assert any(kept is before for kept in heap._rows_of_graphs)


def test_the_heap_goes_with_its_last_user_unless_a_graph_holds_it(gpu: Gpu) -> None:
    heap = heap_of(DEVICE)
    heap.reserve(CONFIG, 10)
    del heap
    assert find_heap(DEVICE) is None
    assert gpu.done[-1] == ("synchronize", "heap"), "its memory must be idle when it goes"
    heap = heap_of(DEVICE)
    heap.reserve(CONFIG, 10)
    gpu.capture = 1
    call(heap, CONFIG, 10)
    gpu.capture = None
    del heap
    assert find_heap(DEVICE) is not None


def test_every_call_waits_for_the_one_before_and_is_waited_for(gpu: Gpu) -> None:
    heap = heap_of(DEVICE)
    heap.reserve(CONFIG, 10)
    gpu.done.clear()
    call(heap, CONFIG, 10)
    gpu.stream = "other"
    call(heap, CONFIG, 10)
    assert [entry[:2] for entry in gpu.done] == [
        *(("wait", "heap"), ("moe", "main"), ("flashmoe_poison", "main"), ("record", "heap")),
        *(("wait", "heap"), ("moe", "other"), ("flashmoe_poison", "other"), ("record", "heap")),
    ]


def test_a_capture_waits_by_a_node_once_and_orders_its_own_streams(gpu: Gpu) -> None:
    heap = heap_of(DEVICE)
    heap.reserve(CONFIG, 10)
    gpu.done.clear()
    for capture in (5, 5, 6, None):
        gpu.capture = capture
        call(heap, CONFIG, 10)
    events = [entry[:2] for entry in gpu.done if entry[0] in ("wait", "record")]
    assert events == [
        *(("wait", "heap"), ("record", "heap"), ("record", "within 5")),
        *(("wait", "within 5"), ("record", "heap"), ("record", "within 5")),
        *(("wait", "heap"), ("record", "heap"), ("record", "within 6")),
        *(("wait", "heap"), ("record", "heap")),
    ]


def test_no_token_no_launch(gpu: Gpu) -> None:
    heap = heap_of(DEVICE)
    heap.reserve(CONFIG, 10)
    gpu.done.clear()
    call(heap, CONFIG, 10, tokens=0)
    assert not gpu.done


def test_a_call_that_nothing_was_reserved_for_is_refused(gpu: Gpu) -> None:
    heap = heap_of(DEVICE)
    heap.reserve(CONFIG, 10)
    with pytest.raises(FlashmoeError, match=r"no workspace .* max_tokens 11"):
        call(heap, CONFIG, 11)


@pytest.mark.parametrize(
    ("status", "message", "exit_code"),
    [
        (Status.BAD_IDS, "expert ids", 1),
        (Status.HANG, "waited 2.5 s in vain", 124),
        (Status.OVERFLOW, "OVERFLOW", 1),
    ],
)
def test_a_failure_is_raised_until_reset(
    gpu: Gpu, status: Status, message: str, exit_code: int
) -> None:
    heap = heap_of(DEVICE)
    heap.reserve(CONFIG, 10)
    heap.deadline_s = 2.5
    call(heap, CONFIG, 10)
    heap.check()
    heap._failed[0] = int(status) | 77 << 32  # as the GPU leaves it
    for ask in (heap.check, lambda: call(heap, CONFIG, 10)):
        with pytest.raises(FlashmoeError, match=message) as caught:
            ask()
        assert caught.value.exit_code == exit_code
        assert "reset()" in caught.value.hint
    heap._places[CONFIG, 10].signals.fill_(1)
    heap.reset()
    heap.check()
    assert not heap._places[CONFIG, 10].signals.any()
    call(heap, CONFIG, 10)


def test_a_fault_is_in_the_arguments(gpu: Gpu) -> None:
    heap = heap_of(DEVICE)
    heap.reserve(CONFIG, 10)
    call(heap, CONFIG, 10)
    heap.faults = (Fault("lost-signal", rank=0, expert=3),)
    call(heap, CONFIG, 10)
    plain, faulty = (entry[3] for entry in gpu.done if entry[0] == "moe")
    at = plain.index(b"\xff" * 8)  # of no rank and no expert
    assert faulty[at : at + 8] == b"".join(n.to_bytes(4, "little") for n in (0, 3))


def test_signals_and_rows_lie_where_the_arguments_say(gpu: Gpu) -> None:
    """The layout that the kernel is given leads to each shape's signals and to the shared rows."""
    heap = heap_of(DEVICE)
    heap.reserve(CONFIG, 10)
    heap.reserve(WIDE, 10)
    for config in (CONFIG, WIDE):
        call(heap, config, 10)
        place, args = heap._places[config, 10], gpu.done[-3][3]
        layout, signals, shared = place.layout, place.signals.data_ptr(), heap._rows.data_ptr()
        base = min(signals, shared)
        sections = [n for n in layout if n not in ("signal_bytes", "table_words")]
        sections = sections[: sections.index("bytes")]
        expected = [
            (signals if layout[n] < layout["pool"] else shared - layout["pool"]) + layout[n] - base
            for n in sections
        ]
        words = b"".join(at.to_bytes(8, "little") for at in expected)
        assert words in args
        assert base.to_bytes(8, "little") in args

"""What the engine of GPUs finds in its heaps, on the CPU: which words count, and which are none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flashmoe._host")

from flashmoe.config import MoEConfig
from flashmoe.errors import FlashmoeError
from flashmoe.trace import schema
from flashmoe.trace.diagnosis import NOT_SEEN
from flashmoe.world.base import EngineOptions, Launch, Status
from flashmoe.world.gpu_engine import GpuEngine
from flashmoe.world.gpu_results import HeapReader, read_rings
from flashmoe.world.kernel import launch_shape, untuned
from flashmoe.world.tiles import extension

CONFIG = MoEConfig(64, 96, experts=8, top_k=2)
RANKS, CHUNKS, TOKENS = 2, 4, 64


def overflown() -> GpuEngine:
    """An engine that no GPU has, one rank's, whose launches need a larger pool."""
    engine: Any = GpuEngine.__new__(GpuEngine)
    shape = launch_shape(CONFIG, RANKS, CHUNKS, TOKENS, untuned(CONFIG, TOKENS))
    engine._shape = shape | {"pool_rows": 64}
    engine.config, engine.options = CONFIG, EngineOptions(ranks=RANKS)
    engine._layout = extension().heap_layout(engine._shape)
    engine._heaps = [torch.zeros(engine._layout["bytes"], dtype=torch.uint8)]
    engine.local, engine.tokens, engine.sms_per_rank = range(1), (TOKENS, TOKENS), CHUNKS
    engine.device, engine._fixed_pool = torch.device("cpu"), False
    engine._launches, engine._iteration_base = 1, 0
    engine._memory = SimpleNamespace(free=lambda: None)
    engine._launch_once = lambda: Launch(Status.OVERFLOW, 1.0, 0, 4096)
    return engine  # type: ignore[no-any-return]


def test_a_pool_that_cannot_grow_leaves_no_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = overflown()
    assert (engine.counts_seen()[0] == NOT_SEEN).all()  # of epoch 1 none has come
    assert engine.chunk_counts().shape == (1, CHUNKS, CONFIG.experts)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1000, 1000))
    with pytest.raises(FlashmoeError, match="routing sends 4096 rows to one rank"):
        engine.launch()
    # The old heaps are gone by then, and the report of the failure asks all the same.
    assert engine.counts_seen().shape == (1, RANKS, CONFIG.experts)
    assert (engine.counts_seen() == NOT_SEEN).all()
    assert engine.chunk_counts().shape == (1, CHUNKS, CONFIG.experts)
    assert not engine.chunk_counts().any()


def heaps(count: int = 1) -> tuple[HeapReader, list[np.ndarray]]:
    """Heaps as they are before a first launch, and each as 64-bit words: zeros, then poison."""
    shape = launch_shape(CONFIG, RANKS, CHUNKS, TOKENS, untuned(CONFIG, TOKENS))
    shape["pool_rows"] = 64
    layout = extension().heap_layout(shape)
    made = [torch.full((layout["bytes"],), 0xFF, dtype=torch.uint8) for _ in range(count)]
    for heap in made:
        heap[: layout["pool"]] = 0
    words = [heap.numpy()[: layout["bytes"] // 8 * 8].view(np.uint64) for heap in made]
    return HeapReader(made, layout, shape, range(RANKS - count, RANKS)), words


def test_a_count_is_one_of_its_own_launch_alone() -> None:
    reader, (words,) = heaps()
    each = RANKS * CONFIG.experts
    at = reader.layout["counts"] // 8
    even, odd = words[at : at + each], words[at + each : at + 2 * each]
    assert (reader.counts_seen(1) == NOT_SEEN).all()
    odd[:] = np.arange(each, dtype=np.uint64) | np.uint64(1 << 32)
    even[:] = np.arange(each, dtype=np.uint64) + np.uint64(100) | np.uint64(2 << 32)
    due = np.arange(each).reshape(1, RANKS, CONFIG.experts)
    assert (reader.counts_seen(1) == due).all()
    assert (reader.counts_seen(2) == due + 100).all()
    # Launch 3 takes launch 1's half: of its counts only two have come.
    odd[[0, each - 1]] = np.uint64(3 << 32), np.uint64(7 | 3 << 32)
    seen = reader.counts_seen(3).reshape(-1)
    assert (seen[0], seen[-1]) == (0, 7)
    assert (seen[1:-1] == NOT_SEEN).all()
    assert seen.dtype == np.uint32


def test_rows_of_a_chunk_that_holds_poison_are_none() -> None:
    reader, (_, words) = heaps(2)
    assert reader.chunk_counts().dtype == np.uint32
    assert (reader.chunk_counts() == 0).all()
    at = reader.layout["histogram"]
    rows = words.view(np.uint32)[at // 4 : at // 4 + CHUNKS * CONFIG.experts]
    rows = rows.reshape(CHUNKS, CONFIG.experts)
    most = TOKENS // CHUNKS * CONFIG.top_k
    rows[0], rows[1], rows[2] = 0, 0, 0xFFFFFFFF
    rows[0, 3], rows[1, 3] = most, most + 1
    rows[3] = 1
    counts = reader.chunk_counts()
    assert not counts[0].any()
    assert counts[1].sum(axis=1).tolist() == [most, 0, 0, CONFIG.experts]


def test_words_and_results_lie_where_the_layout_says() -> None:
    reader, (first, second) = heaps(2)
    at = reader.layout["status_word"] // 8
    first[at], second[at] = 2 | 4096 << 32, 1
    assert (reader.word(0, "status_word"), reader.word(1, "status_word")) == (2 | 4096 << 32, 1)
    tokens = (3, 5)
    ids = second.view(np.int32)[reader.layout["ids"] // 4 :][: 5 * CONFIG.top_k]
    ids[:] = np.arange(len(ids))
    weights = second.view(np.float32)[reader.layout["weights"] // 4 :][: len(ids)]
    weights[:] = 0.5
    y = [torch.zeros(t, CONFIG.hidden, dtype=torch.bfloat16) for t in tokens]
    _, out = reader.outputs(y, tokens)
    assert out.y.shape == (5, CONFIG.hidden)
    assert out.ids.tolist() == np.arange(10).reshape(5, 2).tolist()
    assert out.weights.shape == (5, 2) and (out.weights == 0.5).all()


@pytest.mark.parametrize(("counts", "stored"), [([0, 0], 0), ([3, 1], 3), ([2, 99], 4)])
def test_rings_are_read_as_far_as_they_are_filled(counts: list[int], stored: int) -> None:
    headers = np.zeros(2, schema.RING_HEADER)
    headers["count"] = counts
    records = np.zeros((2, 4), schema.RECORD)
    records["t0_ns"] = np.arange(8).reshape(2, 4)

    def as_bytes(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.view(np.uint8).reshape(*array.shape, -1))

    dump = read_rings(as_bytes(headers), as_bytes(records), 4)
    assert dump.headers["count"].tolist() == counts
    assert dump.records["t0_ns"].tolist() == records["t0_ns"][:, :stored].tolist()
    none = read_rings(as_bytes(headers)[:0], as_bytes(records)[:0], 4)  # an untraced engine's
    assert none.records.shape == (0, 0)

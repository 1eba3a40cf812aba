"""What the engine of GPUs finds in its heaps, on the CPU: which words count, and which are none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("flashmoe._host")

from flashmoe.config import MoEConfig
from flashmoe.errors import FlashmoeError
from flashmoe.trace.diagnosis import NOT_SEEN
from flashmoe.world.base import EngineOptions, Launch, Status
from flashmoe.world.gpu_engine import GpuEngine
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

"""How large pools, rings and memory are made."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("flashmoe._host")

import torch
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.config import MoEConfig
from flashmoe.trace import schema
from flashmoe.weights import random_weights
from flashmoe.world import host, sizing
from flashmoe.world.base import EngineOptions
from flashmoe.world.gpu_engine import GpuEngine
from flashmoe.world.kernel import launch_shape, untuned

UNEVEN = MoEConfig(64, 96, experts=5, top_k=2)  # of four ranks one owns two of them


def test_the_worst_case_is_taken_while_it_is_small_beside_the_memory() -> None:
    def rows(heaps: int, memory: int | None, worst: int = 800) -> int:
        return sizing.pool_rows(UNEVEN, 4, 800, worst, heaps, memory)

    assert rows(1 << 20, None) == 800
    assert rows(1 << 20, 1 << 22) == 800
    assert rows(1 + (1 << 20), 1 << 22) == 640
    assert rows(1 + (1 << 20), 1 << 22, worst=600) == 600


@given(st.integers(1, 64), st.integers(1, 16), st.integers(0, 10_000))
def test_no_rank_is_expected_to_get_more_than_half_its_pool(e: int, ranks: int, rows: int) -> None:
    config = MoEConfig(64, 64, experts=e, top_k=1)
    given = sizing.pool_rows(config, ranks, rows, 1 << 40, 1, 0)
    owned = max((r + 1) * e // ranks - r * e // ranks for r in range(ranks))
    assert 2 * rows * owned <= given * e < 2 * rows * owned + e


def gpu_shape(memory: int) -> dict[str, Any]:
    """Of an engine of four ranks that no GPU has."""
    engine: Any = GpuEngine.__new__(GpuEngine)
    engine.config, engine.options, engine.tokens = UNEVEN, EngineOptions(ranks=4), (100,) * 4
    engine.sms_per_rank, engine.on_gpu, engine._cut = 2, 4, untuned(UNEVEN, 100)
    shape: dict[str, Any] = engine._make_shape(None, memory)
    return shape


@pytest.mark.parametrize(("memory", "rows"), [(0, 640), (1 << 40, 800)])
def test_both_engines_make_pools_alike(
    monkeypatch: pytest.MonkeyPatch, memory: int, rows: int
) -> None:
    monkeypatch.setattr(host, "available_bytes", lambda: memory)
    monkeypatch.setattr(host, "_require_memory", lambda _: None)
    options = EngineOptions(ranks=4, sms_per_rank=1)
    engine = host.HostEngine(UNEVEN, random_weights(UNEVEN), [100] * 4, options)
    assert engine.shape["pool_rows"] == gpu_shape(memory)["pool_rows"] == rows
    engine.close()


@pytest.mark.parametrize(("tokens", "most"), [(16, False), (1 << 15, True)])
def test_rings_hold_launches_and_have_an_end(tokens: int, most: bool) -> None:
    config = MoEConfig(256, 256, experts=8, top_k=2)
    shape = launch_shape(config, 2, 4, tokens, untuned(config, tokens))
    found = sizing.ring_capacity(config, (tokens, tokens), shape, 2)
    assert (found == sizing.MOST_RECORDS) == most
    assert found % sizing.LAUNCHES_PER_RING == 0
    assert found <= sizing.ring_capacity(config, (tokens, tokens + 64), shape, 2)
    # A tile is a record or more of each lane.
    tiles = sizing.image_capacity(config, (tokens, tokens), shape)
    assert tiles <= found
    assert (tiles == sizing.tiles_of(sizing.MOST_RECORDS)) == most
    launches = min(sizing.launches_of(found), sizing.MOST_LAUNCHES)
    room = sizing.trace_room(config, (tokens, tokens), shape, 2, None)
    assert room == sizing.TraceRoom(found, tiles, launches)
    # Asked for, all follows the rings.
    room = sizing.trace_room(config, (tokens, tokens), shape, 2, 1 << 20)
    assert room == sizing.TraceRoom(1 << 20, 1 << 18, 1 << 17)


@pytest.mark.parametrize("capacity", [1, 7, 8, 1000])
def test_images_take_no_more_than_the_rings_beside_them(capacity: int) -> None:
    tiles, launches = sizing.tiles_of(capacity), sizing.launches_of(capacity)
    assert 1 <= launches <= tiles <= max(1, capacity // 4)
    assert launches.bit_count() == 1
    rings = sizing.TraceRoom(capacity, 0, 0).bytes_of(10)
    assert sizing.TraceRoom(capacity, tiles, launches).bytes_of(10) < 2 * rings


def test_bytes_on_a_gpu_are_those_of_its_tensors() -> None:
    x = torch.empty(7 + 9, UNEVEN.hidden, dtype=torch.bfloat16)
    due = 2 * 1000 + 2 * x.numel() * x.element_size()
    assert sizing.gpu_bytes(UNEVEN, (7, 9), 1000) == due
    ring = schema.RING_HEADER.itemsize + 11 * schema.RECORD.itemsize
    steps = (17 + 1) * schema.STEP_IMAGE.itemsize
    due = 5 * (6 * (ring + steps) + 13 * schema.TILE_IMAGE.itemsize + 16)
    assert sizing.TraceRoom(11, 13, 17).bytes_of(5) == due

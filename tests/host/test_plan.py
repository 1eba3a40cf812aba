"""What the extension derives through csrc/core: heap layout, tile plan, launch arguments."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.trace import schema
from flashmoe.world.tiles import extension, tile_plan

_host = extension()

SECTIONS = [
    "abort_word",
    "epoch_word",
    "status_word",
    "barrier",
    "exits",
    "next_tile",
    "counts",
    "rows_ready",
    "h_ready",
    "y_ready",
    "returned",
    "pool",
    "ret",
    "h",
    "ids",
    "weights",
    "slots",
    "sorted",
    "results",
    "histogram",
    "chunk_rows",
    "tables",
]


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    experts = draw(st.integers(1, 20))
    return {
        "world": draw(st.integers(1, 8)),
        "experts": experts,
        "top_k": draw(st.integers(1, experts)),
        "hidden": 8 * draw(st.integers(1, 40)),
        "inter": 8 * draw(st.integers(1, 40)),
        "max_tokens": draw(st.integers(0, 200)),
        "pool_rows": draw(st.integers(1, 500)),
        "chunks": draw(st.integers(1, 5)),
        "tile_m": draw(st.sampled_from([16, 48, 128])),
        "tile_step": draw(st.sampled_from([1, 8, 16])),
        "tile_n1": draw(st.sampled_from([32, 128])),
        "tile_n2": draw(st.sampled_from([64, 256])),
        "wave_experts": draw(st.integers(1, 6)),
        "activation": draw(st.sampled_from(["swiglu", "relu"])),
        "routing": "softmax",
        "renormalize": True,
        "scale": 1.0,
        "groups": 1,
        "top_groups": 1,
    }


@given(shapes())
def test_sections_of_the_heap_follow_each_other(shape: dict[str, Any]) -> None:
    layout = _host.heap_layout(shape)
    world, experts, chunks = shape["world"], shape["experts"], shape["chunks"]
    sent = shape["max_tokens"] * shape["top_k"]
    tiles = 16 * layout["max_pool_tiles"]
    sizes = dict.fromkeys(SECTIONS[:5], 8) | {
        "next_tile": 256,
        "counts": 16 * world * experts,
        "rows_ready": tiles,
        "h_ready": tiles,
        "y_ready": tiles,
        "returned": 8 * layout["max_global_tiles"],
        "pool": 2 * shape["pool_rows"] * shape["hidden"],
        "ret": 2 * sent * shape["hidden"],
        "h": 2 * shape["pool_rows"] * shape["inter"],
        "ids": 4 * sent,
        "weights": 4 * sent,
        "slots": 4 * sent,
        "sorted": 4 * sent,
        "results": 16 * sent,
        "histogram": 4 * chunks * experts,
        "chunk_rows": 4 * chunks * experts,
        "tables": 4 * chunks * layout["table_words"],
    }
    for name, after in zip(SECTIONS, [*SECTIONS[1:], "bytes"], strict=True):
        assert layout[name] + sizes[name] <= layout[after], name
        assert layout[name] % 128 == 0, name
    assert layout["signal_bytes"] == layout["pool"]


@pytest.mark.parametrize(("world", "tokens"), [(1, 64), (2, 64), (1, 1 << 26)])
def test_a_rank_alone_whose_rows_stay_in_x_has_no_pool(world: int, tokens: int) -> None:
    shape = shape_of(world=world, max_tokens=tokens)
    whole, placed = _host.heap_layout(shape), _host.heap_layout(shape, in_place=True)
    gathers = world == 1 and tokens <= 0x7FFFFFFF // shape["hidden"]
    assert gathers == (tokens == 64 and world == 1)
    pool = whole["ret"] - whole["pool"]
    assert pool >= 2 * shape["pool_rows"] * shape["hidden"]
    saved = pool if gathers else 0
    assert placed["signal_bytes"] == whole["signal_bytes"]
    assert whole["bytes"] - placed["bytes"] == saved
    assert whole["h"] - placed["h"] == saved


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_tables_of_128_experts_fit_shared_memory(world: int) -> None:
    """A scheduler asks them a dozen times a tile, and out of the heap each answer comes from L2."""
    header = Path(__file__).resolve().parents[2] / "csrc" / "device" / "cta.h"
    limit = re.search(r"kTableWords = (\d+);", header.read_text())
    assert limit is not None
    shape = shape_of(world=world, experts=128)
    assert _host.heap_layout(shape)["table_words"] <= int(limit[1])


def in_pairs(rows: int, columns: int) -> list[tuple[int, int]]:
    """(column, row tile) of a segment in order: tiles 2i and 2i + 1 share their column where they
    can; of an odd number of row tiles, the last ones of two columns make a pair."""
    order = []
    for col in range(0, columns, 2):
        two = [c for c in (col, col + 1) if c < columns]
        together = rows if rows % 2 == 0 or len(two) == 1 else rows - 1
        order += [(c, j) for c in two for j in range(together)]
        order += [(c, j) for j in range(together, rows) for c in two]
    return order


def expected_tiles(shape: dict[str, Any], counts: np.ndarray) -> list[tuple[int, ...]]:
    """The plan, derived the plain way: (rank, gemm, expert, row tile, global, column, rows,
    height, columns)."""
    world, experts, wave = shape["world"], shape["experts"], shape["wave_experts"]
    rows = counts.sum(axis=(0, 1))
    step = shape["tile_step"]
    # As few tiles as tile_m allows, all of one height, a multiple of the step.
    heights = [-(-r // max(-(-r // shape["tile_m"]), 1) // step) * step or step for r in rows]
    row_tiles = [-(-r // height) for r, height in zip(rows, heights, strict=True)]
    before = np.concatenate([[0], np.cumsum(row_tiles)])
    found = []
    for rank in range(world):
        own = list(range(rank * experts // world, (rank + 1) * experts // world))
        waves = [own[i : i + wave] for i in range(0, len(own), wave)]
        order = []
        for i in range(len(waves) + 1):
            order += [(1, e) for e in waves[i]] if i < len(waves) else []
            order += [(2, e) for e in waves[i - 1]] if i > 0 else []
        for gemm, e in order:
            width, columns = (
                (shape["inter"], shape["tile_n1"])
                if gemm == 1
                else (shape["hidden"], shape["tile_n2"])
            )
            for col, j in in_pairs(row_tiles[e], -(-width // columns)):
                left = min(heights[e], rows[e] - j * heights[e])
                cols = min(columns, width - col * columns)
                at = before[e] + j
                # Whole steps, but half a step is enough for so few rows.
                height = -(-left // step) * step
                height = step // 2 if left <= step // 2 else height
                place = (rank, gemm, e, at - before[own[0]], at, col)
                found.append((*place, left, height, cols))
    return [tuple(int(v) for v in t) for t in found]


@settings(max_examples=60, deadline=None)
@given(shapes(), st.integers(0, 2**32 - 1))
def test_plan_is_the_order_of_waves(shape: dict[str, Any], seed: int) -> None:
    random = np.random.default_rng(seed)
    size = (shape["world"], shape["chunks"], shape["experts"])
    counts = random.integers(0, 40, size) * random.integers(0, 2, size)
    tiles = tile_plan(shape, counts.astype(np.uint32), "a-family")
    names = ["rank", "gemm", "expert", "row_tile", "row_tile_global", "col_tile"]
    names += ["rows", "height", "cols"]
    assert [tuple(int(t[n]) for n in names) for t in tiles] == expected_tiles(shape, counts)
    for rank in range(shape["world"]):
        mine = tiles[tiles["rank"] == rank]
        assert mine["tile"].tolist() == list(range(len(mine)))
    depth = np.where(tiles["gemm"] == 1, shape["hidden"], shape["inter"])
    assert (tiles["depth"] == depth).all()
    assert set(tiles["family"]) <= {"a-family"}


@pytest.mark.parametrize(
    ("step", "heights"),
    [
        (16, {1: 8, 8: 8, 9: 16, 16: 16, 17: 32, 100: 112, 176: 176}),  # the GPU kernel's products
        (64, {1: 32, 32: 32, 33: 64, 64: 64, 65: 128, 128: 128}),  # the same in fp16
        (1, {1: 1, 7: 7, 16: 16, 100: 100}),  # the host engine's
    ],
)
def test_a_tile_computes_its_rows_and_what_rounds_them_up(
    step: int, heights: dict[int, int]
) -> None:
    shape = shape_of(world=1, experts=1, top_k=1, tile_m=max(heights), tile_step=step)
    for rows, height in heights.items():
        tiles = tile_plan(shape, np.full((1, 1, 1), rows, np.uint32), "")
        assert (set(tiles["rows"]), set(tiles["height"])) == ({rows}, {height})


@settings(max_examples=60, deadline=None)
@given(shapes(), st.integers(0, 2**32 - 1))
def test_no_tile_waits_for_one_handed_out_later(shape: dict[str, Any], seed: int) -> None:
    size = (shape["world"], shape["chunks"], shape["experts"])
    counts = np.random.default_rng(seed).integers(0, 30, size).astype(np.uint32)
    tiles = tile_plan(shape, counts, "")
    for rank in range(shape["world"]):
        mine = tiles[tiles["rank"] == rank]
        first, second = mine[mine["gemm"] == 1], mine[mine["gemm"] == 2]
        last_up = np.full(int(mine["row_tile"].max(initial=0)) + 1, -1)
        np.maximum.at(last_up, first["row_tile"], first["tile"].astype(np.int64))
        assert (last_up[second["row_tile"]] < second["tile"]).all()


def shape_of(**changes: Any) -> dict[str, Any]:
    base = {
        "world": 2, "experts": 4, "top_k": 2, "hidden": 64, "inter": 64, "max_tokens": 8,
        "pool_rows": 32, "chunks": 2, "tile_m": 16, "tile_step": 8, "tile_n1": 32,
        "tile_n2": 64, "wave_experts": 2, "activation": "swiglu", "routing": "softmax",
        "renormalize": True, "scale": 1.0, "groups": 1, "top_groups": 1,
    }  # fmt: skip
    return base | changes


RANK_ARGS = {
    "map_pool": b"p" * 512, "map_h": b"h" * 512, "map_up": b"u" * 128, "map_down": b"d" * 128,
    "map_up_unit": b"v" * 128, "map_down_unit": b"e" * 128,
    "map_x": b"x" * 128, "map_gate": b"g" * 128,
    "map_x_slice": b"X" * 128, "map_gate_slice": b"G" * 128,
    "x": 0x1111, "bias": 0, "y": 0x4444, "ids": 0, "weights": 0,
    "rank": 1, "tokens": 7, "gate_box_tokens": 8,
}  # fmt: skip


def launch_args(shape: dict[str, Any], in_place: bool = True, **changes: Any) -> bytes:
    """LaunchArgs of one local rank."""
    none = 0xFFFFFFFF
    heaps = [0x100000, 0x200000][: shape["world"]]
    packed: bytes = _host.launch_args(
        shape, heaps, [RANK_ARGS | changes], 1, 100, True, 3, 10, 40, 0x5555, 0x6666, 0x7777,
        0x8888, 0x9999, 0xAAAA, 50, 16, (none, none, none), in_place=in_place,
    )  # fmt: skip
    return packed


def test_launch_args_hold_what_they_were_given() -> None:
    def pack(world: int = 2, in_place: bool = True, **changes: Any) -> bytes:
        return launch_args(shape_of(world=world), in_place, **changes)

    whole = pack()
    assert pack() == whole  # padding included
    assert not any(whole[:16])  # where the code lies is told by whoever launches
    at = whole.index(b"p" * 512)
    ones = (b"u", b"d", b"v", b"e", b"x", b"g", b"X", b"G")
    maps = b"p" * 512 + b"h" * 512 + b"".join(one * 128 for one in ones)
    assert whole[at : at + len(maps)] == maps
    at += len(maps)
    fields = np.frombuffer(whole[at : at + 40], np.uint64).tolist()
    assert fields == [0x1111, 0, 0x4444, 0, 0]
    assert np.frombuffer(whole[at + 40 : at + 52], np.uint32).tolist() == [1, 7, 8]
    for address in (0x100000, 0x200000, *range(0x5555, 0xAAAA + 1, 0x1111)):
        assert address.to_bytes(8, "little") in whole
    assert pack(tokens=8) != whole
    # Only a rank alone can leave its rows where they are.
    assert pack(in_place=False) == whole
    alone, copying = pack(1, rank=0, tokens=700), pack(1, False, rank=0, tokens=700)
    # Behind the layout, in which the one has no pool.
    assert alone[:at] != copying[:at]
    assert sum(a != b for a, b in zip(alone[at:], copying[at:], strict=True)) == 1
    with pytest.raises(ValueError, match="128 bytes"):
        pack(map_h=b"short")


@pytest.mark.parametrize(
    ("size", "tokens", "in_place", "changes"),
    [
        (1, 0, True, {}),
        (1, 289, True, {}),  # 144.5 rows an expert
        (2, 290, True, {}),
        (2, 1022, True, {}),
        (1, 1023, True, {}),  # 511.5
        (1, 290, True, {"chunks": 131}),
        (2, 7, False, {}),
        (2, 7, True, {"world": 2}),
        (2, 1023, True, {"world": 2}),
        (1, 290, True, {"world": 2, "chunks": 1}),
    ],
)
def test_ctas_make_pairs_where_they_share_weights(
    size: int, tokens: int, in_place: bool, changes: dict[str, Any]
) -> None:
    packed = launch_args(shape_of(**{"world": 1} | changes), in_place, rank=0, tokens=tokens)
    assert np.frombuffer(packed, np.uint32)[_host.PAIR_SIZE_AT // 4] == size


def test_what_no_launch_can_have_is_refused() -> None:
    for changes in ({"top_k": 5}, {"hidden": 0}, {"activation": "tanh"}, {"routing": "random"}):
        with pytest.raises(ValueError):
            _host.heap_layout(shape_of(**changes))
    with pytest.raises(KeyError):
        _host.heap_layout({k: v for k, v in shape_of().items() if k != "scale"})
    with pytest.raises(ValueError, match="chunk_counts"):
        _host.plan(shape_of(), np.zeros((3, 2, 4), np.uint32))


def test_layouts_of_the_extension_are_the_schema() -> None:
    layout = _host.record_layout()
    for name, dtype in (
        ("Record", schema.RECORD),
        ("RingHeader", schema.RING_HEADER),
        ("FlightSlot", schema.FLIGHT_SLOT),
    ):
        assert layout["structs"][name] == (0, dtype.itemsize)
        fields = dtype.fields
        assert fields is not None
        mirrored = {f: (fields[f][1], fields[f][0].itemsize) for f in fields if f != "padding"}
        assert mirrored == layout[name]


FEW = {
    "world": 1, "experts": 16, "top_k": 4, "hidden": 320, "inter": 320, "max_tokens": 8,
    "pool_rows": 64, "chunks": 132, "tile_m": 176, "tile_step": 16, "tile_n1": 128,
    "tile_n2": 256,
}  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "changes"),
    [
        (9, {}),
        (0, {}),
        (8, {"top_k": 9}),  # 72 choices
        (1, {"experts": 64, "top_k": 33}),
        (8, {"pool_rows": 31}),
        (8, {"world": 2}),
        (8, {"routing": "external"}),
        (8, {"hidden": 264}),
        (8, {"hidden": 192}),
        (8, {"inter": 328}),
        (8, {"inter": 192}),
        (8, {"chunks": 1}),  # whose gate has no slices
    ],
)
def test_what_does_not_go_by_units(tokens: int, changes: dict[str, Any]) -> None:
    assert _host.units(shape_of(**FEW), 8) is not None
    assert _host.units(shape_of(**(FEW | changes)), tokens) is None


@pytest.mark.parametrize(("activation", "width"), [("swiglu", 64), ("relu", 128)])
@pytest.mark.parametrize("cut", [{}, {"tile_m": 128, "tile_step": 64}], ids=["bf16", "fp16"])
def test_the_plan_by_units_is_all_of_gemm1_then_all_of_gemm2(
    activation: str, width: int, cut: dict[str, Any]
) -> None:
    shape = shape_of(**FEW | cut, activation=activation)
    units = _host.units(shape, 8)
    assert units == {"tile_step": 16, "tile_n1": width, "tile_n2": 128, "wave_experts": 16}
    counts = np.zeros((1, 132, 16), np.uint32)
    counts[0, :8] = np.random.default_rng(0).permuted(
        np.tile(np.arange(16) < 4, (8, 1)).astype(np.uint32), axis=1
    )
    plan = _host.plan(shape | units, counts)
    rows = counts.sum(axis=(0, 1))
    hit = np.flatnonzero(rows)
    up, down = -(-320 // width), 3
    assert len(plan["tile"]) == len(hit) * (up + down)
    first = len(hit) * up
    # What the kernel works out for itself: unit u is column u % columns of the u / columns-th hit.
    assert (plan["expert"][:first] == np.repeat(hit, up)).all()
    assert (plan["col_tile"][:first] == np.tile(np.arange(up), len(hit))).all()
    assert (plan["expert"][first:] == np.repeat(hit, down)).all()
    assert (plan["col_tile"][first:] == np.tile(np.arange(down), len(hit))).all()
    assert (plan["gemm"] == np.repeat([1, 2], [first, len(hit) * down])).all()
    assert (plan["rows"] == rows[plan["expert"]]).all() and (plan["height"] == 8).all()
    assert (plan["row_tile"][:first] == np.repeat(np.arange(len(hit)), up)).all()

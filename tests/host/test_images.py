"""What is made of images, held to a plain model of what each lane would have written itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashmoe.config import MoEConfig
from flashmoe.trace import schema
from flashmoe.trace.rings import from_dump
from flashmoe.trace.schema import EventKind, Lane, RingMode
from flashmoe.world.base import EngineOptions, RingDump
from flashmoe.world.gpu_engine import GpuEngine
from flashmoe.world.images import Images, with_images
from flashmoe.world.sizing import TraceRoom
from flashmoe.world.trace_memory import TraceMemory

from .lanes import (
    CHUNK,
    HIDDEN,
    RANK,
    RANKS,
    TOP_K,
    WORK,
    Cta,
    Model,
    as_records,
    cta_of,
    log_of,
    step_place,
)

EMPTY = (np.zeros(0, schema.TILE_IMAGE), np.zeros((0, 6), schema.STEP_IMAGE))


def dump_of(ctas: list[Cta], capacity: int, mode: RingMode) -> RingDump:
    """Their rings, as a kernel with room for ``capacity`` records each leaves them."""
    models = [cta.lanes[lane] for cta in ctas for lane in Lane]
    headers = np.zeros(len(models), schema.RING_HEADER)
    headers["rank"], headers["cta"], headers["magic"] = RANK, CHUNK, schema.RING_MAGIC
    records = np.zeros((len(models), capacity), schema.RECORD)
    for i, model in enumerate(models):
        own = as_records(model.own)
        headers["count"][i], headers["capacity"][i], headers["mode"][i] = len(own), capacity, mode
        records[i, : min(len(own), capacity)] = log_of(own, capacity, mode)
    return RingDump(headers, records)


def dumped(
    ctas: list[Cta],
    mode: RingMode = RingMode.KEEP_FIRST,
    *,
    ring: int = 4096,
    room: int = 512,
    launches: int = 16,
    capacity: int = 1 << 14,
) -> RingDump:
    """What is told of them, where their kernel had room for so much."""
    tiles = np.zeros((len(ctas), room), schema.TILE_IMAGE)
    for to, cta in zip(tiles, ctas, strict=True):
        to[: min(room, len(cta.tiles))] = log_of(cta.tiles, room, mode)
    steps = np.stack([log_of(cta.steps, launches, mode) for cta in ctas])
    made = np.array([len(cta.tiles) for cta in ctas])
    images = Images(tiles, made, steps, len(ctas[0].steps))
    return with_images(dump_of(ctas, ring, mode), images, WORK, capacity=capacity)


def in_order(dump: RingDump) -> list[np.ndarray]:
    """Each actor's records, oldest first."""
    rings = from_dump(dump)
    return [np.concatenate(rings.in_order(i)) for i in range(len(rings.headers))]


@pytest.mark.parametrize("mode", list(RingMode))
@pytest.mark.parametrize("seed", range(8))
def test_records_are_those_that_each_lane_would_have_written(mode: RingMode, seed: int) -> None:
    rng = np.random.default_rng(seed)
    made = [cta_of(rng, 3, int(rng.integers(1, 40)), steady=False) for _ in range(3)]
    dump = dumped(made, mode)
    assert not from_dump(dump).dropped.any()
    expected = [as_records(cta.lanes[lane].all) for cta in made for lane in Lane]
    for ours, theirs, lane in zip(in_order(dump), expected, 3 * list(Lane), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=lane.name)


def check_math(cta: Cta) -> None:
    told = in_order(dumped([cta]))
    for lane in (Lane.MATH0, Lane.MATH1):
        theirs = as_records(cta.lanes[lane].all)
        ours = told[lane]
        if not cta.steps["left_ns"].any():
            theirs = theirs[theirs["kind"] != EventKind.LAUNCH]
        np.testing.assert_array_equal(ours, theirs, err_msg=lane.name)


@pytest.mark.parametrize("tiles", [1, 5])
def test_clocks_go_as_from_tile_to_tile_and_to_the_end_of_them(tiles: int) -> None:
    """What else could tell of their pace is wrong."""
    cta = cta_of(np.random.default_rng(8), 2, tiles, steady=False)
    cta.tiles["loads"]["cycles"] //= 7
    cta.steps["left_ns"] = 0
    check_math(cta)


@pytest.mark.parametrize("late_ns", [None, 5_000_000_000])
def test_clocks_of_a_launch_that_ended_ill_go_as_in_the_tile_before(late_ns: int | None) -> None:
    """Its lanes were never past their tiles, or so late that 32 bits of a clock do not say when."""
    cta = cta_of(np.random.default_rng(8), 2, 5)
    cta.steps["left_ns"] = 0
    if late_ns is None:
        cta.steps["past_tiles_ns"] = 0
    else:
        cta.steps["past_tiles_ns"] += late_ns
        cta.steps["past_tiles_cycles"] += 2 * late_ns % (1 << 32)
    cta.tiles["loads"]["cycles"] //= 7
    check_math(cta)


def test_the_clock_of_a_tile_alone_goes_as_while_it_was_loaded() -> None:
    cta = cta_of(np.random.default_rng(8), 2, 1)
    cta.steps["left_ns"] = cta.steps["past_tiles_ns"] = 0
    check_math(cta)
    cta.tiles["loads"]["cycles"] //= 7
    with pytest.raises(AssertionError):
        check_math(cta)


def test_a_launch_of_the_same_number_is_another() -> None:
    """As after 65535, or after a reset: the CTA may be on another SM, whose clock is elsewhere."""
    cta = cta_of(np.random.default_rng(9), 2, 3)
    cta.tiles["iter"] = 0
    for name in ("begin", "products", "end"):
        cta.tiles["stamps"][f"{name}_cycles"][3:] += 1_000_000
    cta.steps["past_tiles_cycles"][1:] += 1_000_000
    for lane in cta.lanes.values():
        gemms = (EventKind.GEMM1, EventKind.GEMM2, EventKind.GIVE_BACK, EventKind.PUT)
        tile = (*gemms, EventKind.LOAD, EventKind.SCHEDULE, EventKind.WAIT_ROWS, EventKind.WAIT_H)
        lane.all = [(*r[:6], 0, *r[7:]) if r[2] in tile else r for r in lane.all]
    check_math(cta)


@pytest.mark.parametrize("mode", list(RingMode))
@pytest.mark.parametrize(
    ("ring", "room", "launches"),
    [(4096, 20, 16), (20, 512, 16), (12, 24, 16), (6, 3, 2), (4096, 512, 1), (4096, 60, 3)],
)
def test_what_is_left_of_full_logs_has_no_hole(
    mode: RingMode, ring: int, room: int, launches: int
) -> None:
    """What is told of an actor is the beginning of all that it did, or the end."""
    cta = cta_of(np.random.default_rng(1), 4, 20)
    dump = dumped([cta], mode, ring=ring, room=room, launches=launches)
    for actor, (ours, lane) in enumerate(zip(in_order(dump), Lane, strict=True)):
        theirs = as_records(cta.lanes[lane].all)
        assert len(ours) < len(theirs)
        assert from_dump(dump).dropped[actor] > 0
        if mode is RingMode.KEEP_FIRST:
            np.testing.assert_array_equal(ours, theirs[: len(ours)], err_msg=lane.name)
        else:
            # Of the first wait that is kept nobody knows what came before it.
            np.testing.assert_array_equal(ours[2:], theirs[len(theirs) - len(ours) + 2 :])


@pytest.mark.parametrize("mode", list(RingMode))
def test_no_more_than_the_capacity_is_told_and_all_is_counted(mode: RingMode) -> None:
    cta = cta_of(np.random.default_rng(2), 2, 30)
    dump = dumped([cta], mode, room=60, capacity=25)
    for actor, lane in enumerate(Lane):
        theirs = as_records(cta.lanes[lane].all)
        assert int(dump.headers["count"][actor]) == len(theirs)
        kept = theirs[:25] if mode is RingMode.KEEP_FIRST else theirs[-25:]
        np.testing.assert_array_equal(in_order(dump)[actor], kept)


@pytest.mark.parametrize(("room", "launches", "lost"), [(30, 16, 20), (64, 2, 3)])
def test_what_is_lost_counts_once(room: int, launches: int, lost: int) -> None:
    cta = cta_of(np.random.default_rng(3), 5, 10)
    dropped = from_dump(dumped([cta], room=room, launches=launches)).dropped
    for lane in Lane:
        told = len(cta.lanes[lane].all) - len(
            in_order(dumped([cta], room=room, launches=launches))[lane]
        )
        assert 0 < dropped[lane] <= told
        if lane not in (Lane.COMM0, Lane.COMM1):
            assert dropped[lane] >= lost


def test_a_launch_that_ended_early_tells_what_came_to_an_end() -> None:
    cta = cta_of(np.random.default_rng(4), 1, 1)
    cta.steps["end_ns"][:, :, 1:] = 0
    cta.steps["left_ns"] = 0
    for lane, records in zip(Lane, in_order(dumped([cta])), strict=True):
        kinds = records["kind"].tolist()
        assert EventKind.GATE in kinds
        ended = {EventKind.COUNTS, EventKind.PLAN, EventKind.DISPATCH, EventKind.LAUNCH}
        assert not ended & set(kinds), lane


def test_nothing_comes_of_an_untraced_run() -> None:
    empty = RingDump(np.zeros(0, schema.RING_HEADER), np.zeros((0, 0), schema.RECORD))
    tiles, steps = np.zeros((0, 0), schema.TILE_IMAGE), np.zeros((0, 0, 6), schema.STEP_IMAGE)
    images = Images(tiles, np.zeros(0, np.int64), steps, 3)
    untraced = with_images(empty, images, WORK, capacity=9)
    assert untraced.records.shape == (0, 0)


def test_a_wait_ends_before_what_ends_at_the_same_tick() -> None:
    """Its record stays behind the one that opened it, and it is a wait of all lanes."""
    dump = dump_of([Cta({lane: Model() for lane in Lane}, *EMPTY)], 8, RingMode.KEEP_FIRST)
    kind = EventKind.WAIT_BARRIER
    dump.headers["count"][Lane.SCHED] = 2
    none = (0xFFFF, 0xFFFF, 0, 0xFFFFFFFF, 3, 0)
    open_, closed = (2048, 0, kind, schema.RecordFlag.OPEN, *none), (2048, 2048, kind, 0, *none)
    dump.records[Lane.SCHED, :2] = as_records([open_, closed])
    steps = np.zeros((1, 1, 6), schema.STEP_IMAGE)
    steps["begin_ns"], steps["end_ns"] = 1024, [2048, 4096, 4160, 0]
    steps["left_ns"] = 4160
    images = Images(np.zeros((1, 0), schema.TILE_IMAGE), np.zeros(1, np.int64), steps, 1)
    told = in_order(with_images(dump, images, WORK, capacity=99))
    for lane, records in zip(Lane, told, strict=True):
        names = [schema.NAME_OF[one] for one in records["kind"]]
        opened = ["wait_barrier"] if lane is Lane.SCHED else []
        assert names == ["gate", *opened, "wait_barrier", "counts", "plan", "launch"]
        assert records["dur_ns"].tolist()[-4:] == [2048, 0, 64, 3136]


def test_launches_before_epochs_began_anew_are_told_too() -> None:
    cta = cta_of(np.random.default_rng(5), 3, 4)
    made = np.array([len(cta.tiles)])
    before = Images(cta.tiles[None, :0], made * 0, cta.steps[None, :2], 2)
    after = Images(cta.tiles[None], made, cta.steps[None, 2:], 1)
    rings = dump_of([cta], 4096, RingMode.KEEP_FIRST)
    dump = with_images(rings, after.behind(before), WORK, capacity=4096)
    assert not from_dump(dump).dropped.any()
    for ours, lane in zip(in_order(dump), Lane, strict=True):
        np.testing.assert_array_equal(ours, as_records(cta.lanes[lane].all), err_msg=lane.name)


def test_actors_that_never_began_lost_nothing() -> None:
    cta = cta_of(np.random.default_rng(6), 2, 4)
    dump = dump_of([cta], 4096, RingMode.KEEP_FIRST)
    dump.headers["magic"], dump.headers["count"], dump.headers["capacity"] = 0, 0, 0
    steps = np.zeros((1, 1, 6), schema.STEP_IMAGE)
    images = Images(np.zeros((1, 0), schema.TILE_IMAGE), np.zeros(1, np.int64), steps, 2)
    told = with_images(dump, images, WORK, capacity=99)
    assert not told.headers["count"].any() and not told.headers["capacity"].any()


def as_bytes(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.view(np.uint8).reshape(*array.shape, -1).copy())


def test_an_engine_hands_over_what_its_kernel_left() -> None:
    """On memory of the CPU: all but the launches themselves."""
    cta = cta_of(np.random.default_rng(7), 3, 5)
    engine = GpuEngine.__new__(GpuEngine)
    engine.options = EngineOptions(ranks=RANKS, traced=True)
    engine.config = MoEConfig(HIDDEN, 256, experts=WORK.experts, top_k=TOP_K)
    engine.sms_per_rank = WORK.chunks
    device, mode = torch.device("cpu"), RingMode.KEEP_FIRST
    memory = engine._trace = TraceMemory((RANK,), WORK.chunks, TraceRoom(4096, 20, 8), mode, device)
    dump = dump_of([cta], 4096, mode)
    # Of a header only the count, and of the other CTAs nothing.
    counts = np.zeros(len(Lane), schema.RING_HEADER)
    counts["count"] = dump.headers["count"]
    lanes = slice(CHUNK * len(Lane), (CHUNK + 1) * len(Lane))
    memory._headers[lanes], memory._records[lanes] = as_bytes(counts), as_bytes(dump.records)
    cursor = np.zeros(1, schema.LOG_CURSOR)
    cursor["count"] = 15
    memory._images[CHUNK, :15], memory._images_made[CHUNK] = as_bytes(cta.tiles), as_bytes(cursor)

    def told() -> list[np.ndarray]:
        rings = in_order(engine.rings())
        assert not any(len(own) for own in rings[: lanes.start] + rings[lanes.stop :])
        return rings[lanes]

    def check_headers(launch: int) -> None:
        headers = engine.rings().headers
        assert not headers[: lanes.start]["magic"].any()
        mine, steps = headers[lanes], cta.steps[launch]
        assert (mine["magic"] == schema.RING_MAGIC).all() and (mine["sm"] == 77).all()
        assert (mine["rank"] == RANK).all() and (mine["cta"] == CHUNK).all()
        assert mine["lane"].tolist() == list(Lane) and (mine["mode"] == mode).all()
        np.testing.assert_array_equal(mine["begin_ns"], steps["begin_ns"])
        np.testing.assert_array_equal(mine["end_ns"], steps["left_ns"])
        np.testing.assert_array_equal(mine["end_cycles"] - mine["begin_cycles"], steps["cycles"])

    # Two launches, of which the second is run again as the third: its steps lie in the same place.
    memory._steps[CHUNK, :2] = as_bytes(cta.steps[:2])
    engine._launches, engine._iteration_base = 2, 0
    check_headers(1)
    memory.put_steps_aside(engine._iterations(), first=1)
    assert not memory._steps.any()
    check_headers(1)
    memory._steps[CHUNK, 1] = as_bytes(cta.steps[2])
    engine._launches, engine._iteration_base = 1, -1
    check_headers(2)
    for ours, lane in zip(told(), Lane, strict=True):
        np.testing.assert_array_equal(ours, as_records(cta.lanes[lane].all), err_msg=lane.name)
    engine._write_args = lambda: None  # type: ignore[method-assign]
    engine.reset_rings()
    assert engine._iteration_base == 1
    assert not any(len(records) for records in told())


@pytest.mark.parametrize("mode", list(RingMode))
def test_headers_are_of_the_last_launch_whether_it_was_kept(mode: RingMode) -> None:
    """Of five launches two are kept, and the last one lies where those lie that are not."""
    cta = cta_of(np.random.default_rng(9), 5, 1)
    memory = TraceMemory((RANK,), 1, TraceRoom(64, 8, 2), mode, torch.device("cpu"))
    cta.steps["cycles"][4, 0] = 0xFFFFFFFF  # or more: unknown
    for launch, steps in enumerate(cta.steps):
        memory._steps[0, step_place(launch, 2, mode)] = as_bytes(steps)
    headers = memory.dump(5, WORK).headers
    np.testing.assert_array_equal(headers["begin_ns"], cta.steps[4]["begin_ns"])
    assert headers["end_cycles"].tolist() == [0, *cta.steps["cycles"][4, 1:]]


@pytest.mark.parametrize(("mode", "lost"), [(RingMode.KEEP_FIRST, 5), (RingMode.KEEP_LAST, 3)])
def test_launches_without_room_count_once(mode: RingMode, lost: int) -> None:
    """There is room for two; the fifth is run again, as the sixth, with its number."""
    cta = cta_of(np.random.default_rng(10), 7, 0)
    memory = TraceMemory((RANK,), 1, TraceRoom(64, 8, 2), mode, torch.device("cpu"))

    def run(launch: int, iteration: int) -> None:
        memory._steps[0, step_place(iteration, 2, mode)] = as_bytes(cta.steps[launch])

    for launch in range(5):
        run(launch, launch)
    memory.put_steps_aside(5, first=4)
    for launch in range(5, 7):
        run(launch, launch - 1)
    assert from_dump(memory.dump(6, WORK)).dropped.tolist() == [lost] * len(Lane)


def test_an_untraced_engine_has_no_trace() -> None:
    device = torch.device("cpu")
    memory = TraceMemory((), WORK.chunks, TraceRoom(4096, 20, 8), RingMode.KEEP_LAST, device)
    addresses = {name: memory.arguments()[name] for name in ("rings", "records", "images", "steps")}
    assert not any(addresses.values())
    memory.put_steps_aside(3, first=0)
    told = memory.dump(5, WORK)
    assert len(told.headers) == 0 and told.records.shape == (0, 0)

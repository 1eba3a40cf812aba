"""Lanes of a CTA as a plain model of each records, and the images that a kernel leaves of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from flashmoe.trace import schema
from flashmoe.trace.schema import EventKind, Lane, RingMode
from flashmoe.world.image_spans import Work

WORK = Work(ranks=3, chunks=4, experts=10, top_k=2, hidden=320, columns=128, gathers=True)
HIDDEN, COLUMNS, RANKS, TOP_K = WORK.hidden, WORK.columns, WORK.ranks, WORK.top_k
RANK, CHUNK = 2, 1


def as_records(rows: list[tuple[int, ...]]) -> np.ndarray:
    return np.array(rows, schema.RECORD)


def log_of(made: np.ndarray, room: int, mode: RingMode) -> np.ndarray:
    """What a log with so much room holds, where it holds it."""
    if mode is RingMode.KEEP_FIRST or len(made) <= room:
        return made[:room]
    return np.roll(made[-room:], len(made) % room, axis=0)


def step_place(iteration: int, room: int, mode: RingMode) -> int:
    """Where a launch's first steps lie: without room for them, behind the last place."""
    return iteration % room if mode is RingMode.KEEP_LAST else min(iteration, room)


@dataclass
class Model:
    """A lane that records as csrc/core/actor.h does: it keeps where its last span ended."""

    last: int = 0
    own: list[tuple[int, ...]] = field(default_factory=list)  # what it writes into its ring
    all: list[tuple[int, ...]] = field(default_factory=list)

    def put(self, kind: int, begin: int, end: int, mine: bool, **more: int) -> None:
        names = ("peer", "expert", "iter", "tile", "aux", "stall_cycles")
        default = {"peer": 0xFFFF, "expert": 0xFFFF, "tile": 0xFFFFFFFF}
        rest = tuple(more.get(name, default.get(name, 0)) for name in names)
        record = (begin, end - begin, int(kind), 0, *rest)
        self.all.append(record)
        if mine:
            self.own.append(record)

    def span(self, kind: int, end: int, mine: bool, **more: int) -> None:
        self.put(kind, self.last, end, mine, **more)
        self.last = end

    def waited(self, kind: int, begin: int, end: int, mine: bool, **more: int) -> None:
        begin = max(begin, self.last)
        if end <= begin:
            return
        self.put(kind, begin, end, mine, **more)
        self.last = end


@dataclass
class Cta:
    """A CTA's lanes and what its kernel's threads leave of them."""

    lanes: dict[Lane, Model]
    tiles: np.ndarray
    steps: np.ndarray  # [launches, lanes]


def cta_of(rng: np.random.Generator, launches: int, tiles: int, *, steady: bool = True) -> Cta:
    """``steady``: the SM's clock goes at one pace through a launch, else at two in turn."""
    lanes = {lane: Model() for lane in Lane}
    images = np.zeros(launches * tiles, schema.TILE_IMAGE)
    steps = np.zeros((launches, len(Lane)), schema.STEP_IMAGE)
    clock = 1000
    # Of a math lane, where its last tile began: ns, the SM's clock and how fast it has gone since.
    begun = dict.fromkeys((Lane.MATH0, Lane.MATH1), (0, 0xFFFF0000, 2))

    def pace_of(launch: int, tile: int) -> int:
        """GHz."""
        return 2 + (launch + (0 if steady else tile)) % 2

    def cycles_at(lane: Lane, ns: int) -> int:
        """The low half of the SM's clock."""
        at, cycles, pace = begun[lane]
        return (cycles + pace * (ns - at)) % (1 << 32)

    def later(most: int) -> int:
        return int(rng.integers(1, most)) * 32

    for launch in range(launches):
        began = clock
        tokens = int(rng.integers(0, 20))
        waits = rng.random() < 0.7
        for lane, model in lanes.items():
            step, n, common = steps[launch, lane], int(lane), {"iter": launch}
            step["begin_ns"] = model.last = clock
            step["iter"], step["tokens"], step["sm"] = launch, tokens, 77
            gate = clock + 320 + 32 * n
            model.span(EventKind.GATE, gate, False, **common, tile=CHUNK, aux=tokens)
            if waits:
                # The scheduler waits for all, and writes that down; the others' gates end sooner.
                mine = lane is Lane.SCHED
                model.waited(EventKind.WAIT_BARRIER, clock + 512, clock + 640, mine, **common)
            counts, plan = clock + 704 + 32 * n, clock + 960
            # Of 10 experts every 4th from the CTA's own on: 3 of 3 ranks.
            sent = 8 * 3 * 3 if lane is Lane.LOAD else 0
            model.span(EventKind.COUNTS, counts, False, **common, aux=sent)
            model.span(EventKind.PLAN, plan, False, **common)
            step["end_ns"] = [gate, counts, plan, 0]
            warps = {Lane.MATH0: range(4, 8), Lane.MATH1: range(8, 12)}.get(lane, [n])
            share = sum(row % 12 in warps for row in range(tokens * TOP_K))
            moved = clock + 1024 + 32 * n
            step["end_ns"][3] = moved
            if share:
                model.span(
                    EventKind.DISPATCH, moved, False, **common,
                    peer=RANK, expert=0, tile=CHUNK, aux=share * HIDDEN * 2,
                )  # fmt: skip
            else:
                model.last = moved
        clock += 1248
        free = dict.fromkeys(lanes, clock)  # when a lane takes up the next tile at the earliest
        for n in range(tiles):
            image = images[launch * tiles + n]
            tile, gemm = image["tile"], 1 + n % 2
            for name, value in {
                "index": 10 * n + launch, "gemm": gemm, "expert": n % 7, "row_tile": n % 3,
                "row0": 176 * (n % 2), "rows": int(rng.integers(1, 177)), "col_tile": n // 2 % 2,
            }.items():  # fmt: skip
                tile[name] = value
            image["iter"] = launch
            common = {"expert": int(tile["expert"]), "iter": launch}
            of_tile = common | {"tile": int(tile["index"])}

            # The scheduler, which may wait for the operands itself.
            sched = lanes[Lane.SCHED]
            has_work = free[Lane.SCHED]
            sched.last = has_work
            if rng.random() < 0.5:
                begin = has_work + later(4)
                end = begin + later(40)
                kind = EventKind.WAIT_ROWS if gemm == 1 else EventKind.WAIT_H
                image["wait_kind"], image["wait_lacking"] = kind, n + 1
                image["wait_from"], image["wait_to"] = begin, end
                sched.last = begin
                sched.waited(kind, begin, end, True, **common, tile=int(tile["row_tile"]), aux=n)
            handed = sched.last + later(4)
            sched.span(EventKind.SCHEDULE, handed, False, **of_tile)
            image["scheduled_from_ns"], image["scheduled_ns"] = has_work, handed
            free[Lane.SCHED] = handed + later(60)

            def wait(model: Model, until: int, image=image, common=common, tile=tile) -> None:
                if image["wait_kind"]:
                    model.waited(
                        int(image["wait_kind"]), int(image["wait_from"]), until, False,
                        **common, tile=int(tile["row_tile"]), aux=int(image["wait_lacking"]),
                    )  # fmt: skip

            for place, lane in enumerate((Lane.LOAD, Lane.COMM0, Lane.COMM1)):
                if lane is not Lane.LOAD and (gemm == 2 or rng.random() < 0.3):
                    continue
                begin = max(handed, free[lane]) + later(3)
                model, stamps = lanes[lane], image["loads"][place]
                wait(model, int(image["wait_to"]))
                model.last = max(model.last, begin)
                end = max(begin, model.last) + later(50)
                took = pace_of(launch, n) * (end - begin)
                model.span(EventKind.LOAD, end, False, **of_tile, aux=took, stall_cycles=n)
                stamps["begin_ns"], stamps["end_ns"] = begin, end
                stamps["cycles"], stamps["stall_cycles"] = took, n
                free[lane] = end
            for group, lane in enumerate((Lane.MATH0, Lane.MATH1)):
                model, stamps = lanes[lane], image["stamps"][group]
                begin = max(handed, free[lane]) + later(3)
                products = begin + later(50)
                done = products if gemm == 1 else products + later(10)
                stamps["begin_ns"], stamps["stall_cycles"] = begin, n
                pace = pace_of(launch, n)
                begun[lane] = begin, cycles_at(lane, begin), pace
                for name, ns in {"begin": begin, "products": products, "end": done}.items():
                    stamps[f"{name}_cycles"] = cycles_at(lane, ns)
                wait(model, min(int(image["wait_to"]), begin))
                model.last = begin
                kind = EventKind.GEMM1 if gemm == 1 else EventKind.GEMM2
                took = pace * (products - begin)
                model.span(kind, products, False, **of_tile, aux=took, stall_cycles=n)
                column = int(tile["col_tile"]) * 2 * COLUMNS + group * COLUMNS
                free[lane] = done
                if gemm == 1 or column >= HIDDEN:
                    model.last = done if gemm == 1 else products
                    continue
                row_bytes, rows = 2 * min(COLUMNS, HIDDEN - column), int(tile["rows"])
                model.span(EventKind.GIVE_BACK, done, False, **of_tile, aux=rows * row_bytes)
                ends = np.unique(np.append(rng.integers(1, 177, RANKS - 1), 176))
                first = 0
                if group == 0:
                    image["returns"]["end"][: len(ends)] = ends + tile["row0"]
                    image["returns"]["source"][: len(ends)] = np.arange(len(ends))[::-1]
                for path in image["returns"]:
                    if first >= rows:
                        break
                    end = min(int(path["end"]) - int(tile["row0"]), rows)
                    model.put(
                        EventKind.PUT, done, done, False, **of_tile,
                        peer=int(path["source"]), aux=(end - first) * row_bytes,
                    )  # fmt: skip
                    first = end
        clock = max(*free.values(), max(model.last for model in lanes.values())) + 32
        for lane in (Lane.COMM0, Lane.COMM1, Lane.MATH0, Lane.MATH1):
            lanes[lane].last = clock
            if lane in begun:
                steps["past_tiles_ns"][launch, lane] = clock
                steps["past_tiles_cycles"][launch, lane] = cycles_at(lane, clock)
            lanes[lane].waited(EventKind.WAIT_RETURN, clock, clock + 96, True, iter=launch)
            lanes[lane].span(EventKind.COMBINE, clock + 160, True, iter=launch, aux=1)
        clock += 320
        took = (2 + launch % 2) * (clock - began)
        steps["left_ns"][launch], steps["cycles"][launch] = clock, took
        for model in lanes.values():
            model.put(EventKind.LAUNCH, began, clock, False, iter=launch, aux=took)
        clock += 640
    return Cta(lanes, images, steps)

"""NVLink's bytes around launches, on an NVML that is made up: threads play the ranks."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from flashmoe import nvlink
from flashmoe.presets import PRESETS
from flashmoe.trace.links import link_figures
from flashmoe.world import links
from flashmoe.world.links import LinkBytes
from flashmoe.world.rendezvous import Job, Place

from ..fake_nvml import FakeNvml

TINY = PRESETS["tiny"].config
DATA_TX, DATA_RX, RAW_TX, RAW_RX = 138, 139, 140, 141


def owners(ranks: int) -> np.ndarray:
    """Which rank each expert is of: consecutive ones."""
    ends = [(r + 1) * TINY.experts // ranks for r in range(ranks)]
    return np.searchsorted(ends, np.arange(TINY.experts), side="right")


@dataclass
class Node:
    """Ranks with a GPU each, or several on one, and what they send each other."""

    nvml: FakeNvml
    gpus: list[int]
    rows: np.ndarray
    """int64 [W, E]: rows that each rank sends to each expert in a launch."""
    ms: float = 1.0
    launches: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.launches = [0] * len(self.gpus)
        owner = owners(len(self.gpus))
        one_way = np.stack([self.rows[:, owner == r].sum(axis=1) for r in range(len(self.gpus))], 1)
        self.bytes = (one_way + one_way.T) * TINY.row_bytes  # there and back, [W, W]

    def payload(self, gpu: int) -> int:
        """Bytes a launch that cross from one GPU to the others."""
        mine = np.array(self.gpus) == gpu
        return int(self.bytes[np.ix_(mine, ~mine)].sum())

    def launch(self, rank: int) -> None:
        """Sends what the rank has, with 8 KiB of signals to each GPU, and headers of a tenth."""
        self.launches[rank] += 1
        for to, gpu in enumerate(self.gpus):
            if gpu == self.gpus[rank]:
                continue
            kib = self.bytes[rank, to] // 1024 + 8
            with self.lock:
                for at, data, raw in ((self.gpus[rank], DATA_TX, RAW_TX), (gpu, DATA_RX, RAW_RX)):
                    self.nvml.kib[at][data] += kib
                    self.nvml.kib[at][raw] += kib + kib // 10

    def run(
        self, own_launches: int = 2, may_run: bool = True, late: Callable[[int], None] | None = None
    ) -> list[dict[str, Any] | None]:
        """Each rank's report; ``late`` is called with the rank before each of its launches."""
        from torch.distributed import HashStore

        store, ranks = HashStore(), len(self.gpus)
        reports: list[dict[str, Any] | None] = [None] * ranks
        names = [bytes([gpu]) * 16 for gpu in self.gpus]

        def play(rank: int) -> None:
            job = Job(Place(rank, ranks, rank, ranks, 1, "flashmoe", "", 0), store, 20)
            counted = LinkBytes(job, self.gpus[rank], names)
            counted.begin()

            def launch() -> None:
                if late is not None:
                    late(rank)
                self.launch(rank)

            for _ in range(own_launches):
                launch()
            more = counted.more(own_launches, TINY, self.rows[rank], self.ms, may_run=may_run)
            for _ in range(more):
                launch()
            counted.end()
            reports[rank] = counted.report

        threads = [threading.Thread(target=play, args=(r,), name=str(r)) for r in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return reports


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    fake.gpus = 8
    for counters in fake.kib:
        for at in counters:
            counters[at] = 7  # counted since the driver was loaded
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(nvlink, "SETTLE_S", 0.001)
    return fake


def rows(ranks: int, times: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 9, (ranks, TINY.experts)) * times


def figures(node: Node, reports: list[dict[str, Any] | None]) -> dict[str, Any]:
    known = [report for report in reports if report is not None]
    assert len(known) == len(node.gpus)
    assert {report["launches"] for report in known} == set(node.launches)
    said = {"launches": node.launches[0], "ranks": [{"rank": r} | one for r, one in
                                                    enumerate(known)]}  # fmt: skip
    found = link_figures(said)
    assert found is not None
    return found


def test_the_runs_own_launches_are_enough_where_much_moves(nvml: FakeNvml) -> None:
    node = Node(nvml, [0, 1, 2], rows(3, 4000))
    found = figures(node, node.run())
    assert node.launches == [2, 2, 2] and found["certain"] and found["why"] == ""
    for gpu, entry in zip(range(3), found["gpus"], strict=True):
        payload = node.payload(gpu)
        assert entry["ranks"] == [gpu]
        for way in ("tx", "rx"):
            assert entry[f"payload_{way}"] == payload
            # Counters know whole KiB, and the signals go with the rows: 8 KiB to each of two.
            assert payload + 14 * 1024 < entry[f"data_{way}"] <= payload + 16 * 1024
            assert entry[f"data_over_payload_{way}"] == entry[f"data_{way}"] / payload > 1
            assert entry[f"raw_{way}"] == pytest.approx(1.1 * entry[f"data_{way}"], rel=1e-3)
    assert found["total"]["payload"] == sum(node.payload(gpu) for gpu in range(3))
    assert found["total"]["data"] == sum(entry["data_tx"] for entry in found["gpus"])


def test_launches_are_added_until_the_counters_are_certain(nvml: FakeNvml) -> None:
    node = Node(nvml, [0, 1], rows(2, 30))
    found = figures(node, node.run())
    least = min(node.payload(gpu) for gpu in (0, 1))
    assert node.launches[0] == node.launches[1] == -(-nvlink.ENOUGH_BYTES // least) > 2
    assert found["certain"]


def test_no_more_are_added_than_are_cheap(nvml: FakeNvml) -> None:
    node = Node(nvml, [0, 1], rows(2, 1))
    assert not figures(node, node.run())["certain"]
    assert node.launches == [2 + links.MOST_LAUNCHES] * 2
    slow = Node(nvml, [0, 1], rows(2, 1), ms=250.0)
    figures(slow, slow.run())
    assert slow.launches == [2 + 4] * 2  # of 250 ms in a second
    traced = Node(nvml, [0, 1], rows(2, 1))
    assert not figures(traced, traced.run(may_run=False))["certain"]
    assert traced.launches == [2, 2]


def test_a_rank_that_nobody_sends_to_is_not_waited_for(nvml: FakeNvml) -> None:
    sent = rows(3, 4000)
    owner = owners(3)
    sent[2] = 0
    sent[:, owner == 2] = 0
    node = Node(nvml, [0, 1, 2], sent)
    found = figures(node, node.run())
    assert node.launches == [2, 2, 2]
    assert found["gpus"][2]["payload_tx"] == 0
    assert found["gpus"][2]["data_over_payload_tx"] is None
    assert not found["certain"]


def test_no_others_bytes_are_counted_and_none_are_missed(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPU 1's counters take their time, and its rank is late: yet all is there, and no more."""
    still = nvml.nvmlDeviceGetFieldValues

    def slow(handle: int, wanted: list[Any]) -> list[Any]:
        time.sleep(0.1 if handle == 1 else 0)
        return still(handle, wanted)

    monkeypatch.setattr(nvml, "nvmlDeviceGetFieldValues", slow)
    node = Node(nvml, [0, 1], rows(2, 3))
    found = figures(node, node.run(late=lambda rank: time.sleep(0.01 * rank)))
    moved = node.bytes[0, 1] // 1024 * 1024 + 8 * 1024
    for entry in found["gpus"]:
        assert entry["data_tx"] == entry["data_rx"] == moved


def test_ranks_that_share_a_gpu_are_added_up(nvml: FakeNvml) -> None:
    node = Node(nvml, [0, 0, 1, 1], rows(4, 4000))
    found = figures(node, node.run())
    assert [entry["ranks"] for entry in found["gpus"]] == [[0, 1], [2, 3]]
    for gpu, entry in enumerate(found["gpus"]):
        assert entry["payload_tx"] == entry["payload_rx"] == node.payload(gpu)
        assert 1 < entry["data_over_payload_tx"] < 1.01


def test_payload_between_nodes_is_none_of_nvlinks(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        links, "_node", lambda: b"one" if threading.current_thread().name in "01" else b"two"
    )
    node = Node(nvml, [0, 1, 2], rows(3, 4000))
    first, second, third = (entry for entry in node.run() if entry is not None)
    assert first["payload_tx"] == second["payload_rx"] == node.bytes[0, 1] > 0
    assert third["payload_tx"] == third["payload_rx"] == 0


def test_others_on_the_links_make_it_uncertain(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = nvml.nvmlDeviceGetFieldValues

    def busy(handle: int, wanted: list[Any]) -> list[Any]:
        nvml.kib[handle][DATA_RX] += handle  # GPU 0 has its links for itself
        return still(handle, wanted)

    monkeypatch.setattr(nvml, "nvmlDeviceGetFieldValues", busy)
    node = Node(nvml, [0, 1], rows(2, 4000))
    found = figures(node, node.run())
    assert [entry["certain"] for entry in found["gpus"]] == [True, False]
    assert not found["certain"]


def test_without_counters_the_reason_is_all_there_is(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int, wanted: list[Any]) -> list[Any]:
        raise nvml.NVMLError("Not Supported")

    monkeypatch.setattr(nvml, "nvmlDeviceGetFieldValues", refuse)
    node = Node(nvml, [0, 1], rows(2, 1))
    found = figures(node, node.run())
    assert node.launches == [2, 2], "nothing is run for counters that are not there"
    assert found["total"] is None and found["why"] == "Not Supported"
    assert not found["certain"]


@pytest.mark.parametrize("traced", [False, True])
def test_a_run_counts_over_all_its_launches_and_measures_its_own(
    nvml: FakeNvml, traced: bool
) -> None:
    from torch.distributed import HashStore

    from flashmoe.merge import Merged, Outcome
    from flashmoe.pe import Pe, _launch_all
    from flashmoe.session import Request
    from flashmoe.world.base import Launch, Status

    node, store = Node(nvml, [0, 1], rows(2, 30)), HashStore()
    request = Request("tiny", "tiny", TINY, (8, 8), ranks=2, iterations=3, traced=traced)

    class Engine:
        config, gpus = TINY, tuple(bytes([gpu]) * 16 for gpu in node.gpus)

        def __init__(self, rank: int) -> None:
            self.rank, self.options = rank, SimpleNamespace(device=node.gpus[rank])

        def launch(self) -> Launch:
            node.launch(self.rank)
            return Launch(Status.OK, 1.0, node.launches[self.rank])

        def chunk_counts(self) -> np.ndarray:
            return node.rows[None, self.rank, None]

        def reset_rings(self) -> None:
            assert node.launches[self.rank] == request.warmup

    pes = [Pe(request, Job(Place(r, 2, r, 2, 1, "flashmoe", "", 0), store, 20)) for r in (0, 1)]
    threads = [
        threading.Thread(target=_launch_all, args=(pe, Engine(r), lambda *_: None))
        for r, pe in enumerate(pes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    parts = {rank: pe.part() for rank, pe in enumerate(pes)}
    assert all(len(part.report["launch_ms"]) == 3 for part in parts.values())
    said = Merged(request, Outcome(parts), "").nvlink()
    assert said is not None and said["launches"] == node.launches[0] == node.launches[1]
    assert [entry["rank"] for entry in said["ranks"]] == [0, 1]
    assert said["ranks"][1]["gpu"] == "GPU-01010101-0101-0101-0101-010101010101"
    assert said["ranks"][0]["payload_tx"] == node.payload(0)
    enough = request.warmup + request.iterations < said["launches"]
    assert enough == said["ranks"][0]["certain"] == (not traced)
    del parts[1]
    assert Merged(request, Outcome(parts), "").nvlink() is None


def test_one_gpu_is_not_asked(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "nvmlDeviceGetFieldValues", None)
    for gpus in ([0, 0], [3]):
        node = Node(nvml, gpus, rows(len(gpus), 1))
        assert node.run() == [None] * len(gpus)
        assert node.launches == [2] * len(gpus)
    assert link_figures(None) is None

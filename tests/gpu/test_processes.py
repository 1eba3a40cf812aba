"""Ranks as processes on a GPU, or on several: results, bytes, and what happens when one dies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashmoe.build_info import build_info
from flashmoe.presets import PRESETS
from flashmoe.trace import schema
from flashmoe.trace.causality import order_of
from flashmoe.trace.columns import Events
from flashmoe.trace.rundir import open_run
from flashmoe.world import nvshmem
from flashmoe.world.base import EngineOptions
from flashmoe.world.board import Board
from flashmoe.world.peers import Peers
from flashmoe.world.processes import builder
from flashmoe.world.rendezvous import Job as Store
from flashmoe.world.rendezvous import Place

from ..procs.harness import until
from ..procs.payload import implied, traced
from .layers import SMALL, inputs
from .pes import (
    WAYS,
    apart,
    bits_in,
    bits_of,
    finish,
    global_batch,
    leavings,
    local_bits,
    needs_nvshmem,
    shared,
    start,
    ways,
)

pytestmark = pytest.mark.slow

TOKENS = {"qwen3-30b": 120, "mixtral": 72}
GRACE_S = 3.0
# Rank 0 withholds a signal that all need sooner or later, so that all stay inside their kernels.
STUCK = ("--fault", "lost-signal:0:7")


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Any:
    before = leavings()
    yield
    assert leavings() <= before


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By preset: the file of the global batch, and its result's bits by number of virtual ranks."""
    made: dict[str, tuple[Path, dict[int, bytes]]] = {}

    def get(preset: str) -> tuple[Path, dict[int, bytes]]:
        if preset not in made:
            path, x = global_batch(tmp_path_factory.mktemp(preset), preset, TOKENS[preset])
            config = PRESETS[preset].config
            made[preset] = path, {ranks: local_bits(config, x, ranks) for ranks in (1, 2, 4, 8)}
        return made[preset]

    return get


def run_batch(
    folder: Path, expected: Any, preset: str, way: str, where: tuple[str, ...], *more: str
) -> None:
    """The global batch by processes has the bits of the local world and of one rank."""
    tokens, bits = expected(preset)
    assert len(set(bits.values())) == 1
    args = ("run", preset, *where, *WAYS[way], "--tokens", str(tokens), "-n", "2")
    saved = ("--save-output", "out.safetensors", "--json")
    done = finish(start(folder, *args, *saved, *more))
    assert bits_in(folder / "out.safetensors") == bits[1]
    assert done.said["world"] == done.said["processes"]["transport"] == WAYS[way][1]
    assert done.said["processes"]["pointers"] == (way != "put-with-signal")
    assert done.said["topology"] == ("shared-gpu" if "--ranks-per-gpu" in where else "several-gpus")


@ways()
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("preset", TOKENS)
def test_bits_are_those_of_the_local_world_and_of_one_rank(
    tmp_path: Path, expected: Any, preset: str, ranks: int, way: str
) -> None:
    check = () if preset == "qwen3-30b" else ("--no-check",)
    run_batch(tmp_path, expected, preset, way, shared(ranks), *check)


@ways()
@pytest.mark.parametrize("gpus", [2, 4, 8])
@pytest.mark.parametrize("preset", TOKENS)
def test_bits_are_the_same_over_several_gpus(
    tmp_path: Path, expected: Any, preset: str, gpus: int, way: str
) -> None:
    run_batch(tmp_path, expected, preset, way, apart(gpus))


def count_payload(folder: Path, where: tuple[str, ...], tokens: str, way: str) -> Any:
    """A traced run whose events count, to the byte, what the ids imply; gives it."""
    args = ("trace", "qwen3-30b", *where, *WAYS[way], "-T", tokens, "-n", "2")
    saved = ("-o", "run.fmoe", "--save-output", "out.safetensors", "--json")
    done = finish(start(folder, *args, *saved))
    assert done.said["check"]["ok"]
    run = open_run(folder / "run.fmoe")
    config, world = run.meta["config"], run.meta["world"]
    due = implied(folder / "out.safetensors", tokens, config["experts"], world["row_bytes"])
    assert due.sum() > 0
    for launch in (0, 1):
        np.testing.assert_array_equal(traced(run, launch), due)
    return run


@ways()
@pytest.mark.parametrize("tokens", ["150,0", "40,90,1,70"])
def test_payload_is_what_the_ids_imply(tmp_path: Path, tokens: str, way: str) -> None:
    run = count_payload(tmp_path, shared(tokens.count(",") + 1), tokens, way)
    assert run.meta["world"]["topology"] == "shared-gpu"
    gpus = {pe["gpu"] for pe in run.meta["world"]["processes"]["ranks"]}
    assert len(gpus) == 1
    # One GPU has one clock: no rank's is moved.
    for how in run.meta["clock"]["ranks"]:
        assert how is not None and not how["applied"], how


@ways()
@pytest.mark.parametrize("tokens", ["150,90", "40,90,1,70,0,33,128,64"])
def test_payload_over_several_gpus_is_what_the_ids_imply(
    tmp_path: Path, tokens: str, way: str
) -> None:
    gpus = tokens.count(",") + 1
    run = count_payload(tmp_path, apart(gpus), tokens, way)
    assert run.meta["world"]["topology"] == "several-gpus"
    assert len({pe["gpu"] for pe in run.meta["world"]["processes"]["ranks"]}) == gpus


@ways("ipc", "nvshmem")
@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_nvlink_carries_the_payload_and_little_more(tmp_path: Path, gpus: int, way: str) -> None:
    args = ("run", "qwen3-30b", *apart(gpus), *WAYS[way], "-T", "512", "-n", "5", "--json")
    said = finish(start(tmp_path, *args)).said
    links, payload = said["nvlink"], np.array(said["payload_bytes"])
    assert links is not None
    if links["total"] is None:
        pytest.skip(f"no counters: {links['why']}")
    assert links["certain"] and links["launches"] >= 6, links
    assert [gpu["ranks"] for gpu in links["gpus"]] == [[rank] for rank in range(gpus)]
    for rank, gpu in enumerate(links["gpus"]):
        assert gpu["payload_tx"] == payload[rank].sum() == payload[:, rank].sum()
        for side in ("tx", "rx"):
            assert 0.99 <= gpu[f"data_over_payload_{side}"] < 1.2, gpu
            assert gpu[f"raw_{side}"] > gpu[f"data_{side}"]


@ways("ipc", "nvshmem")
@pytest.mark.parametrize("gpus", [2, 8])
def test_the_order_of_events_tightens_the_clocks_of_several_gpus(
    tmp_path: Path, gpus: int, way: str
) -> None:
    args = ("trace", "qwen3-30b", *apart(gpus), *WAYS[way], "-T", "512", "-n", "3")
    finish(start(tmp_path, *args, "-o", "run.fmoe", "--json"))
    run = open_run(tmp_path / "run.fmoe")
    clock = run.meta["clock"]
    assert clock["tightening"]["pairs"] > 0 and clock["tightening"]["contradiction_ns"] == 0
    order = order_of(run, Events.of(run.events))
    assert order is not None and order["checked"] > 0 and order["violations"] == 0, order
    for how in clock["ranks"][1:]:
        assert how["tightened"] is not None, clock
        before, after = (
            max(ends[name]["bound_ns"] for name in ("start", "end"))
            for ends in (how, how["tightened"])
        )
        assert after < before / 2, clock


@ways()
def test_pools_that_overflow_grow_on_all_ranks(tmp_path: Path, expected: Any, way: str) -> None:
    tokens, bits = expected("qwen3-30b")
    args = ("run", "qwen3-30b", *shared(2), *WAYS[way], "--tokens", str(tokens))
    job = start(tmp_path, *args, "--save-output", "out.safetensors", FLASHMOE_TEST_POOL_ROWS="64")
    finish(job)
    assert bits_in(tmp_path / "out.safetensors") == bits[1]


def trace_tiny(folder: Path, ranks: int, *more: str, way: str = "ipc") -> Any:
    args = ("trace", "tiny", *shared(ranks), *WAYS[way], "-T", "200", "-o", "run.fmoe")
    return start(folder, *args, *more)


@ways()
def test_a_pe_killed_inside_the_kernel_is_named(tmp_path: Path, way: str) -> None:
    how = ("--fault", "killed:1:kernel:1.0", *STUCK, "--deadline", "2", "--json")
    done = finish(trace_tiny(tmp_path, 3, *how, way=way), 1)
    hang = done.said["hang"]
    assert (hang["cause"], hang["culprit"]) == ("dead", 1), done
    assert "killed by SIGKILL" in hang["reason"]
    # Under MPS the others' memory may be gone with it: the flight recorder is not.
    run = open_run(tmp_path / "run.fmoe")
    assert run.flight is not None and len(run.events["rank"]) >= 0
    assert {wait["rank"] for wait in hang["waits"]} >= {0, 2} or not hang["waits"]
    slots = run.flight
    assert {0, 1, 2} == set(np.asarray(slots["rank"])[np.asarray(slots["epoch"]) > 0].tolist())
    said = [pe["message"] for pe in run.meta["world"]["processes"]["ranks"]]
    assert said[1] == "killed by SIGKILL"


@ways()
def test_a_kill_on_one_of_two_gpus_is_named(tmp_path: Path, way: str) -> None:
    args = ("trace", "tiny", *apart(2), *WAYS[way], "-T", "200", "-o", "run.fmoe")
    how = ("--fault", "killed:1:kernel:1.0", *STUCK, "--deadline", "2", "--json")
    done = finish(start(tmp_path, *args, *how), 1)
    assert "hang" in done.said, done
    hang = done.said["hang"]
    assert (hang["cause"], hang["culprit"]) == ("dead", 1), done
    run = open_run(tmp_path / "run.fmoe")
    # Its GPU is another one's: the survivor's memory is whole, and so is its trace.
    assert 0 in set(np.asarray(run.events["rank"]).tolist())


@ways()
def test_survivors_of_a_kill_end_in_time(tmp_path: Path, way: str) -> None:
    deadline_s = 2.0
    job = trace_tiny(tmp_path, 4, *STUCK, "--deadline", str(deadline_s), way=way)
    job.wait_for("warm-up")
    time.sleep(0.5)
    os.kill(job.pe(2), signal.SIGKILL)
    began = time.monotonic()
    until(lambda: all("rank=" not in line for line in job.pids().values()))
    assert time.monotonic() - began < deadline_s + GRACE_S
    done = finish(job, 1)
    assert "rank 2 is gone: killed by SIGKILL" in done.out


@ways("ipc", "nvshmem")
@pytest.mark.parametrize("point", ["start", "joined"])
def test_a_pe_killed_before_any_launch(tmp_path: Path, point: str, way: str) -> None:
    done = finish(trace_tiny(tmp_path, 3, "--fault", f"killed:1:{point}", "--json", way=way), 1)
    assert "rank 1 is gone: killed by SIGKILL" in done.said["error"]["message"], done
    assert not (tmp_path / "run.fmoe").exists()


@ways()
def test_a_pe_that_raises_inside_the_kernel(tmp_path: Path, way: str) -> None:
    how = ("--fault", "raises:1:kernel:1.0", *STUCK, "--deadline", "4", "--json")
    done = finish(trace_tiny(tmp_path, 3, *how, way=way), 1)
    hang = done.said["hang"]
    assert (hang["cause"], hang["culprit"]) == ("dead", 1), done
    assert "injected at kernel" in hang["reason"]
    # Nobody's context breaks here: the others' traces are whole.
    run = open_run(tmp_path / "run.fmoe")
    assert set(run.events["rank"].to_pylist()) >= {0, 2}


@ways()
def test_ctrl_c_ends_kernels_that_wait(tmp_path: Path, way: str) -> None:
    job = trace_tiny(tmp_path, 3, *STUCK, "--deadline", "60", way=way)
    job.wait_for("warm-up")
    time.sleep(0.5)
    job.process.send_signal(signal.SIGINT)
    began = time.monotonic()
    finish(job, 130)
    assert time.monotonic() - began < 2 * GRACE_S  # of which MPS takes some to go


def test_ctrl_c_keeps_what_had_run(tmp_path: Path) -> None:
    job = trace_tiny(tmp_path, 3, "-n", "60000")
    job.wait_for("running")
    time.sleep(1)
    job.process.send_signal(signal.SIGINT)
    done = finish(job, 130)
    assert "saved what had run: run.fmoe" in done.err
    run = open_run(tmp_path / "run.fmoe")
    assert run.meta["status"] == {"code": 130, "message": "interrupted"}
    assert set(run.events["rank"].to_pylist()) == {0, 1, 2}


@ways("ipc", "nvshmem")
def test_the_launcher_killed_leaves_nothing(tmp_path: Path, way: str) -> None:
    before = leavings()
    job = trace_tiny(tmp_path, 3, *STUCK, "--deadline", "60", way=way)
    job.wait_for("warm-up")
    time.sleep(0.5)
    job.process.kill()
    job.process.wait()
    assert job.left(within=5.0) == []
    until(lambda: leavings() <= before, 1.0)


@ways()
def test_a_hang_is_explained_as_among_virtual_ranks(tmp_path: Path, way: str) -> None:
    done = finish(trace_tiny(tmp_path, 3, *STUCK, "--deadline", "0.5", "--json"), 124)
    hang = done.said["hang"]
    assert hang["cause"] == "lost-signal", done
    assert hang["culprit"] == 0 or 0 in hang["candidates"], done


def test_a_rank_that_never_starts_is_named(tmp_path: Path) -> None:
    how = ("--fault", "never-starts:1", "--deadline", "0.5", "--json")
    done = finish(trace_tiny(tmp_path, 3, *how), 124)
    assert (done.said["hang"]["cause"], done.said["hang"]["culprit"]) == ("never-started", 1), done


@pytest.mark.parametrize("world", ["ipc", pytest.param("nvshmem", marks=needs_nvshmem)])
def test_one_rank_alone_is_an_engine_like_the_local_one(
    world: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, where its heap can be grown and its words read."""
    from torch.distributed import HashStore

    for name in nvshmem.environment(1, True, 1).keys() - os.environ.keys():
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # so that it is gone again after the test
    weights, x = inputs(SMALL, 300)
    job = Store(Place(0, 1, 0, 1, 1, "flashmoe", "", 0), HashStore())
    options = EngineOptions(ranks=1, traced=True, deadline_s=5.0)
    board = Board.make(1)
    engine = builder(world)(SMALL, weights, [len(x)], options, Peers(job, board))
    engine.load([x])
    engine.launch()
    due = local_bits(SMALL, x, 1)
    assert bits_of(engine.outputs()[0].y) == due
    assert engine.rings().headers["count"].min() > 0
    # The launcher reads the slots by its own mapping of the board.
    seen = Board(os.dup(board.fd), 1).flight(len(engine.flight()))
    assert (seen["state"] == schema.ActorState.DONE).all()
    assert (seen == engine.flight()).all()
    assert engine.launch().iteration == 1
    engine._grow_pools(2 * engine.shape["pool_rows"])
    assert engine.launch().iteration == 1, "a launch that runs again keeps its number"
    assert bits_of(engine.outputs()[0].y) == due
    before = torch.cuda.mem_get_info()[0]
    engine.close()
    engine.close()
    assert torch.cuda.mem_get_info()[0] > before


def test_the_doctor_holds_nvshmem_against_the_kernels(tmp_path: Path) -> None:
    done = start(tmp_path, "doctor", "--json").end()
    (said,) = [check for check in done.said["checks"] if check["name"] == "NVSHMEM"]
    info = build_info()
    if "nvshmem" not in info.flavours:
        assert "no cubin for it" in said["found"]
        return
    refused = nvshmem.refusal()
    assert (said["state"] == "ok") == (refused is None), said
    assert f"compiled with {info.nvshmem}" in said["found"]
    if refused is None:
        assert str(nvshmem.installed(nvshmem.LIBRARY)) in said["found"]
        assert str(nvshmem.installed(nvshmem.BINDINGS)) in said["found"]
    else:
        assert said["remedy"]

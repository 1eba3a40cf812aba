"""How heaps are shared by CUDA IPC: who opens, closes and frees what when, with a driver that only
keeps books; and which transport is chosen."""

from __future__ import annotations

import contextlib
import ctypes
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("cuda.bindings.driver")

from cuda.bindings import driver as cuda

from flashmoe.errors import FlashmoeError
from flashmoe.world import gpu_pe, ipc
from flashmoe.world.processes import choose_transport
from flashmoe.world.rendezvous import Job, JobFailed

from .ranks import each_rank


class Result(int):
    """A CUresult: a number with a name."""

    def __new__(cls, value: int, name: str) -> Result:
        made = super().__new__(cls, value)
        made.name = name
        return made

    name: str


SUCCESS = Result(0, "CUDA_SUCCESS")


class Gpu:
    """What all processes' drivers know together: allocations by handle, and who maps them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.heaps: dict[bytes, int] = {}  # handle: rank
        self.mapped: dict[bytes, set[int]] = {}
        self.freed: list[int] = []
        self.wrong: list[str] = []


class Driver:
    """``cuda.bindings.driver`` of one rank, as far as IpcMemory calls it."""

    CUipcMemHandle = cuda.CUipcMemHandle
    CUipcMem_flags = cuda.CUipcMem_flags
    CUdevice_P2PAttribute = cuda.CUdevice_P2PAttribute

    def __init__(self, gpu: Gpu, rank: int) -> None:
        self.gpu, self.rank, self.generation = gpu, rank, 0
        self.bus_id = b"0000:01:00.0"
        self.reaches = True
        self.atomics: int | None = 1  # None: the driver does not say
        self.open_fails: Result | None = None
        self.memory_fails = False
        self._opened: dict[int, bytes] = {}

    def _address(self) -> int:
        return (self.rank + 1 << 40) + (self.generation << 20)

    def cuMemAlloc(self, size: int) -> tuple[Result, int]:
        if self.memory_fails:
            return Result(2, "CUDA_ERROR_OUT_OF_MEMORY"), 0
        self.generation += 1
        handle = random.Random(self._address()).randbytes(64)  # any bytes: they go through text
        with self.gpu.lock:
            self.gpu.heaps[handle], self.gpu.mapped[handle] = self.rank, set()
        self.handle = handle
        return SUCCESS, self._address()

    def cuMemFree(self, address: int) -> tuple[Result]:
        with self.gpu.lock:
            if address != self._address() or self.gpu.mapped[self.handle]:
                self.gpu.wrong.append(f"rank {self.rank} freed a heap that others map")
            self.gpu.freed.append(self.rank)
        return (SUCCESS,)

    def cuIpcGetMemHandle(self, address: int) -> tuple[Result, Any]:
        assert address == self._address()
        handle = cuda.CUipcMemHandle()
        ctypes.memmove(handle.getPtr(), self.handle, 64)
        return SUCCESS, handle

    def cuIpcOpenMemHandle(self, handle: Any, flags: int) -> tuple[Result, int]:
        if self.open_fails is not None:
            return self.open_fails, 0
        assert flags == 1
        said = ctypes.string_at(handle.getPtr(), 64)
        with self.gpu.lock:
            owner = self.gpu.heaps[said]
            self.gpu.mapped[said].add(self.rank)
        address = (owner + 1 << 44) + self.rank
        self._opened[address] = said
        return SUCCESS, address

    def cuIpcCloseMemHandle(self, address: int) -> tuple[Result]:
        time.sleep(0.01 * self.rank)  # some are slower than others
        with self.gpu.lock:
            self.gpu.mapped[self._opened.pop(address)].remove(self.rank)
        return (SUCCESS,)

    def cuDeviceGet(self, device: int) -> tuple[Result, int]:
        return SUCCESS, device

    def cuDeviceGetPCIBusId(self, length: int, device: int) -> tuple[Result, bytes]:
        return SUCCESS, self.bus_id.ljust(length, b"\0")

    def cuDeviceGetByPCIBusId(self, bus_id: bytes) -> tuple[Result, int]:
        return SUCCESS, 7

    def cuDeviceCanAccessPeer(self, own: int, other: int) -> tuple[Result, int]:
        return SUCCESS, int(self.reaches)

    def cuDeviceGetP2PAttribute(self, attribute: Any, own: int, other: int) -> tuple[Result, int]:
        assert (int(attribute), own, other) == (3, 0, 7)  # native atomics; from here to there
        if self.atomics is None:
            return Result(1, "CUDA_ERROR_INVALID_VALUE"), 0
        return SUCCESS, self.atomics


class Memory(ipc.IpcMemory):
    """In a thread: a process has one driver, and a machine without a GPU no device to choose."""

    def __init__(self, driver: Driver, job: Job) -> None:
        super().__init__(torch.device("cuda", 0), job)
        self.driver = driver

    def _device(self) -> Any:
        HERE.driver = self.driver
        return contextlib.nullcontext()


HERE = threading.local()


class Chosen:
    """The driver of the thread that asks."""

    def __getattr__(self, name: str) -> Any:
        return getattr(HERE.driver, name)


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuda.bindings.driver", Chosen())
    monkeypatch.setattr(gpu_pe, "device_tensor", lambda address, nbytes, device: (address, nbytes))


def on_each(ranks: int, act: Callable[[Memory], Any], prepare: Any = None) -> tuple[Gpu, list[Any]]:
    """What ``act`` gives on each rank, all at once; an exception is given like a result."""
    gpu = Gpu()

    def one(job: Job) -> Any:
        driver = HERE.driver = Driver(gpu, job.rank)
        if prepare is not None:
            prepare(driver)
        return act(Memory(driver, job))

    out = each_rank(ranks, one, timeout_s=20)
    assert gpu.wrong == []
    return gpu, out


def test_each_rank_maps_each_others_heap_and_knows_its_own() -> None:
    def act(memory: Memory) -> Any:
        ((own, size),) = memory.allocate(4096)
        assert size == 4096
        return own, memory.peers()

    gpu, out = on_each(4, act)
    for rank, (own, table) in enumerate(out):
        expected = [(peer + 1 << 44) + rank for peer in range(4)]
        expected[rank] = own
        assert table == expected
    assert [len(users) for users in gpu.mapped.values()] == [3] * 4


def test_a_heap_is_freed_when_nobody_maps_it_and_another_takes_its_place() -> None:
    def act(memory: Memory) -> Any:
        tables = []
        for size in (4096, 8192):
            memory.allocate(size)
            tables.append(memory.peers())
            memory.free()
        memory.close()
        return tables

    gpu, out = on_each(3, act)
    assert sorted(gpu.freed) == [0, 0, 1, 1, 2, 2]
    for rank, (before, after) in enumerate(out):
        assert before[rank] != after[rank]


def test_a_rank_that_does_not_come_any_more_leaves_the_others_heaps_mapped() -> None:
    def act(memory: Memory) -> Any:
        memory.allocate(4096)
        memory.peers()
        if memory.job.rank == 1:
            memory.job.fail("rank 1 is gone")
            return None
        memory.close()
        memory.close()
        return None

    gpu, out = on_each(3, act)
    assert out == [None] * 3
    assert gpu.freed == []


def test_gpus_without_peer_access_are_named() -> None:
    def prepare(driver: Driver) -> None:
        driver.bus_id = b"0000:0%d:00.0" % driver.rank
        driver.reaches = False

    def act(memory: Memory) -> Any:
        memory.allocate(4096)
        return memory.peers()

    _, out = on_each(2, act, prepare)
    error = next(e for e in out if isinstance(e, FlashmoeError) and not isinstance(e, JobFailed))
    assert "on the GPU at 0000:0" in error.message
    assert "does not reach the heap of rank" in error.message
    assert "P2P" in error.hint


def on_two_gpus(atomics: int | None) -> tuple[Gpu, list[Any]]:
    def prepare(driver: Driver) -> None:
        driver.bus_id = b"0000:0%d:00.0" % driver.rank
        driver.atomics = atomics

    def act(memory: Memory) -> Any:
        memory.allocate(4096)
        return memory.peers()

    return on_each(2, act, prepare)


def test_gpus_that_do_not_add_atomically_are_named_before_a_heap_is_mapped() -> None:
    gpu, out = on_two_gpus(0)
    assert not any(gpu.mapped.values())
    error = next(e for e in out if isinstance(e, FlashmoeError) and not isinstance(e, JobFailed))
    assert "on the GPU at 0000:0" in error.message and "without atomic adds" in error.message
    assert "--transport nvshmem" in error.hint


@pytest.mark.parametrize("atomics", [1, None])
def test_gpus_that_add_atomically_as_far_as_the_driver_says_are_joined(atomics: int | None) -> None:
    gpu, out = on_two_gpus(atomics)
    assert [len(users) for users in gpu.mapped.values()] == [1, 1]
    assert all(isinstance(table, list) for table in out)


def test_ranks_on_one_gpu_are_not_asked_how_it_reaches_itself() -> None:
    def act(memory: Memory) -> Any:
        memory.allocate(4096)
        return memory.peers()

    def prepare(driver: Driver) -> None:
        driver.reaches, driver.atomics = False, 0  # what a driver says of a GPU and itself

    gpu, out = on_each(2, act, prepare)
    assert [len(users) for users in gpu.mapped.values()] == [1, 1] and all(out)


def test_a_handle_that_does_not_open_says_what_the_driver_says() -> None:
    def prepare(driver: Driver) -> None:
        if driver.rank == 1:
            driver.open_fails = Result(217, "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED")

    def act(memory: Memory) -> Any:
        memory.allocate(4096)
        return memory.peers()

    _, out = on_each(2, act, prepare)
    assert "rank 0: CUDA_ERROR_PEER_ACCESS_UNSUPPORTED" in out[1].message


def test_a_handle_of_a_rank_that_has_failed_says_so() -> None:
    def act(memory: Memory) -> Any:
        memory.allocate(4096)
        if memory.job.rank == 0:
            table = memory.peers()
            memory.job.fail("rank 0 is gone: killed by SIGKILL")  # as the launcher says of it
            failed.set()
            return table
        return memory.peers()

    failed = threading.Event()

    def prepare(driver: Driver) -> None:
        if driver.rank == 1:

            def fails(handle: Any, flags: int) -> tuple[Result, int]:
                assert failed.wait(20)
                return Result(201, "CUDA_ERROR_INVALID_CONTEXT"), 0

            driver.cuIpcOpenMemHandle = fails  # type: ignore[method-assign]

    _, out = on_each(2, act, prepare)
    assert isinstance(out[1], JobFailed)
    assert "rank 0 is gone: killed by SIGKILL" in out[1].message


def test_memory_that_is_not_there_is_told_in_bytes() -> None:
    def act(memory: Memory) -> Any:
        memory.driver.memory_fails = memory.job.rank == 1
        memory.allocate(3 << 30)
        return memory.peers()

    _, out = on_each(2, act)
    assert "3.2 GB (3221225472 bytes) to rank 1: CUDA_ERROR_OUT_OF_MEMORY" in out[1].message
    assert isinstance(out[0], JobFailed)


def test_which_transport_and_why() -> None:
    assert choose_transport("auto", "local") == ("ipc", "all ranks are on one node")
    assert choose_transport("ipc", "local") == ("ipc", "asked for")
    assert choose_transport("auto", "host")[0] == "host"


@pytest.mark.parametrize(("more", "match"), [({"no_pointers": True}, "--no-pointers"),
                                             ({"nodes": 2}, "one node")])  # fmt: skip
def test_what_ipc_cannot_do_is_a_usage_error(more: dict[str, Any], match: str) -> None:
    with pytest.raises(FlashmoeError, match=match) as caught:
        choose_transport("ipc", "local", **more)
    assert caught.value.exit_code == 2
    assert "--transport nvshmem" in caught.value.hint


def test_torch_is_looked_at_without_importing_it() -> None:
    from flashmoe.session import _torch_has_cuda

    assert _torch_has_cuda() == (torch.version.cuda is not None)

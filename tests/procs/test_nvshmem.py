"""The nvshmem world without a GPU: whether it can be had, NVSHMEM's environment, and its collective
calls, on a library that keeps books and notices where one would wait for ever."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from flashmoe import nvlink
from flashmoe.build_info import BuildInfo, Cubin
from flashmoe.errors import FlashmoeError
from flashmoe.nvlink import Reach
from flashmoe.world import gpu_pe, kernel, nvshmem
from flashmoe.world.base import EngineOptions
from flashmoe.world.processes import choose_transport
from flashmoe.world.rendezvous import Job, JobFailed

from .ranks import each_rank

BUILD = BuildInfo(
    version="0.1.0",
    commit=None,
    dirty=None,
    built=None,
    system=None,
    python=None,
    cxx=None,
    nvcc="13.0.88",
    why_no_host_engine="",
    cubins=(
        Cubin("moe_p2p_sm90a.cubin", "moe", "sm_90a", "p2p"),
        Cubin("moe_nvshmem_sm90a.cubin", "moe", "sm_90a", "nvshmem"),
    ),
    why_no_cubins="",
    nvshmem="3.4.5",
)


# -- whether it can be had -----------------------------------------------------------------------


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What pip would say is installed, for a test to change."""
    versions = {nvshmem.LIBRARY: "3.4.5", nvshmem.BINDINGS: "0.4.1"}
    monkeypatch.setattr(nvshmem, "installed", versions.get)
    monkeypatch.setattr(nvshmem, "build_info", lambda: BUILD)
    return versions


@pytest.mark.parametrize(
    ("library", "built", "old"),
    [
        ("3.4.5", "3.4.5", False),
        ("3.8.0", "3.4.5", False),
        ("3.10.1", "3.4.5", False),
        ("3.4.5.post1", "3.4.5", False),
        ("3.3.9", "3.4.5", True),
        ("3.4.4", "3.4.5", True),
        ("3.4.5", "3.8.0", True),
    ],
)
def test_an_older_library_does_not_load_what_was_compiled_with_a_newer_one(
    packages: dict[str, str], library: str, built: str, old: bool
) -> None:
    assert nvshmem.too_old(library, built) == old
    packages[nvshmem.LIBRARY] = library
    info = BuildInfo(**{**vars(BUILD), "nvshmem": built})
    refused = nvshmem.refusal(info)
    assert (refused is not None) == old
    if refused is not None:
        assert library in refused.message and built in refused.message
        assert refused.hint == f"pip install 'nvidia-nvshmem-cu13>={built}'"
        assert refused.exit_code == 5


@pytest.mark.parametrize("lacking", [nvshmem.LIBRARY, nvshmem.BINDINGS])
def test_what_is_not_installed_is_named_with_the_extra(
    packages: dict[str, str], lacking: str
) -> None:
    del packages[lacking]
    with pytest.raises(FlashmoeError, match=lacking) as caught:
        choose_transport("nvshmem", "local")
    assert caught.value.exit_code == 5
    assert "pip install 'flashmoe-prof[nvshmem]'" in caught.value.hint
    assert "--transport ipc" in caught.value.hint


def test_a_build_without_its_kernel_says_why(packages: dict[str, str]) -> None:
    without = {**vars(BUILD), "cubins": BUILD.cubins[:1], "nvshmem": None}
    info = BuildInfo(**{**without, "why_no_nvshmem": "no nvidia-nvshmem-cu13 in the build"})
    refused = nvshmem.refusal(info)
    assert refused is not None
    assert "no nvidia-nvshmem-cu13 in the build" in refused.message


def test_which_transport_and_why(packages: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = {(0, 1): True, (1, 0): True}
    atomics = True

    def matrix() -> list[list[Reach | None]]:
        cells = [[(i, j) for j in range(2)] for i in range(2)]
        return [
            [Reach(pairs[c], False, atomics) if c in pairs else None for c in row] for row in cells
        ]

    monkeypatch.setattr(nvlink, "p2p_matrix", matrix)
    assert choose_transport("auto", "local", gpus=2) == ("ipc", "all ranks are on one node")
    assert choose_transport("nvshmem", "local", gpus=2) == ("nvshmem", "asked for")
    name, why = choose_transport("auto", "local", nodes=2)
    assert name == "nvshmem" and "2" in why and "node" in why
    name, why = choose_transport("auto", "local", no_pointers=True)
    assert name == "nvshmem" and "--no-pointers" in why
    pairs[1, 0] = False
    name, why = choose_transport("auto", "local", gpus=2)
    assert name == "nvshmem" and "GPU 1 does not reach GPU 0 by pointers" in why
    with pytest.raises(FlashmoeError, match="GPU 1 does not reach GPU 0"):
        choose_transport("ipc", "local", gpus=2)
    # Both ranks on one GPU: the other one is nobody's.
    assert choose_transport("auto", "local", gpus=1)[0] == "ipc"
    pairs[1, 0], atomics = True, False
    name, why = choose_transport("auto", "local", gpus=2)
    assert name == "nvshmem" and "GPU 0 reaches GPU 1" in why and "without atomic adds" in why
    with pytest.raises(FlashmoeError, match="without atomic adds"):
        choose_transport("ipc", "local", gpus=2)
    assert choose_transport("auto", "local", gpus=1)[0] == "ipc"


def test_only_bf16_is_compiled(packages: dict[str, str]) -> None:
    config: Any = SimpleNamespace(dtype="fp16")
    peers: Any = None
    with pytest.raises(FlashmoeError, match="bf16 alone") as caught:
        nvshmem.pe_engine(config, peers, [1], EngineOptions(), peers)
    assert caught.value.exit_code == 2


# -- environment ---------------------------------------------------------------------------------


def test_one_node_takes_no_network_and_no_multicast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NVSHMEM_REMOTE_TRANSPORT", "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NVSHMEM_DISABLE_NVLS", "0")
    found = nvshmem.environment(1, True, 5 * 2**20 + 1)
    assert found == {
        "NVSHMEM_DISABLE_NVLS": "1",
        "NVSHMEM_DISABLE_NCCL": "1",
        "NVSHMEM_IGNORE_CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "1",
        "NVSHMEM_IB_ENABLE_IBGDA": "0",
        "NVSHMEM_SYMMETRIC_SIZE": "6M",
        "NVSHMEM_REMOTE_TRANSPORT": "none",
        "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "lo",
    }


def test_the_network_is_the_users_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", "eth1")
    monkeypatch.setenv("NVSHMEM_REMOTE_TRANSPORT", "libfabric")
    found = nvshmem.environment(1, True, 1)
    assert found["NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME"] == "eth1"
    assert found["NVSHMEM_REMOTE_TRANSPORT"] == "libfabric"
    assert "NVSHMEM_REMOTE_TRANSPORT" not in nvshmem.environment(2, True, 1)
    assert "NVSHMEM_REMOTE_TRANSPORT" not in nvshmem.environment(1, False, 1)


def test_sockets_of_those_that_were_killed_are_removed_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvshmem, "_SOCKETS", tmp_path)
    others = {"nvshmem-socket-13-14", "nvshmem-socket-112-112", "nvshmem-socket-x-y", "12-12"}
    for name in others | {"nvshmem-socket-12-12", "nvshmem-socket-11-13", "nvshmem-socket-13-11"}:
        (tmp_path / name).touch()
    nvshmem.tidy({11, 12})
    assert {path.name for path in tmp_path.iterdir()} == others


# -- its collective calls ------------------------------------------------------------------------


class Library:
    """NVSHMEM among threads, one a PE.  A collective call that some PE does not make would wait for
    ever: here it is noted after a while."""

    def __init__(self, ranks: int, patience_s: float = 5.0) -> None:
        self.lock = threading.Lock()
        self.here = threading.local()
        self.meet = threading.Barrier(ranks, timeout=patience_s)
        self.calls: list[tuple[int, str]] = []
        self.wrong: list[str] = []
        self.ids: dict[int, bytes] = {}
        self.out_of_reach: set[int] = set()
        self.no_memory: set[int] = set()
        self.without_atomics: set[tuple[int, int]] = set()  # who says so, of whom
        self.version = "3.4.5"

    def note(self, what: str) -> None:
        with self.lock:
            self.calls.append((self.here.rank, what))

    def collective(self, what: str) -> None:
        self.note(what)
        try:
            self.meet.wait()
        except threading.BrokenBarrierError:
            with self.lock:
                self.wrong.append(f"rank {self.here.rank} waits for ever in {what}")

    def modules(self) -> dict[str, ModuleType]:
        """What ``import nvshmem.core`` and ``from nvshmem import bindings`` are to find."""
        core, bindings = ModuleType("nvshmem.core"), ModuleType("nvshmem.bindings")

        class UniqueID:
            def __init__(self, content: bytes) -> None:
                self.buffer = ctypes.create_string_buffer(content, 128)
                self.ptr = ctypes.addressof(self.buffer)

        def get_unique_id(empty: bool = False) -> UniqueID:
            if not empty:
                self.note("get_unique_id")
            return UniqueID(b"" if empty else bytes(range(128)))

        def init(
            device: Any = None,
            uid: Any = None,
            rank: Any = None,
            nranks: Any = None,
            mpi_comm: Any = None,
            initializer_method: str = "",
        ) -> None:
            assert initializer_method == "uid" and rank == self.here.rank
            self.ids[rank] = uid.buffer.raw
            self.collective("init")

        def malloc(size: int) -> int:
            self.collective("malloc")
            return 0 if self.here.rank in self.no_memory else 1 << 40

        def ptr(address: int, pe: int) -> int:
            return 0 if pe in self.out_of_reach else address + (pe + 1 << 20)

        core.get_version = lambda: SimpleNamespace(libnvshmem_version=self.version)
        core.get_unique_id = get_unique_id
        core.init = init
        core.library_init = lambda obj: self.note(f"library_init {obj}")
        core.NvshmemKernelObject = SimpleNamespace(from_handle=lambda handle: handle)
        core.finalize = lambda: self.collective("finalize")
        bindings.malloc, bindings.ptr = malloc, ptr
        bindings.free = lambda address: self.collective("free")
        package = ModuleType("nvshmem")
        package.core, package.bindings = core, bindings
        return {"nvshmem": package, "nvshmem.core": core, "nvshmem.bindings": bindings}


class Memory(nvshmem.NvshmemMemory):
    """In a thread, on a machine without a GPU: no device to choose, no stream to wait for."""

    quiets = 0

    def _device(self) -> Any:
        return contextlib.nullcontext()

    def _quiet(self) -> None:
        self.quiets += 1


@pytest.fixture
def on_each(
    monkeypatch: pytest.MonkeyPatch, packages: dict[str, str]
) -> Callable[..., tuple[Library, list[Any]]]:
    """Runs ``act`` on each rank, all at once; an exception is given like a result."""
    pytest.importorskip("cuda.core")
    monkeypatch.setattr(nvshmem, "unreached", lambda: None)
    monkeypatch.setattr(gpu_pe, "device_tensor", lambda address, nbytes, device: (address, nbytes))
    monkeypatch.setattr(kernel, "code", lambda device, flavour: SimpleNamespace(handle=77))
    monkeypatch.setattr("cuda.core.Device", lambda index: index)
    for name in os.environ:
        if name.startswith("NVSHMEM_"):
            monkeypatch.delenv(name)

    def run(
        ranks: int,
        act: Callable[[Memory], Any],
        no_pointers: bool = False,
        prepare: Callable[[Library], None] = lambda library: None,
    ) -> tuple[Library, list[Any]]:
        library = Library(ranks)
        prepare(library)

        def atomics_with(device: int, uuids: list[bytes]) -> list[bool]:
            return [(library.here.rank, uuid[0]) not in library.without_atomics for uuid in uuids]

        monkeypatch.setattr(gpu_pe, "device_uuid", lambda device: bytes([library.here.rank] * 16))
        monkeypatch.setattr(gpu_pe, "atomics_with", atomics_with)
        for name, module in library.modules().items():
            monkeypatch.setitem(sys.modules, name, module)

        def one(job: Job) -> Any:
            library.here.rank = job.rank
            return act(Memory(torch.device("cuda", 0), job, no_pointers))

        out = each_rank(ranks, one, timeout_s=10)
        for name in [n for n in os.environ if n.startswith("NVSHMEM_")]:
            monkeypatch.delenv(name)
        return library, out

    return run


def called(library: Library, what: str) -> list[int]:
    return sorted(rank for rank, call in library.calls if call == what)


def test_pe_0_makes_the_id_and_all_start_with_it(on_each: Any) -> None:
    library, out = on_each(3, lambda memory: memory.allocate(4096)[0][1])
    assert out == [4096] * 3 and library.wrong == []
    assert called(library, "get_unique_id") == [0]
    assert set(library.ids.values()) == {bytes(range(128))}
    for rank in range(3):  # the kernel's module learns of the heap once there is one
        own = [call for r, call in library.calls if r == rank]
        assert own[-3:] == ["init", "library_init 77", "malloc"]


def test_who_is_beyond_pointers_has_no_address(on_each: Any) -> None:
    def act(memory: Memory) -> Any:
        memory.allocate(4096)
        table = memory.peers()
        memory.barrier()
        return table, memory.quiets

    own, near = 1 << 40, [(1 << 40) + (pe + 1 << 20) for pe in range(3)]
    _, out = on_each(3, act)
    assert out[1] == ([near[0], own, near[2]], 0)
    _, out = on_each(3, act, prepare=lambda made: made.out_of_reach.add(2))
    # What has been put must have arrived before a signal may be cleared.
    assert [out[0], out[2]] == [([own, near[1], 0], 1), ([near[0], near[1], own], 0)]
    _, out = on_each(3, act, no_pointers=True)
    assert out[1] == ([0, own, 0], 1)


def test_who_is_reached_without_atomic_adds_is_beyond_pointers_for_both(on_each: Any) -> None:
    def act(memory: Memory) -> Any:
        memory.allocate(4096)
        table = memory.peers()
        memory.barrier()
        return table, memory.quiets

    own, near = 1 << 40, [(1 << 40) + (pe + 1 << 20) for pe in range(3)]
    # One of the two says so: rank 0 must not store what rank 2 awaits by put.
    _, out = on_each(3, act, prepare=lambda made: made.without_atomics.add((2, 0)))
    assert out == [([own, near[1], 0], 1), ([near[0], own, near[2]], 0), ([0, near[1], own], 1)]


class Driver:
    """``cuda.bindings.driver`` on a machine of three GPUs, of which this process is shown two."""

    CUdevice_P2PAttribute = SimpleNamespace(CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED=3)

    def __init__(self) -> None:
        self.atomics = {(10, 11): 1, (11, 10): 1}  # by CUdevice, from and to
        self.asked: list[tuple[int, int]] = []

    def cuDeviceGetCount(self) -> tuple[int, int]:
        return 0, 2

    def cuDeviceGet(self, index: int) -> tuple[int, int]:
        return 0, 10 + index

    def cuDeviceGetUuid(self, device: int) -> tuple[int, Any]:
        self.buffer = ctypes.create_string_buffer(bytes([device] * 16), 16)
        return 0, SimpleNamespace(getPtr=lambda: ctypes.addressof(self.buffer))

    def cuDeviceGetP2PAttribute(self, attribute: int, own: int, other: int) -> tuple[int, int]:
        assert attribute == 3
        self.asked.append((own, other))
        return 0, self.atomics[own, other]


def test_whose_adds_are_atomic_is_asked_both_ways_and_of_no_gpu_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("cuda.bindings.driver")
    driver = Driver()
    monkeypatch.setattr("cuda.bindings.driver", driver)
    own, near, not_shown = (bytes([name] * 16) for name in (10, 11, 12))
    ranks = [own, near, not_shown, own]
    assert gpu_pe.atomics_with(0, ranks) == [True] * 4
    assert driver.asked == [(10, 11), (11, 10)]
    for way in ((10, 11), (11, 10)):
        driver.atomics = {(10, 11): 1, (11, 10): 1, way: 0}
        assert gpu_pe.atomics_with(0, ranks) == [True, False, True, True]
        assert gpu_pe.atomics_with(1, [own, near]) == [False, True]


def test_heaps_are_freed_together_and_another_takes_their_place(on_each: Any) -> None:
    def act(memory: Memory) -> None:
        for size in (4096, 8192):
            memory.allocate(size)
            memory.peers()
            if size == 4096:
                memory.free()
        memory.close()
        memory.close()

    library, out = on_each(2, act)
    assert out == [None, None] and library.wrong == []
    assert called(library, "init") == called(library, "finalize") == [0, 1]
    assert called(library, "free") == [0, 0, 1, 1]


def test_nothing_collective_is_called_once_a_rank_is_known_to_have_failed(on_each: Any) -> None:
    # Else a rank could hear of the failure while it still asks for its peers.
    all_have_peers = threading.Barrier(3)

    def act(memory: Memory) -> None:
        memory.allocate(4096)
        memory.peers()
        all_have_peers.wait(10)
        if memory.job.rank == 1:
            memory.job.fail("rank 1 is gone: killed by SIGKILL")
            return
        while memory.job.failure() is None:
            pass
        memory.close()
        memory.close()

    library, out = on_each(3, act)
    assert out == [None] * 3 and library.wrong == []
    assert called(library, "free") == called(library, "finalize") == []


def test_a_rank_that_is_gone_before_the_start_is_named_and_nobody_hangs(on_each: Any) -> None:
    def act(memory: Memory) -> Any:
        if memory.job.rank == 2:
            memory.job.fail("rank 2 is gone: killed by SIGKILL")
            return None
        return memory.allocate(4096)

    library, out = on_each(3, act)
    assert [type(e) for e in out[:2]] == [JobFailed, JobFailed]
    assert "rank 2 is gone" in out[0].message
    assert library.wrong == [] and called(library, "init") == []


def test_memory_that_is_not_there_is_told_in_bytes(on_each: Any) -> None:
    def act(memory: Memory) -> Any:
        memory.allocate(3 << 30)
        return memory.peers()

    library, out = on_each(2, act, prepare=lambda made: made.no_memory.add(1))
    assert "3.2 GB (3221225472 bytes) to rank 1" in out[1].message
    assert isinstance(out[0], JobFailed) and library.wrong == []


def test_the_library_that_is_loaded_counts_not_the_one_pip_knows(on_each: Any) -> None:
    def prepare(library: Library) -> None:
        library.version = "3.3.9"

    library, out = on_each(2, lambda memory: memory.allocate(4096), prepare=prepare)
    assert all("NVSHMEM 3.3.9 is installed" in e.message for e in out)
    assert called(library, "init") == []


def test_the_real_bindings_have_what_is_called() -> None:
    core = pytest.importorskip("nvshmem.core", reason="the extra nvshmem is not installed")
    bindings = pytest.importorskip("nvshmem.bindings")
    assert nvshmem.numbers(core.get_version().libnvshmem_version) >= (3, 4, 5)
    empty = core.get_unique_id(empty=True)
    made = core.get_unique_id()
    ctypes.memmove(empty.ptr, ctypes.string_at(made.ptr, nvshmem._UID_BYTES), nvshmem._UID_BYTES)
    assert empty == made
    assert empty._data.nbytes == nvshmem._UID_BYTES
    for name in ("malloc", "free", "ptr", "quiet_on_stream"):
        assert callable(getattr(bindings, name))
    assert core.NvshmemKernelObject.from_handle(5).handle == 5
    assert callable(core.library_init) and callable(core.finalize)

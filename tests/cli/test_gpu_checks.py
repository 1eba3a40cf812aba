"""The doctor's view of several GPUs, and NVLink's counters, on an NVML that is made up."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from flashmoe import nvlink
from flashmoe.world import nvshmem
from flashmoe_cli import gpu_checks


class NVMLError(Exception):
    """As pynvml raises it."""


class FakeNvml:
    """Two Hopper GPUs on NVLink; what a test changes, it changes on the instance."""

    NVMLError = NVMLError
    NVML_SUCCESS = 0
    NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX = 138
    NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX = 139
    NVML_FI_DEV_NVLINK_THROUGHPUT_RAW_TX = 140
    NVML_FI_DEV_NVLINK_THROUGHPUT_RAW_RX = 141
    NVML_NVLINK_MAX_LINKS = 36
    NVML_P2P_CAPS_INDEX_READ = (0,)  # as some versions of pynvml hold it
    NVML_P2P_CAPS_INDEX_WRITE = 1
    NVML_P2P_CAPS_INDEX_NVLINK = 2
    NVML_P2P_STATUS_OK = 0
    NVML_COMPUTEMODE_EXCLUSIVE_THREAD = 1
    NVML_COMPUTEMODE_PROHIBITED = 2
    NVML_COMPUTEMODE_EXCLUSIVE_PROCESS = 3

    def __init__(self) -> None:
        self.gpus = 2
        self.kib = dict.fromkeys((138, 139, 140, 141), 0)
        self.down: set[int] = set()
        self.p2p: dict[int, int] = {}
        self.mode = 0
        self.mig = [0, 0]

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return self.gpus

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index >= self.gpus:
            raise NVMLError("no such GPU")
        return index

    def nvmlDeviceGetFieldValues(self, handle: int, wanted: list[Any]) -> list[Any]:
        assert all(scope == 0xFFFFFFFF for _, scope in wanted)  # of all links together
        return [
            SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(ullVal=self.kib[field]))
            for field, _ in wanted
        ]

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        if link >= 18:
            raise NVMLError("not supported")
        return int(link not in self.down)

    def nvmlDeviceGetNvLinkVersion(self, handle: int, link: int) -> int:
        return 4

    def nvmlDeviceGetP2PStatus(self, a: int, b: int, index: int) -> int:
        assert isinstance(index, int)
        return self.p2p.get(index, 0)

    def nvmlDeviceGetComputeMode(self, handle: int) -> int:
        return self.mode

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        return self.mig


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/nowhere")
    return fake


def test_p2p(nvml: FakeNvml) -> None:
    check = gpu_checks.p2p()
    assert check is not None and check.state == "ok"
    assert ". N | N ." in check.found
    nvml.p2p = {2: 5}
    check = gpu_checks.p2p()
    assert check is not None and check.state == "warn" and ". P | P ." in check.found
    nvml.p2p = {1: 3}
    check = gpu_checks.p2p()
    assert check is not None and ". - | - ." in check.found and "put-with-signal" in check.remedy
    nvml.gpus = 1
    assert gpu_checks.p2p() is None


def test_links(nvml: FakeNvml) -> None:
    check = gpu_checks.nvlink(0)
    assert check is not None and check.state == "ok"
    assert check.found == "18 of 18 links up, version 4"
    nvml.down = {3, 7}
    check = gpu_checks.nvlink(0)
    assert check is not None and check.state == "warn"
    assert check.found == "16 of 18 links up, version 4; down: 3, 7"
    assert check.remedy


def test_mps(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    def state() -> tuple[str, str]:
        check = gpu_checks.mps(0)
        assert check is not None
        return check.state, check.found

    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr("flashmoe.world.mps.FOLDERS", (str(tmp_path / "bin"),))
    assert state()[0] == "warn"
    assert f"neither on PATH nor in {tmp_path / 'bin'}" in state()[1]
    control = tmp_path / "bin" / "nvidia-cuda-mps-control"
    control.touch(0o755)
    assert state() == ("ok", f"none runs; --ranks-per-gpu starts {control}")
    nvml.mode = 3
    assert state() == ("warn", "the GPU's compute mode is exclusive: one process at a time")
    nvml.mode = 2
    assert state()[0] == "fail"
    nvml.mode = 0
    (tmp_path / "control").touch()
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert state() == ("warn", f"a control daemon's pipe is in {tmp_path}")
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "25")
    assert state()[1].startswith("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=25")


def test_mig(nvml: FakeNvml) -> None:
    for mode, state in (([0, 0], "ok"), ([1, 1], "warn"), ([0, 1], "warn")):
        nvml.mig = mode
        check = gpu_checks.mig(0)
        assert check is not None and check.state == state


@pytest.mark.parametrize(
    ("flavours", "library", "bindings", "state"),
    [
        ((), None, None, "ok"),
        (("nvshmem", "p2p"), None, None, "warn"),
        (("nvshmem", "p2p"), "3.4.5", None, "warn"),
        (("nvshmem", "p2p"), "3.4.5", "0.3.1", "ok"),
        (("nvshmem", "p2p"), "3.8.1", "0.4.1", "ok"),
        (("nvshmem", "p2p"), "3.3.9", "0.3.1", "fail"),
    ],
)
def test_nvshmem(
    nvml: FakeNvml,
    monkeypatch: pytest.MonkeyPatch,
    flavours: Any,
    library: Any,
    bindings: Any,
    state: str,
) -> None:
    info = SimpleNamespace(flavours=flavours, nvshmem="3.4.5")
    monkeypatch.setattr("flashmoe.build_info.build_info", lambda: info)
    versions = {nvshmem.LIBRARY: library, nvshmem.BINDINGS: bindings}
    monkeypatch.setattr(nvshmem, "installed", versions.get)
    check = gpu_checks.nvshmem()
    assert check is not None and check.state == state
    assert (check.state == "ok") != bool(check.remedy)


def test_without_nvml_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    for check in (gpu_checks.p2p(), gpu_checks.nvlink(0), gpu_checks.mps(0), gpu_checks.mig(0),
                  gpu_checks.nvshmem()):  # fmt: skip
        assert check is None
    assert nvlink.read_counters() is None


def test_counters_are_read_around_enough_launches(nvml: FakeNvml) -> None:
    ran = 0

    def launch() -> None:
        nonlocal ran
        ran += 1
        for field, kib in ((138, 100), (139, 90), (140, 125), (141, 120)):
            nvml.kib[field] += kib

    nvml.kib = dict.fromkeys(nvml.kib, 7)  # counted since the driver was loaded
    found = nvlink.measure(launch)
    assert found is not None and found.certain
    assert found.launches == ran
    assert found.bytes == nvlink.Counters(*(kib * 1024 * ran for kib in (100, 90, 125, 120)))
    assert found.bytes.data_rx >= nvlink.ENOUGH_STEPS * nvlink.STEP_BYTES

    ran = 0
    known = nvlink.measure(launch, payload_bytes=90 * 1024)
    assert known is not None and known.launches == ran == 12  # 1000 steps of a KiB, 90 a launch

    few = nvlink.measure(launch, most=3)
    assert few is not None and few.launches == 3 and not few.certain


def test_a_gpu_without_counters_gives_none(nvml: FakeNvml) -> None:
    def refuse(handle: int, wanted: list[Any]) -> list[Any]:
        return [SimpleNamespace(nvmlReturn=3, value=None) for _ in wanted]

    nvml.nvmlDeviceGetFieldValues = refuse  # type: ignore[method-assign]
    assert nvlink.read_counters() is None
    assert nvlink.measure(lambda: None) is None

"""The doctor's view of several GPUs, and NVLink's counters, on an NVML that is made up."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from flashmoe import nvlink
from flashmoe.world import nvshmem
from flashmoe_cli import gpu_checks

from ..fake_nvml import FakeNvml


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
    for nvml.p2p, row in (({2: 5, 3: 5}, ". Pa | Pa ."), ({3: 2}, ". Na | Na .")):
        check = gpu_checks.p2p()
        assert check is not None and check.state == "warn" and row in check.found
        assert "a: without atomic adds" in check.found and "put-with-signal" in check.remedy
        assert nvlink.unreached() is None and nvlink.without_atomics() == (0, 1)
    nvml.p2p = {3: None}  # no answer is no refusal
    check = gpu_checks.p2p()
    assert check is not None and check.state == "ok" and nvlink.without_atomics() is None
    nvml.p2p = {1: 3, 3: 5}
    assert nvlink.unreached() == (0, 1) and nvlink.without_atomics() is None
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
    with pytest.raises(nvlink.NoCountersError, match="nvidia-ml-py is not installed"):
        nvlink.read_counters()


def test_counters_are_read_once_nothing_moves(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml.kib[1] = dict(zip((138, 139, 140, 141), (100, 90, 125, 120), strict=True))
    monkeypatch.setattr(nvlink, "SETTLE_S", 0.0)
    assert nvlink.read_counters(1) == (
        nvlink.Counters(*(kib * 1024 for kib in (100, 90, 125, 120))),
        True,
    )
    still = nvml.nvmlDeviceGetFieldValues

    def moving(readings: int) -> Any:
        def read(handle: int, wanted: list[Any]) -> list[Any]:
            nonlocal readings
            readings -= 1
            if readings > 0:
                nvml.kib[1][139] += 5
            return still(handle, wanted)

        return read

    monkeypatch.setattr(nvml, "nvmlDeviceGetFieldValues", moving(4))
    found, settled = nvlink.read_counters(1)
    assert settled and found.data_rx == (90 + 3 * 5) * 1024
    monkeypatch.setattr(nvml, "nvmlDeviceGetFieldValues", moving(1000))
    assert not nvlink.read_counters(1)[1]


def test_a_gpu_without_counters_says_why(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, wanted: list[Any]) -> list[Any]:
        return [SimpleNamespace(nvmlReturn=3, value=None) for _ in wanted]

    with pytest.raises(nvlink.NoCountersError, match="NVML shows no GPU 2"):
        nvlink.read_counters(2)
    nvml.nvmlDeviceGetFieldValues = refuse  # type: ignore[method-assign]
    with pytest.raises(nvlink.NoCountersError, match="3"):
        nvlink.read_counters()
    monkeypatch.delattr(FakeNvml, "NVML_FI_DEV_NVLINK_THROUGHPUT_RAW_RX")
    with pytest.raises(nvlink.NoCountersError, match="does not know them"):
        nvlink.read_counters()

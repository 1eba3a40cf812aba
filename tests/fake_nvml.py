"""An NVML that is made up, to stand in for the module ``pynvml``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


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
    NVML_P2P_CAPS_INDEX_ATOMICS = 3
    NVML_P2P_STATUS_OK = 0
    NVML_COMPUTEMODE_EXCLUSIVE_THREAD = 1
    NVML_COMPUTEMODE_PROHIBITED = 2
    NVML_COMPUTEMODE_EXCLUSIVE_PROCESS = 3

    def __init__(self) -> None:
        self.gpus = 2
        self.kib = [dict.fromkeys((138, 139, 140, 141), 0) for _ in range(8)]  # of each GPU
        self.down: set[int] = set()
        self.p2p: dict[int, int | None] = {}  # by capability; None: no answer
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
            SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(ullVal=self.kib[handle][field]))
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
        status = self.p2p.get(index, 0)
        if status is None:
            raise NVMLError("not supported")
        return status

    def nvmlDeviceGetComputeMode(self, handle: int) -> int:
        return self.mode

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        return self.mig

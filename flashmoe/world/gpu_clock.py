"""The clock that stamps a GPU's events: what it is good for, and what it says now."""

from __future__ import annotations

import ctypes
import time

import torch

from flashmoe.errors import FlashmoeError
from flashmoe.world.base import ClockInfo
from flashmoe.world.kernel import Kernel


def measure_clock(device: torch.device) -> ClockInfo:
    """The global timer's step, one record's cost and the SM clock, as a kernel measures them."""
    probe = Kernel(device, "flashmoe_clock_probe")
    out = torch.zeros(4, dtype=torch.int64, device=device)
    scratch = torch.zeros(256 * 32 + 256, dtype=torch.uint8, device=device)
    slot = torch.zeros(64, dtype=torch.uint8).pin_memory()
    pointers = (out.data_ptr(), scratch.data_ptr(), slot.data_ptr())
    for _ in range(2):  # the first one fetches instructions
        probe.launch(1, 1, pointers, (ctypes.c_void_p,) * 3)
    step, nanoseconds, cycles, records = out.cpu().tolist()
    mhz = cycles / nanoseconds * 1e3
    return ClockInfo("globaltimer", step, cycles / records / mhz * 1e3, mhz)


class GpuClock:
    """Asks a kernel of one thread what time it is; its answer comes through pinned memory."""

    LIMIT_S = 5.0
    _TYPES = (ctypes.c_void_p, ctypes.c_uint64)

    def __init__(self, device: torch.device) -> None:
        self._kernel = Kernel(device, "flashmoe_now")
        self._answer = torch.zeros(2, dtype=torch.int64).pin_memory()  # ns, number of the question
        self._words = self._answer.numpy()
        self._number = 0

    def now_ns(self) -> int:
        """%globaltimer in ns at some moment of this call; waits for kernels that run."""
        self._number += 1
        self._kernel.launch(1, 1, (self._answer.data_ptr(), self._number), self._TYPES)
        until = time.monotonic() + self.LIMIT_S
        while self._words[1] != self._number:
            if time.monotonic() > until:
                raise FlashmoeError(
                    f"the GPU did not tell its time in {self.LIMIT_S:g} s",
                    "is another process keeping it busy? see nvidia-smi",
                )
        return int(self._words[0])

"""Abort words stored into heaps while kernels run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from flashmoe.world.base import Status
from flashmoe.world.kernel import check


@contextlib.contextmanager
def current_context(context: Any) -> Iterator[None]:
    """Makes a driver context the calling thread's for the body."""
    from cuda.bindings import driver

    driver.cuCtxPushCurrent(context)
    try:
        yield
    finally:
        driver.cuCtxPopCurrent()


class AbortWords:
    """Stores the abort word into heaps while kernels run: a copy by the GPU's copy engine.

    Everything it takes is made beforehand, since allocating may wait for a kernel that runs.
    """

    def __init__(self, device: torch.device) -> None:
        from cuda.bindings import driver

        # torch's streams wait for no other one, and copies from pinned memory for no thread.
        self._stream = torch.cuda.Stream(device)
        self._value = torch.tensor([Status.HOST_ABORT], dtype=torch.int64).pin_memory()
        with torch.cuda.device(device):
            self._context = check(driver.cuCtxGetCurrent(), "asking for the context")
        self._lock = threading.Lock()

    def store(self, addresses: list[int]) -> None:
        """Stores it, in this order; what a dead rank leaves without memory is passed over."""
        from cuda.bindings import driver

        stream = self._stream.cuda_stream
        with self._lock, current_context(self._context):
            for address in addresses:
                driver.cuMemcpyHtoDAsync(address, self._value.data_ptr(), 8, stream)
            driver.cuStreamSynchronize(stream)

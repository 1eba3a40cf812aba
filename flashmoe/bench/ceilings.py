"""What no MoE layer beats: the same products as two plain GEMMs, and weights at copy speed."""

from __future__ import annotations

import statistics

import torch

from flashmoe.config import DTYPE_BYTES, MoEConfig
from flashmoe.weights import torch_dtype

COPY_BYTES = 1 << 30
_COPIES = 20


def expert_bytes(config: MoEConfig) -> int:
    """Bytes of one expert's two (plain) or three (gated) matrices."""
    return (config.up_rows + config.intermediate) * config.hidden * DTYPE_BYTES


def floor_ms(config: MoEConfig, experts_hit: int, copy_bytes_per_s: float) -> float:
    """Milliseconds to move the weights of ``experts_hit`` experts once at the copy rate."""
    return expert_bytes(config) * experts_hit / copy_bytes_per_s * 1e3


def flop(config: MoEConfig, rows: int) -> int:
    """Floating-point operations of both GEMMs for ``rows`` rows (T k)."""
    return 2 * rows * config.hidden * (config.up_rows + config.intermediate)


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written together, of copying 1 GiB within the GPU's memory.

    The median of 20 copies by device events, after one that is not counted.
    """
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    target.copy_(source)
    marks = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(_COPIES)
    ]
    for begin, end in marks:
        begin.record()
        target.copy_(source)
        end.record()
    torch.cuda.synchronize(device)
    ms = statistics.median(begin.elapsed_time(end) for begin, end in marks)
    return 2 * COPY_BYTES / ms * 1e3


class DensePair:
    """Two GEMMs with the FLOPs of the layer's experts: no routing, no row moved, one matrix each.

    [T k, H] by [H, 2I or I], then [T k, I] by [I, H], of standard normal values in the dtype.
    """

    def __init__(self, config: MoEConfig, rows: int, device: torch.device) -> None:
        generator = torch.Generator(device=device).manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            drawn = torch.randn(size, generator=generator, device=device)
            return drawn.to(torch_dtype(config))

        self._x = normal(rows, config.hidden)
        self._up = normal(config.up_rows, config.hidden)
        self._h = normal(rows, config.intermediate)
        self._down = normal(config.hidden, config.intermediate)
        self._of_up = self._x.new_empty(rows, config.up_rows)
        self._of_down = self._x.new_empty(rows, config.hidden)

    def __call__(self) -> None:
        """Both products, on the current stream."""
        torch.mm(self._x, self._up.t(), out=self._of_up)
        torch.mm(self._h, self._down.t(), out=self._of_down)

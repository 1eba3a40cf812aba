"""Random weights of one layer, the same for the same seed."""

from __future__ import annotations

import torch

from flashmoe.config import DTYPE_BYTES, DType, MoEConfig, MoEWeights

DTYPE_NAMES: dict[torch.dtype, DType] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
TORCH_DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}

# Root mean square of the activation of a standard normal, by quadrature.  A gated one is multiplied
# by an independent standard normal, which leaves it as it is.
_ACTIVATION_RMS = {"swiglu": 0.596, "silu": 0.596, "geglu": 0.652, "gelu": 0.652, "relu": 0.7071}

# DeepSeek-V3's correction is a small nudge beside sigmoids of 0 to 1.
_BIAS_STD = 0.02


def torch_dtype(config: MoEConfig) -> torch.dtype:
    """The layer's dtype in torch's terms."""
    return TORCH_DTYPES[config.dtype]


def nbytes(config: MoEConfig) -> int:
    """Bytes of all weights of one layer: router, correction bias, up and down matrices."""
    h, i, e = config.hidden, config.intermediate, config.experts
    elements = e * h + e * config.up_rows * h + e * h * i
    bias = 4 * e if config.routing.kind == "sigmoid" else 0
    return elements * DTYPE_BYTES + bias


def random_weights(
    config: MoEConfig, seed: int = 0, device: str | torch.device = "cpu"
) -> MoEWeights:
    """Normal weights scaled so that standard normal tokens give logits and expert rows of order 1.

    The same (config, seed) gives the same bits on one kind of device and torch version; the CPU's
    and CUDA's generators differ.  One expert at a time, so that float32 copies stay small.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = torch_dtype(config)
    h, i, e = config.hidden, config.intermediate, config.experts

    def fill(into: torch.Tensor, std: float) -> None:
        drawn = torch.randn(into.shape, generator=generator, device=device)
        into.copy_(drawn.mul_(std))

    gate = torch.empty(e, h, dtype=dtype, device=device)
    up = torch.empty(e, config.up_rows, h, dtype=dtype, device=device)
    down = torch.empty(e, h, i, dtype=dtype, device=device)
    fill(gate, h**-0.5)
    for expert in range(e):
        fill(up[expert], h**-0.5)
        fill(down[expert], i**-0.5 / _ACTIVATION_RMS[config.activation])
    bias = None
    if config.routing.kind == "sigmoid":
        bias = torch.empty(e, dtype=torch.float32, device=device)
        fill(bias, _BIAS_STD)
    return MoEWeights(gate=gate, bias=bias, up=up, down=down)

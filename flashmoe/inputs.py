"""What a run feeds to the engine: weights and tokens, random or out of files."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flashmoe.errors import FlashmoeError

if TYPE_CHECKING:
    import torch

    from flashmoe.config import MoEConfig, MoEWeights
    from flashmoe.session import Request


@dataclass
class Inputs:
    """``x`` is one [T, H] tensor a rank; ``shared`` DeepSeek's shared expert, or None."""

    name: str
    config: MoEConfig
    weights: MoEWeights
    x: list[torch.Tensor]
    tokens: tuple[int, ...]
    shared: Any = None
    remarks: list[str] = field(default_factory=list)


def prepare(request: Request, device: str, sharing: int = 1) -> Inputs:
    """Weights on ``device`` and tokens for each rank, as ``request`` says.

    ``sharing`` processes prepare the same at the same time on the same device.  Raises
    FlashmoeError where a file is wrong, or where the weights or the tokens alone exceed the memory
    that is free, with both figures, before it allocates them.
    """
    from flashmoe.tokens import random_tokens, read_tokens
    from flashmoe.weights import nbytes, random_weights

    shared, remarks = None, list[str]()
    if request.checkpoint is not None:
        from flashmoe.checkpoint import layer_config, load_layer

        assert request.layer is not None
        size = nbytes(layer_config(request.checkpoint, request.layer, request.dtype))
        _weights_fit(sharing * size, device)
        layer = load_layer(request.checkpoint, request.layer, dtype=request.dtype, device=device)
        config, weights, shared = layer.config, layer.weights, layer.shared
        remarks += [layer.source, *layer.remarks]
    else:
        assert request.config is not None
        config = request.config
        _weights_fit(sharing * nbytes(config), device)
        weights = random_weights(config, request.seed, device)
    if shared is not None:
        remarks.append("the shared expert is added by torch, outside the kernel")
    if request.tokens_file is not None:
        x = _split(read_tokens(request.tokens_file, config), request.ranks)
    else:
        _tokens_fit(sharing * sum(request.tokens), config)
        gate = weights.gate if request.skew > 0 else None
        x = random_tokens(request.tokens, config, request.seed, request.skew, gate)
    return Inputs(request.name, config, weights, x, tuple(len(t) for t in x), shared, remarks)


def _split(x: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """Consecutive, nearly even parts of x [T, H], one a rank, in rank-major order."""
    edges = [r * len(x) // ranks for r in range(ranks + 1)]
    return [x[a:b].contiguous() for a, b in itertools.pairwise(edges)]


def free_memory(device: str) -> int | None:
    """Bytes free on ``device`` (``cpu`` or ``cuda:N``), or None where nothing says."""
    if device != "cpu":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    from flashmoe.world.memory import available_bytes

    return available_bytes()


def _weights_fit(need: int, device: str) -> None:
    _fits("the weights", need, device, "choose a smaller preset, or fewer --experts")


def _tokens_fit(tokens: int, config: MoEConfig) -> None:
    # Drawn as float32 on the CPU, and rounded into a copy.
    need = tokens * (4 * config.hidden + config.row_bytes)
    _fits(f"{tokens} tokens", need, "cpu", "use fewer tokens (-T)")


def _fits(what: str, need: int, device: str, hint: str) -> None:
    free = free_memory(device)
    if free is not None and need > free:
        where = "memory" if device == "cpu" else "GPU memory"
        raise FlashmoeError(
            f"{what} take {need / 1e9:.1f} GB of {where}, and {free / 1e9:.1f} GB are free", hint
        )

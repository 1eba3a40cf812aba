"""Room on a GPU for a layer's calls, and how they ended."""

from __future__ import annotations

import torch

from flashmoe import kernels
from flashmoe.config import MoEConfig
from flashmoe.errors import EXIT_NO_GPU, FlashmoeError
from flashmoe.ops import settings
from flashmoe.world.shared_heap import heap_of

_NEEDS = "a layer needs a Hopper GPU, its driver and torch for CUDA; `flashmoe doctor` tells more"


class Workspace:
    """Room on a GPU for calls of one layer shape with up to ``max_tokens`` tokens.

    All workspaces of a GPU share one heap, which is as large as the largest of them needs in the
    worst case (every token's rows in one pool) and is freed with the last of them; after a CUDA
    graph was captured on it, it stays.  ``tensor`` (int64 [1], on the device) stands for the heap
    where an operator names what it changes.

    Raises FlashmoeError where the GPU is not usable (exit code 5), does not hold the heap (with the
    bytes needed), or the shape is not one that the kernel takes (2).
    """

    def __init__(
        self,
        config: MoEConfig,
        max_tokens: int,
        device: torch.device | str | int | None = None,
        more_bytes: int = 0,
    ) -> None:
        config.validate()
        if max_tokens < 1:
            raise FlashmoeError(
                f"max_tokens {max_tokens} leaves no room for a token",
                "give the most tokens that a call may have, 1 or more",
                2,
            )
        self.config = config
        self.max_tokens = max_tokens
        self.heap = heap_of(gpu(device))
        self.heap.reserve(config, max_tokens, more_bytes)
        self.tensor = self.heap.workspace
        self.settings = settings(config, max_tokens)

    def check(self) -> None:
        """Waits for the GPU; raises FlashmoeError if a call since ``reset`` failed on it."""
        self.heap.check()

    def reset(self) -> None:
        """Waits for the GPU and clears a failure, for all layers on it."""
        self.heap.reset()


def gpu(device: torch.device | str | int | None) -> torch.device:
    """The CUDA device meant, with its index; None is torch's current one.

    Raises FlashmoeError (exit code 5) where flashmoe's kernels run on none or not on that one.
    """
    if isinstance(device, int):
        device = torch.device("cuda", device)
    asked = torch.device("cuda" if device is None else device)
    if asked.type != "cuda":
        raise FlashmoeError(
            f"the layer runs on a CUDA GPU, not on {asked}", "use device='cuda'", EXIT_NO_GPU
        )
    index = 0
    if asked != torch.device("cuda"):
        index = asked.index
    elif torch.cuda.is_available():
        index = torch.cuda.current_device()
    try:
        kernels.select(index)
    except FlashmoeError as exc:
        raise FlashmoeError(exc.message, _NEEDS, exc.exit_code) from exc
    if not torch.cuda.is_available():
        raise FlashmoeError("this torch is a CPU build, or sees no GPU", _NEEDS, EXIT_NO_GPU)
    return torch.device("cuda", index)

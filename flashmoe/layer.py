"""The MoE layer as a model calls it: a module, and a function of tensors."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

import flashmoe.ops  # noqa: F401  (registers the operators)
from flashmoe.checkpoint import SharedExpert, layer_config, load_layer
from flashmoe.config import MoEConfig, MoEWeights
from flashmoe.errors import FlashmoeError
from flashmoe.weights import DTYPE_NAMES, TORCH_DTYPES, nbytes
from flashmoe.workspace import Workspace, gpu


def _wrong(message: str, hint: str) -> FlashmoeError:
    return FlashmoeError(message, hint, exit_code=2)


def moe(
    x: torch.Tensor,
    weights: MoEWeights,
    workspace: Workspace,
    ids: torch.Tensor | None = None,
    routing_weights: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """One MoE layer's forward, on torch's current stream, without waiting for it.

    ``x`` [..., H] in the layer's dtype, ``max_tokens`` rows at most; ``weights`` as in
    :class:`flashmoe.config.MoEWeights`.  Where routing is external, ``ids`` int32 or int64 and
    ``routing_weights`` [..., k].  Returns y like x; ``out`` takes it instead: contiguous, like x,
    and apart from it.

    Calls on one GPU run one after another, whatever streams they are on.  A call that fails on the
    device fills y with NaN there, and the first call after it became known raises, as does
    ``workspace.check()``, until ``workspace.reset()``.

    Raises FlashmoeError for tensors that do not fit, and where one requires grad in grad mode.
    """
    return _call(
        x,
        weights.gate,
        weights.bias,
        weights.up,
        weights.down,
        ids,
        routing_weights,
        workspace.tensor,
        workspace.settings,
        out,
    )


def _call(
    x: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor | None,
    up: torch.Tensor,
    down: torch.Tensor,
    ids: torch.Tensor | None,
    routing_weights: torch.Tensor | None,
    workspace: torch.Tensor,
    settings: tuple[Any, ...],
    out: torch.Tensor | None,
) -> torch.Tensor:
    if x.device != workspace.device:
        raise _wrong(
            f"x is on {x.device}, and the layer on {workspace.device}",
            f"move x with .to('{workspace.device}'), or the layer",
        )
    if x.dim() == 0 or x.shape[-1] == 0:
        raise _wrong(f"x is {tuple(x.shape)}, without a row", "give x [..., H]")
    rows = x.reshape(-1, x.shape[-1])
    for name, tensor in (("ids", ids), ("routing_weights", routing_weights)):
        if tensor is not None and (tensor.dim() == 0 or tensor.shape[:-1] != x.shape[:-1]):
            raise _wrong(
                f"{name} is {tuple(tensor.shape)}, and x {tuple(x.shape)}",
                "give k of them for each row of x",
            )
    if ids is not None:
        ids = ids.reshape(-1, ids.shape[-1])
        if ids.dtype == torch.int64:
            # What int32 does not hold must not become an expert's number on the way.
            ids = ids.clamp(-1, 0x7FFFFFFF).to(torch.int32)
    if routing_weights is not None:
        routing_weights = routing_weights.reshape(-1, routing_weights.shape[-1]).float()
    arguments = (rows, gate, bias, up, down, ids, routing_weights, workspace, *settings)
    if out is None:
        y: torch.Tensor = torch.ops.flashmoe.moe(*arguments)
        return y.reshape(x.shape)
    if out.shape != x.shape or not out.is_contiguous():
        raise _wrong(
            f"out is {tuple(out.shape)}, x is {tuple(x.shape)}",
            "out must be contiguous and shaped like x",
        )
    torch.ops.flashmoe.moe_out(*arguments, out.view(rows.shape))
    return out


class MoE(torch.nn.Module):
    """One MoE layer of a model on one GPU, for inference.

    ``weights`` are moved to ``device`` (None: torch's current GPU) and rounded to the config's
    dtype where they differ; those that fit already are taken as they are, not copied.  They are
    buffers: ``state_dict`` has them as ``gate``, ``bias``, ``up`` and ``down``, and nothing else
    but ``shared``'s.  ``max_tokens`` is the most rows that a call may have; the heap for them is
    allocated here, shared with every other layer on that GPU.  ``shared`` is a dense expert that
    every token passes (DeepSeek-V3), computed by torch and added.

    Raises FlashmoeError (exit code 5) where no GPU is usable, before allocating where its memory
    does not hold layer and heap, with the bytes needed, and for a shape that the kernel does not
    take.
    """

    gate: torch.Tensor
    bias: torch.Tensor | None
    up: torch.Tensor
    down: torch.Tensor
    shared_gate: torch.Tensor | None
    shared_up: torch.Tensor | None
    shared_down: torch.Tensor | None
    workspace: torch.Tensor

    def __init__(
        self,
        config: MoEConfig,
        weights: MoEWeights,
        *,
        max_tokens: int,
        device: torch.device | str | int | None = None,
        shared: SharedExpert | None = None,
    ) -> None:
        super().__init__()
        config.validate()
        _check_weights(config, weights)
        where, dtype = gpu(device), TORCH_DTYPES[config.dtype]
        tensors: dict[str, torch.Tensor | None] = {
            "gate": weights.gate,
            "bias": weights.bias,
            "up": weights.up,
            "down": weights.down,
        }
        for name in ("gate", "up", "down"):
            tensors[f"shared_{name}"] = None if shared is None else getattr(shared, name)
        dtypes = {name: torch.float32 if name == "bias" else dtype for name in tensors}
        new = [
            t.numel() * dtypes[name].itemsize
            for name, t in tensors.items()
            if t is not None and (t.device, t.dtype) != (where, dtypes[name])
        ]
        self.config = config
        self.max_tokens = max_tokens
        self._room: Workspace | None = Workspace(config, max_tokens, where, more_bytes=sum(new))
        for name, tensor in tensors.items():
            if tensor is not None:
                tensor = tensor.detach().to(where, dtypes[name]).contiguous()
            self.register_buffer(name, tensor)
        self.register_buffer("workspace", self._room.tensor, persistent=False)

    @classmethod
    def from_checkpoint(
        cls,
        folder: str | os.PathLike[str],
        layer: int,
        *,
        max_tokens: int,
        dtype: str | None = None,
        device: torch.device | str | int | None = None,
    ) -> MoE:
        """Layer ``layer`` (from 0) of a Hugging Face model folder; ``dtype`` None: as stored.

        Raises FlashmoeError as :func:`flashmoe.checkpoint.load_layer` and the constructor do.
        """
        where = gpu(device)
        config = layer_config(folder, layer, dtype)
        # Held until the layer has its own: what does not fit is told before a weight is read.
        room = Workspace(config, max_tokens, where, more_bytes=nbytes(config))
        loaded = load_layer(folder, layer, dtype, device=where)
        made = cls(
            config, loaded.weights, max_tokens=max_tokens, device=where, shared=loaded.shared
        )
        del room
        return made

    def forward(
        self,
        x: torch.Tensor,
        ids: torch.Tensor | None = None,
        routing_weights: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """y like x [..., H]; see :func:`moe` for what goes in, what is raised, and ``out``."""
        if self._room is None:
            raise _wrong(
                f"the layer is on {self.up.device}, and its kernel runs on a CUDA GPU",
                "move it with .to('cuda')",
            )
        y = _call(
            *(x, self.gate, self.bias, self.up, self.down, ids, routing_weights, self.workspace),
            settings=self._room.settings,
            out=out,
        )
        if self.shared_gate is None or self.shared_up is None or self.shared_down is None:
            return y
        hidden = F.silu(F.linear(x, self.shared_gate)) * F.linear(x, self.shared_up)
        shared = F.linear(hidden, self.shared_down)
        return y + shared if out is None else out.add_(shared)

    def check(self) -> None:
        """Waits for the GPU; raises FlashmoeError if a call of a layer on it failed.

        So do calls, once the failure has become known: nothing waits for the GPU but this.
        """
        if self._room is not None:
            self._room.check()

    def reset(self) -> None:
        """Waits for the GPU and makes its layers usable again after one failed."""
        if self._room is not None:
            self._room.reset()

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"hidden={c.hidden}, intermediate={c.intermediate}, experts={c.experts}, "
            f"top_k={c.top_k}, {c.activation}, {c.dtype}, {c.routing.kind} routing, "
            f"max_tokens={self.max_tokens}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> MoE:
        # Asked of nothing first: a layer of another dtype could not run.
        dtype = fn(self.up.new_empty(0)).dtype
        if dtype not in DTYPE_NAMES:
            raise _wrong(
                f"the layer cannot be {dtype}: its kernel takes torch.bfloat16 and torch.float16",
                "leave it out of the conversion",
            )
        bias = self.bias
        del self._buffers["workspace"]
        try:
            super()._apply(fn, recurse)
        finally:
            if bias is not None and self.bias is not None and self.bias.dtype != bias.dtype:
                self.bias = bias.to(self.bias.device)
            self.config = replace(self.config, dtype=DTYPE_NAMES[self.up.dtype])
            self._find_room()
        return self

    def _find_room(self) -> None:
        """Takes a share of the heap of the GPU that the weights are on."""
        device = self.up.device
        if device.type == "cuda":
            self._room = Workspace(self.config, self.max_tokens, device)
            tensor = self._room.tensor
        else:
            self._room = None
            tensor = torch.zeros(1, dtype=torch.int64, device=device)
        self.register_buffer("workspace", tensor, persistent=False)

    # A copy, in this process or from a file, takes a share of the heap as a new layer does.
    def __getstate__(self) -> dict[str, Any]:
        buffers = {name: t for name, t in self._buffers.items() if name != "workspace"}
        return {**self.__dict__, "_buffers": buffers, "_room": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._find_room()


def _check_weights(config: MoEConfig, weights: MoEWeights) -> None:
    """Raises FlashmoeError where a tensor has not the shape that the config implies."""
    h, i, e = config.hidden, config.intermediate, config.experts
    shapes = {
        "gate": (weights.gate, (e, h)),
        "bias": (weights.bias, (e,)),
        "up": (weights.up, (e, config.up_rows, h)),
        "down": (weights.down, (e, h, i)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise _wrong(
                f"{name} is {tuple(tensor.shape)}, and the config implies {shape}",
                "see flashmoe.config.MoEWeights for what each is",
            )

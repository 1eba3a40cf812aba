"""The forward as operators of torch, for ``torch.compile`` and CUDA graphs.

``flashmoe::moe`` returns y, ``flashmoe::moe_out`` writes it where it is told.  Both are functions
of their arguments; the heap that the kernel needs besides is found by the device, and has to have
been made before by a :class:`flashmoe.workspace.Workspace`.  :func:`flashmoe.layer.moe` calls them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from flashmoe.config import MoEConfig, MoEWeights, Routing
from flashmoe.errors import FlashmoeError
from flashmoe.weights import DTYPE_NAMES
from flashmoe.world.shared_heap import find_heap

_ALIGNMENT = 16
"""Bytes; tensor copies and 16-byte stores start at multiples of it."""


def _wrong(message: str, hint: str) -> FlashmoeError:
    return FlashmoeError(message, hint, exit_code=2)


_ARGUMENTS = (
    "Tensor x, Tensor gate, Tensor? bias, Tensor up, Tensor down, Tensor? ids, "
    "Tensor? routing_weights, Tensor(a!) workspace, int max_tokens, int top_k, str activation, "
    "str routing, bool renormalize, float scale, int groups, int top_groups"
)
_LIBRARY = torch.library.Library("flashmoe", "DEF")
_LIBRARY.define(f"moe({_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(f"moe_out({_ARGUMENTS}, Tensor(b!) out) -> ()", tags=(torch.Tag.pt2_compliant_tag,))


def settings(config: MoEConfig, max_tokens: int) -> tuple[Any, ...]:
    """The operators' arguments behind the tensors."""
    routing = config.routing
    return (
        max_tokens,
        config.top_k,
        config.activation,
        routing.kind,
        routing.renormalize,
        routing.scale,
        routing.groups,
        routing.top_groups,
    )


@functools.lru_cache(maxsize=64)
def _config(
    hidden: int,
    inter: int,
    experts: int,
    dtype: torch.dtype,
    top_k: int,
    activation: Any,
    kind: Any,
    *routing: Any,
) -> MoEConfig:
    return MoEConfig(
        hidden, inter, experts, top_k, activation, DTYPE_NAMES[dtype], Routing(kind, *routing)
    )


def _check(
    x: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor | None,
    up: torch.Tensor,
    down: torch.Tensor,
    ids: torch.Tensor | None,
    routing_weights: torch.Tensor | None,
    workspace: torch.Tensor,
    max_tokens: int,
    top_k: int,
    activation: str,
    routing: str,
    *_: Any,
) -> None:
    """Raises FlashmoeError where shapes, dtypes or devices do not make a layer and its input."""
    if up.dtype not in DTYPE_NAMES:
        raise _wrong(f"the weights are {up.dtype}", "the kernel takes torch.bfloat16 and float16")
    experts, hidden, inter = down.shape if down.dim() == 3 else (0, 0, 0)
    up_rows = 2 * inter if activation in ("swiglu", "geglu") else inter
    expected = {
        "gate": (gate, (experts, hidden), up.dtype),
        "up": (up, (experts, up_rows, hidden), up.dtype),
        "down": (down, (experts, hidden, inter), up.dtype),
        "bias": (bias, (experts,), torch.float32),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != dtype):
            raise _wrong(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, where {dtype} {shape} is due",
                "see flashmoe.config.MoEWeights for what each is",
            )
    if x.dim() != 2 or x.shape[1] != hidden:
        raise _wrong(
            f"x has rows of {x.shape[-1]} elements, and the layer is {hidden} wide",
            f"give x [..., {hidden}]",
        )
    if x.dtype != up.dtype:
        raise _wrong(f"x is {x.dtype}, and the layer is {up.dtype}", f"use x.to({up.dtype})")
    if x.shape[0] > max_tokens:
        raise _wrong(
            f"x has {x.shape[0]} tokens, and the layer was made for max_tokens {max_tokens}",
            "make the layer with a larger max_tokens, or give x in parts",
        )
    given = ids is not None, routing_weights is not None
    if given != (routing == "external",) * 2:
        raise _wrong(
            f"{routing} routing {'needs' if routing == 'external' else 'takes no'} expert ids and "
            "weights",
            "the config's routing.kind is 'external' where they come with the tokens",
        )
    for name, tensor, dtype in (
        ("ids", ids, torch.int32),
        ("routing_weights", routing_weights, torch.float32),
    ):
        if tensor is not None and (tensor.shape != (x.shape[0], top_k) or tensor.dtype != dtype):
            raise _wrong(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, where {dtype} "
                f"{(x.shape[0], top_k)} is due",
                "give as many rows as x has, of top_k experts each",
            )
    for tensor in (gate, bias, up, down, ids, routing_weights, workspace):
        if tensor is not None and tensor.device != x.device:
            raise _wrong(
                f"x is on {x.device}, and a tensor of the call on {tensor.device}",
                "move all to one GPU",
            )


def _check_out(x: torch.Tensor, out: torch.Tensor) -> None:
    if (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        raise _wrong(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}, and x {x.dtype} "
            f"{tuple(x.shape)} on {x.device}",
            "out must be like x",
        )


def _is_aligned(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where the kernel cannot read it as it lies."""
    if _is_aligned(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _launch(out: torch.Tensor, x: torch.Tensor, *arguments: Any) -> None:
    gate, bias, up, down, ids, routing_weights, workspace, max_tokens, *scalars = arguments
    fixed = {"gate": gate, "bias": bias, "up": up, "down": down, "out": out}
    for name, tensor in fixed.items():
        if tensor is not None and not _is_aligned(tensor):
            raise _wrong(
                f"{name} is not contiguous or does not start at a multiple of {_ALIGNMENT} bytes",
                f"give {name}.contiguous().clone()",
            )
    heap = find_heap(x.device)
    if heap is None:
        raise _wrong(
            f"there is no workspace on {x.device}",
            "make a flashmoe.Workspace(config, max_tokens) first, and keep it",
        )
    experts, hidden, inter = down.shape
    config = _config(hidden, inter, experts, up.dtype, *scalars)
    heap.launch(
        config,
        max_tokens,
        MoEWeights(gate=gate, bias=bias, up=up, down=down),
        _aligned(x),
        out,
        None if ids is None else _aligned(ids),
        None if routing_weights is None else _aligned(routing_weights),
        workspace,
    )


def _moe_cuda(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    _check(x, *arguments)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(y, x, *arguments)
    return y


def _moe_out_cuda(x: torch.Tensor, *arguments: Any) -> None:
    *rest, out = arguments
    _check(x, *rest)
    _check_out(x, out)
    size = x.numel() * x.element_size()
    if size and abs(out.data_ptr() - x.data_ptr()) < size:
        raise _wrong("out overlaps x", "give memory of its own, or none")
    _launch(out, x, *rest)


def _moe_fake(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    _check(x, *arguments)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _moe_out_fake(x: torch.Tensor, *arguments: Any) -> None:
    *rest, out = arguments
    _check(x, *rest)
    _check_out(x, out)


def _inference_only(op: Any) -> Any:
    """The Autograd kernel of ``op``: below autograd, or an error."""

    def call(*arguments: Any) -> Any:
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise _wrong(
                "an input of the layer requires grad, and there is no backward",
                "call it under torch.no_grad() or torch.inference_mode(), or detach the input",
            )
        workspace = arguments[7]
        if not workspace.is_inference():
            torch.autograd.graph.increment_version(workspace)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    return call


_LIBRARY.impl("moe", _moe_cuda, "CUDA")
_LIBRARY.impl("moe_out", _moe_out_cuda, "CUDA")
_LIBRARY.impl("moe", _inference_only(torch.ops.flashmoe.moe.default), "Autograd")
_LIBRARY.impl("moe_out", _inference_only(torch.ops.flashmoe.moe_out.default), "Autograd")
torch.library.register_fake("flashmoe::moe", _moe_fake, lib=_LIBRARY)
torch.library.register_fake("flashmoe::moe_out", _moe_out_fake, lib=_LIBRARY)

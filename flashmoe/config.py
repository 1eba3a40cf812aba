"""What a Mixture-of-Experts layer is: its dimensions, its arithmetic and its weights.

Imports no torch, so that the verbs that only read can use it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from flashmoe.errors import FlashmoeError

if TYPE_CHECKING:
    import torch

Activation = Literal["swiglu", "geglu", "relu", "gelu", "silu"]
DType = Literal["bf16", "fp16"]
RoutingKind = Literal["softmax", "sigmoid", "external"]

GATED: frozenset[str] = frozenset({"swiglu", "geglu"})

DTYPE_BYTES = 2
"""Bytes of one element of x, y and the weights; both dtypes have 16 bits."""

SIZE_STEP = 8
"""hidden and intermediate are multiples of this: rows then are whole 16-byte vectors."""

MAX_EXPERTS = 0xFFFE
"""Experts are 16-bit numbers in a trace record, and 0xffff says 'none'."""


def _bad(message: str, hint: str) -> FlashmoeError:
    return FlashmoeError(message, hint, exit_code=2)


@dataclass(frozen=True)
class Routing:
    """How a token's experts and their weights follow from its logits.

    ``softmax``: softmax over all experts, the ``top_k`` best, divided by their sum where
    ``renormalize`` (Mixtral, Qwen3-MoE; OLMoE does not).

    ``sigmoid``: DeepSeek-V3.  Experts are chosen by sigmoid(logit) + bias; a group of
    ``experts / groups`` consecutive experts is scored by the sum of its two best, and only the
    ``top_groups`` best groups take part.  Weights are the sigmoids without the bias, divided by
    their sum + 1e-20 where ``renormalize``.

    ``external``: ids and weights come with the tokens; nothing else here applies.

    Weights are multiplied by ``scale`` last.
    """

    kind: RoutingKind = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1


@dataclass(frozen=True)
class MoEConfig:
    """One MoE layer.

    ``hidden`` H is the model's width, ``intermediate`` I an expert's hidden width, ``experts`` E
    their number in all, ``top_k`` k the experts of a token.  ``swiglu`` is silu(gate) * up,
    ``geglu`` gelu_tanh(gate) * up; ``gelu`` is the exact one, by erf.
    """

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    activation: Activation = "swiglu"
    dtype: DType = "bf16"
    routing: Routing = field(default_factory=Routing)

    @property
    def gated(self) -> bool:
        """True where the activation multiplies a gate projection with an up projection."""
        return self.activation in GATED

    @property
    def up_rows(self) -> int:
        """Rows of one expert's up matrix: 2I (gate rows first) where gated, else I."""
        return 2 * self.intermediate if self.gated else self.intermediate

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's row of H elements."""
        return self.hidden * DTYPE_BYTES

    def validate(self) -> None:
        """Raises FlashmoeError (exit code 2) where no engine could run this layer."""
        for name, flag in (("hidden", "--hidden"), ("intermediate", "--intermediate")):
            size = getattr(self, name)
            if size < SIZE_STEP or size % SIZE_STEP:
                below = max(SIZE_STEP, size - size % SIZE_STEP)
                raise _bad(
                    f"{name} size {size} is not a positive multiple of {SIZE_STEP}",
                    f"use {flag} {below} or {below + SIZE_STEP}",
                )
        if not 1 <= self.experts <= MAX_EXPERTS:
            raise _bad(
                f"{self.experts} experts: there must be 1 to {MAX_EXPERTS}",
                "set the number of experts with --experts",
            )
        if not 1 <= self.top_k <= self.experts:
            raise _bad(
                f"top-k {self.top_k} of {self.experts} experts: a token needs 1 to {self.experts}",
                f"use --top-k 1 to {self.experts}, or more --experts",
            )
        _one_of("activation", self.activation, get_args(Activation))
        _one_of("dtype", self.dtype, get_args(DType))
        _one_of("routing", self.routing.kind, get_args(RoutingKind))
        self._validate_routing()

    def _validate_routing(self) -> None:
        routing = self.routing
        if not (math.isfinite(routing.scale) and routing.scale > 0):
            raise _bad(
                f"routing scale {routing.scale} is not a positive number",
                "use a finite scale above zero; 1.0 leaves the weights as they are",
            )
        if routing.kind != "sigmoid":
            if (routing.groups, routing.top_groups) != (1, 1):
                raise _bad(
                    f"{routing.kind} routing does not know expert groups",
                    "leave groups and top_groups at 1, or use sigmoid routing",
                )
            return
        if routing.groups < 1 or self.experts % routing.groups:
            raise _bad(
                f"{self.experts} experts do not divide into {routing.groups} groups",
                "choose a number of experts that is a multiple of the groups",
            )
        if not 1 <= routing.top_groups <= routing.groups:
            raise _bad(
                f"{routing.top_groups} of {routing.groups} groups may take part",
                f"top_groups must be 1 to {routing.groups}",
            )
        group_size = self.experts // routing.groups
        if routing.groups > 1 and group_size < 2:
            raise _bad(
                f"a group holds {group_size} expert, but is scored by its two best",
                f"use at least {2 * routing.groups} experts, or fewer groups",
            )
        if self.top_k > routing.top_groups * group_size:
            raise _bad(
                f"top-k {self.top_k} experts, but {routing.top_groups} groups of {group_size} "
                f"hold only {routing.top_groups * group_size}",
                f"use --top-k {routing.top_groups * group_size} or less",
            )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values; ``from_dict`` takes it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoEConfig:
        """The inverse of ``to_dict``; keys that are not of a layer are left aside."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**{**known, "routing": Routing(**known["routing"])})


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise _bad(f"unknown {what} '{value}'", f"use one of: {', '.join(known)}")


@dataclass
class MoEWeights:
    """One layer's weights, all contiguous and on one device.

    ``gate`` [E, H] in the layer's dtype, the router; ``bias`` [E] float32, DeepSeek-V3's correction
    of the choice, or None; ``up`` [E, 2I or I, H], where gated the I gate rows first, then the I up
    rows; ``down`` [E, H, I].
    """

    gate: torch.Tensor
    bias: torch.Tensor | None
    up: torch.Tensor
    down: torch.Tensor

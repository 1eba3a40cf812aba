"""What a peer is: a MoE forward by somebody else, built for one layer and one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flashmoe.bench.gate import Gate
from flashmoe.config import MoEConfig, MoEWeights

Forward = Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""One forward on the current stream, gate included: y [T, H], ids [T, k], weights [T, k]."""


class Unavailable(Exception):
    """A peer that cannot run here or takes no such layer; its text is the reason, in a line."""


@dataclass(frozen=True)
class Case:
    """One layer and batch on one device: ``x`` [T, H] in the dtype, ``gate`` (compiled) of it."""

    config: MoEConfig
    weights: MoEWeights
    x: torch.Tensor
    gate: Gate


@dataclass(frozen=True)
class PeerOptions:
    """``sglang_wheel``: a wheel, a zip of its layout or a folder; None looks where it may be."""

    sglang_wheel: Path | None = None


@dataclass
class PeerWork:
    """A peer that was built.

    ``version`` says whose code runs; ``note`` what differs from how its authors run it;
    ``settings`` what it chose, as JSON values; ``why_eager`` why no graph can hold it, if so.
    """

    forward: Forward
    version: str
    note: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    why_eager: str = ""


Builder = Callable[[Case, PeerOptions], PeerWork]
"""Builds a peer for a case.  Raises Unavailable: not installed, or no such layer."""

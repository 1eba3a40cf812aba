"""Shapes by model name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from flashmoe.config import MoEConfig, Routing
from flashmoe.errors import FlashmoeError


@dataclass(frozen=True)
class Preset:
    """A named layer, the tokens a rank has by default, and where the dimensions come from."""

    config: MoEConfig
    tokens: int
    description: str


PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        MoEConfig(64, 96, 8, 2),
        tokens=64,
        description="Mixtral's arithmetic, small enough for the host engine",
    ),
    "mixtral": Preset(
        MoEConfig(4096, 14336, 8, 2),
        tokens=4096,
        description="mistralai/Mixtral-8x7B-v0.1: SwiGLU, softmax, top-k renormalised",
    ),
    "qwen3-30b": Preset(
        MoEConfig(2048, 768, 128, 8),
        tokens=4096,
        description="Qwen/Qwen3-30B-A3B: SwiGLU, softmax, top-k renormalised",
    ),
    "olmoe": Preset(
        MoEConfig(2048, 1024, 64, 8, routing=Routing(renormalize=False)),
        tokens=4096,
        description="allenai/OLMoE-1B-7B-0924: SwiGLU, softmax, top-k as it is",
    ),
    "deepseek-v3": Preset(
        MoEConfig(
            7168, 2048, 256, 8, routing=Routing("sigmoid", scale=2.5, groups=8, top_groups=4)
        ),
        tokens=4096,
        description="deepseek-ai/DeepSeek-V3: SwiGLU, sigmoid with bias, 4 of 8 groups, scale 2.5",
    ),
    "deepseek-v3-ep8": Preset(
        MoEConfig(7168, 2048, 32, 8),
        tokens=4096,
        # With 8 groups over 8 ranks, one rank's experts are one group: there is no choice of groups
        # left to make among them.  Softmax, so that the peers' usual gate is the layer's.
        description="the 32 experts that one of 8 ranks holds of DeepSeek-V3; softmax routing",
    ),
    "paper": Preset(
        MoEConfig(2048, 2048, 32, 2, activation="relu"),
        tokens=4096,
        description="FlashMoE (arXiv 2506.04667), its evaluation: plain ReLU experts",
    ),
}


def preset(name: str) -> Preset:
    """The preset of that name.  Raises FlashmoeError (exit code 2) that suggests a near name."""
    found = PRESETS.get(name)
    if found is not None:
        return found
    near = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.5)
    known = f"presets are: {', '.join(PRESETS)}"
    raise FlashmoeError(
        f"no preset '{name}'",
        f"did you mean '{near[0]}'? {known}" if near else known,
        exit_code=2,
    )

"""What is timed: layers with a number of tokens, and the lists of them that have a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashmoe.config import MoEConfig
from flashmoe.errors import FlashmoeError
from flashmoe.presets import PRESETS


@dataclass(frozen=True)
class Shape:
    """A layer and its tokens T; ``preset`` is the layer's name in every output."""

    preset: str
    config: MoEConfig
    tokens: int

    @property
    def label(self) -> str:
        """The shape in a line of progress: ``mixtral 8192``."""
        return f"{self.preset} {self.tokens}"

    @property
    def rows(self) -> int:
        """Rows that all experts compute together: T k."""
        return self.tokens * self.config.top_k

    def described(self) -> dict[str, Any]:
        """What the shape is: the first fields of its result."""
        config = self.config
        return {
            "preset": self.preset,
            "T": self.tokens,
            "H": config.hidden,
            "I": config.intermediate,
            "E": config.experts,
            "k": config.top_k,
            "activation": config.activation,
            "dtype": config.dtype,
            "routing": config.routing.kind,
        }


_KEY = ("preset", "T", "H", "I", "E", "k", "activation", "dtype", "routing")


def shape_key(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two results, or a result and ``Shape.described()``, share if they are of one shape."""
    return tuple(result.get(name) for name in _KEY)


SMALL = MoEConfig(hidden=512, intermediate=256, experts=8, top_k=2)
"""A layer so small that nothing but the launch and its waits is left of a forward."""


def _of(preset: str, *tokens: int) -> tuple[Shape, ...]:
    return tuple(Shape(preset, PRESETS[preset].config, t) for t in tokens)


SUITES: dict[str, tuple[Shape, ...]] = {
    "h200": (
        *_of("mixtral", 8192, 4096),
        *_of("deepseek-v3-ep8", 4096, 128),
        *_of("qwen3-30b", 16384, 8192, 4096, 1024, 64),
        *_of("olmoe", 8192),
        *_of("paper", 16384, 8192, 4096),
    ),
    "latency": (*_of("qwen3-30b", 1, 2, 4, 8, 16, 32), Shape("small", SMALL, 8)),
}
"""``h200``: the shapes of docs/performance.md.  ``latency``: so few tokens that waits are all."""


def suite(name: str) -> tuple[Shape, ...]:
    """The shapes of that name.  Raises FlashmoeError (exit code 2) where there is none."""
    if name not in SUITES:
        raise FlashmoeError(f"no suite '{name}'", f"suites are: {', '.join(SUITES)}", exit_code=2)
    return SUITES[name]

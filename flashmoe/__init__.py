"""flashmoe: a distributed Mixture-of-Experts forward in one GPU kernel, seen from inside.

Importing this package imports nothing heavy: numpy, pyarrow and torch come with the modules that
need them, and with the first use of ``MoE``, ``moe`` or ``Workspace``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashmoe.layer import MoE, moe
    from flashmoe.workspace import Workspace

__version__ = "0.1.0"

__all__ = ["MoE", "Workspace", "__version__", "moe"]

_MODULE_OF = {"MoE": "layer", "moe": "layer", "Workspace": "workspace"}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"flashmoe.{_MODULE_OF[name]}"), name)

"""The tile plan of a launch, as both engines hand it over, and the extension it is derived by."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashmoe.errors import FlashmoeError


def extension() -> Any:
    """``flashmoe._host``: layouts, plans and the host engine, through csrc/core.

    Raises FlashmoeError where this installation holds none.
    """
    try:
        from flashmoe import _host
    except ImportError as exc:
        raise FlashmoeError(
            "this installation holds no compiled extension",
            "reinstall flashmoe on Linux x86_64 with a C++ compiler",
        ) from exc
    return _host


def tile_plan(shape: dict[str, Any], chunk_counts: np.ndarray, family: str) -> np.ndarray:
    """The tiles of all ranks in order: a structured array with plan.parquet's columns but ``iter``.

    ``shape``: the fields of csrc/core/shape.h by name.  ``chunk_counts``: uint32 [W, chunks, E].
    """
    columns = extension().plan(shape, np.ascontiguousarray(chunk_counts, np.uint32))
    dtype = [(name, np.uint32) for name in columns] + [("family", f"U{len(family)}")]
    tiles = np.empty(len(columns["rank"]), dtype)
    for name, values in columns.items():
        tiles[name] = values
    tiles["family"] = family
    return tiles

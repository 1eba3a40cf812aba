"""Payload from one rank to another: as a run's events count it, and as the routing implies it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flashmoe.trace.columns import Events


def implied(path: Path, tokens: str, experts: int, row_bytes: int) -> np.ndarray:
    """Payload [W, W] of one launch, from the ids alone: rows to their expert's owner, and back."""
    from safetensors.torch import load_file

    ids = load_file(path)["ids"].numpy()
    sizes = [int(t) for t in tokens.split(",")]
    ranks = len(sizes)
    source = np.repeat(np.arange(ranks), sizes)
    owner = np.searchsorted([(r + 1) * experts // ranks for r in range(ranks)], ids, side="right")
    matrix = np.zeros((ranks, ranks), np.int64)
    for t, row in zip(source, owner, strict=True):
        for o in row:
            if t != o:
                matrix[t, o] += row_bytes
                matrix[o, t] += row_bytes
    return matrix


def traced(run: Any, iteration: int) -> np.ndarray:
    events = Events.of(run.events)
    ranks = run.meta["world"]["ranks"]
    matrix = np.zeros((ranks, ranks), np.int64)
    mine = events.payload()
    mine = mine[events.iter[mine] == iteration]
    np.add.at(matrix, (events.rank[mine], events.peer[mine]), events.bytes[mine].astype(np.int64))
    return matrix

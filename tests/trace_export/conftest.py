from __future__ import annotations

import numpy as np
import pytest

from .synthetic import Run, run_of


@pytest.fixture(scope="module")
def run() -> Run:
    """Two iterations over three ranks, with stalls, waits, instants, an idle expert, and dispatches
    that several lanes share."""
    counts = np.random.default_rng(1).integers(0, 6, (2, 3, 3, 7))
    counts[:, :, :, 4] = 0
    return run_of(counts, wave=2, by_lanes=True)

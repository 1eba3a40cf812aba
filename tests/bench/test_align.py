"""The Triton peer's sorting kernels, by Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flashmoe

SCRIPT = """
import torch
from flashmoe.bench.peers.align import ONE_LAUNCH, Aligner

tokens, k, experts, block = CASE
torch.manual_seed(tokens)
ids = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]).to(torch.int32)
aligner = Aligner(tokens * k, experts, block, torch.device("cpu"))
assert (tokens * k <= ONE_LAUNCH) == ONE
for again in range(2):  # what a call leaves behind must not disturb the next
    out = aligner(ids)
    flat, total = ids.flatten(), int(out.total)
    counts = torch.bincount(flat, minlength=experts)
    assert total == int(((counts + block - 1) // block * block).sum())
    used = out.sorted_rows[:total]
    real = used < tokens * k
    assert sorted(used[real].tolist()) == list(range(tokens * k))
    assert (used[~real] == tokens * k).all()
    assert (out.sorted_rows[total:] == tokens * k).all()
    of_block = out.expert_of[torch.arange(total) // block]
    assert (flat[used[real].long()] == of_block[real]).all()
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("case", "one"),
    [
        ((5, 2, 8, 16), True),
        ((1, 8, 128, 64), True),
        ((32, 8, 60, 16), True),
        ((100, 4, 30, 64), False),
        ((300, 8, 60, 16), False),
    ],
)
def test_rows_are_sorted_by_expert_and_padded_to_blocks(case: tuple[int, ...], one: bool) -> None:
    script = SCRIPT.replace("CASE", str(case)).replace("== ONE", f"== {one}")
    place = str(Path(flashmoe.__file__).parents[1])
    paths = os.pathsep.join([place, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("Triton's interpreter does not work with NumPy 2.4 and newer")
    assert done.returncode == 0, done.stderr

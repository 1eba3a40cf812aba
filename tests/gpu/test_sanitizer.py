"""The kernel under compute-sanitizer, at a small shape on few SMs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from dataclasses import replace
sys.path.insert(0, {tests!r})
from layers import SMALL, deal, engine_for, forward, hold_to_reference, inputs
from flashmoe.world.base import EngineOptions
layer = replace(SMALL, intermediate={inter})
weights, x = inputs(layer, {tokens})
options = EngineOptions(ranks={ranks}, sms_per_rank={sms}, traced=True, deadline_s=120.0)
result = forward(engine_for(layer, weights, deal(x, {ranks}), options))
assert hold_to_reference(result, x, weights, layer)[0].ok
print("as the reference")
"""


# CTAs alone that dispatch all rows before their tiles; pairs that dispatch most beside them; few
# tokens by units; rows gathered by CTAs alone, and by pairs.
@pytest.mark.parametrize(
    ("ranks", "tokens", "sms", "inter"),
    [(2, 70, 3, 192), (2, 600, 2, 192), (1, 8, 6, 256), (1, 70, 4, 192), (1, 600, 4, 192)],
)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_clean_under(tool: str, ranks: int, tokens: int, sms: int, inter: int) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    done = subprocess.run(
        [
            *(sanitizer, "--tool", tool, "--error-exitcode", "86"),
            *("--kernel-name", "kernel_substring=moe_"),
            # The Python bindings ask the driver for functions newer than it: no error of ours.
            *("--report-api-errors", "no"),
            # A CTA has a hundred barriers, made by one instruction; what is not said is guessed.
            *("--num-cuda-barriers", "256"),
            *(
                sys.executable,
                "-c",
                PROGRAM.format(
                    tests=str(Path(__file__).parent),
                    ranks=ranks,
                    tokens=tokens,
                    sms=sms,
                    inter=inter,
                ),
            ),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "as the reference" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "0 errors" in done.stdout or "0 hazards" in done.stdout, done.stdout[-2000:]

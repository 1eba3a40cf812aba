"""What all tests share."""

from __future__ import annotations

import os

# The tests' tensors are small, and torch's worker threads spin: with one a core they take four
# times as long as one alone where anything else runs on the machine.
# Read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

"""What all tests share."""

from __future__ import annotations

import os

# The tests' tensors are small, and torch's worker threads spin: with one a core they take four
# times as long as one alone where anything else runs on the machine.
# Read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests start `python -m flashmoe_cli`: that is to be the flashmoe under test, as it is installed,
# and not the source tree that a test run happens to stand in, which holds no extension.
os.environ.setdefault("PYTHONSAFEPATH", "1")

"""What all tests share."""

from __future__ import annotations

import os
import signal

# A shell that starts its children in the background makes them ignore Ctrl-C, and an ignored signal
# is inherited: neither these tests nor what they start would ever be interrupted.  A handler is not
# kept through exec as SIG_IGN is, so that children have the default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests' tensors are small, and torch's worker threads spin: with one a core they take four
# times as long as one alone where anything else runs on the machine.
# Read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests start `python -m flashmoe_cli`: that is to be the flashmoe under test, as it is installed,
# and not the source tree that a test run happens to stand in, which holds no extension.
os.environ.setdefault("PYTHONSAFEPATH", "1")

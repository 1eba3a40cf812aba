"""flashmoe: a distributed Mixture-of-Experts forward in one GPU kernel, seen from inside.

Importing this package imports nothing heavy: numpy, pyarrow and torch come with the modules that
need them.
"""

from __future__ import annotations

__version__ = "0.1.0"

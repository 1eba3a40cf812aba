"""The command ``flashmoe``, also as ``python -m flashmoe_cli``."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; quiet about a Ctrl-C that comes while it is still being loaded."""
    try:
        from flashmoe_cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()

"""``python -m flashmoe_cli`` is the command ``flashmoe``."""

from flashmoe_cli.main import main

main()

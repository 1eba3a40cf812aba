"""``flashmoe info``."""

from __future__ import annotations

from flashmoe_cli.options import Json, RunPath, Verbose
from flashmoe_cli.output import SCHEMA, emit, terminal


def info(run: RunPath = None, as_json: Json = False, verbose: Verbose = False) -> None:
    """Shows what a run is: shape, machine, clock, rings and drops, verdict.

    With -v, every ring too.
    """
    from flashmoe_cli.reading import open_described
    from flashmoe_cli.render.info import info_lines

    source = open_described(run)
    source.check_files()
    if as_json:
        emit({"schema": SCHEMA, "verb": "info", "run": str(source.path), "meta": source.meta})
    else:
        if (source.meta.get("clock") or {}).get("ranks"):
            from flashmoe.trace.causality import order_of
            from flashmoe.trace.columns import Events

            source.meta["clock"]["order"] = order_of(source, Events.of(source.events))
        emit(info_lines(source.path, source.meta, terminal(), verbose=verbose))

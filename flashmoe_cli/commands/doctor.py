"""``flashmoe doctor``."""

from __future__ import annotations

from dataclasses import asdict

import typer

from flashmoe_cli.options import Device, Json
from flashmoe_cli.output import SCHEMA, emit, terminal


def doctor(device: Device = 0, as_json: Json = False) -> None:
    """Says what this machine can do: each line ok, warn or fail, with its remedy.

    Ends with 0 where nothing fails, else 1.  A machine without a GPU only warns: the host engine
    runs there.
    """
    from flashmoe_cli.checks import all_checks
    from flashmoe_cli.render.doctor import doctor_lines

    checks = list(all_checks(device))
    failed = any(c.state == "fail" for c in checks)
    if as_json:
        emit(
            {
                "schema": SCHEMA,
                "verb": "doctor",
                "ok": not failed,
                "checks": [asdict(c) for c in checks],
            }
        )
    else:
        emit(doctor_lines(checks, terminal()))
    if failed:
        raise typer.Exit(1)

"""How the command line behaves as a whole: help in sections, did-you-mean, errors caught once."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from flashmoe.errors import FlashmoeError
from flashmoe_cli.output import flush, note, show_error

_BOUNDS = re.compile(r"\s*\[\w?[-<>=.\dx]+\]$")
#: How Typer words a value that is none of a flag's choices.
_NO_CHOICE = re.compile(
    r"Invalid value for '(?P<flag>[^']+)': (?:Value error, )?"
    r"'(?P<value>[^']*)' is not one of (?P<known>.+?)\.?$"
)
#: How Typer words a value of another type or beyond a flag's bounds.
_BAD_VALUE = re.compile(
    r"Invalid value for (?P<flag>'[^:]+'): Input should be (?P<what>[^,]+)(?:, .*)?"
)
_INTERRUPTED = 130
_USAGE = 2


def _sections(params: Sequence[Any], ctx: Any, first: str) -> dict[str, list[tuple[str, str]]]:
    """The help records of ``params`` under the panel each names, in order of appearance."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for param in params:
        record = param.get_help_record(ctx)
        if record is not None:
            panel = getattr(param, "rich_help_panel", None) or first
            # Typer keeps a bound in the metavar's column; a reader wants it only when it is broken.
            record = (record[0], _BOUNDS.sub("", record[1]))
            sections.setdefault(panel, []).append(record)
    return sections


def _write_sections(formatter: Any, sections: dict[str, list[tuple[str, str]]]) -> None:
    for title, records in sections.items():
        with formatter.section(title):
            formatter.write_dl(records)


class Verb(TyperCommand):
    """A verb whose help lists its options under the headings they name."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes arguments first, then the sections, then what every verb has."""
        sections = _sections(self.get_params(ctx), ctx, "Options")
        common = sections.pop("Options", [])
        if common:
            sections["Options"] = common
        _write_sections(formatter, sections)


class Root(TyperGroup):
    """The root command: verbs under headings, and the one place where errors are caught."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the verbs first: they are what a newcomer looks for."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is None or command.hidden:
                continue
            panel = getattr(command, "rich_help_panel", None) or "Verbs"
            sections.setdefault(panel, []).append((name, command.get_short_help_str(limit=90)))
        _write_sections(formatter, sections)
        _write_sections(formatter, _sections(self.get_params(ctx), ctx, "Options"))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs the command line; every failure becomes a message, a hint and an exit code."""
        argv = list(sys.argv[1:] if args is None else args)
        own = argv[: argv.index("--")] if "--" in argv else argv
        debug = "--debug" in own or bool(os.environ.get("FLASHMOE_DEBUG"))
        as_json = "--json" in own
        argv = [a for a in own if a != "--debug"] + argv[len(own) :]
        try:
            result = super().main(
                argv, prog_name, complete_var, False, windows_expand_args, **extra
            )
            code = result if isinstance(result, int) else 0
            if code == _INTERRUPTED:
                raise KeyboardInterrupt
        except Exception as exc:
            if debug:
                traceback.print_exc()
            verb = next((a for a in own if a in self.commands), None)
            message, hint, code = _explain(exc, verb)
            show_error(message, hint, code, as_json=as_json)
        except KeyboardInterrupt:
            code = _INTERRUPTED
            if as_json:
                show_error("interrupted", "", code, as_json=True)
            else:
                note("interrupted")
        flush()
        sys.exit(code)


def _explain(exc: Exception, verb: str | None) -> tuple[str, str, int]:
    """An exception of ``verb`` as (message, hint, exit code)."""
    if isinstance(exc, FlashmoeError):
        return exc.message, exc.hint, exc.exit_code
    if isinstance(exc, typer.TyperException):
        return _explain_usage(exc, verb)
    if isinstance(exc, typer.Abort):
        return "aborted", "", 1
    if isinstance(exc, OSError):
        where = f": {exc.filename}" if exc.filename else ""
        hint = "free some space, or choose another place with -o or FLASHMOE_RUNS"
        full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
        return f"{exc.strerror or exc}{where}", hint if full else "check the path", 1
    what = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
    return f"internal error: {what}", "run it again with --debug and report the traceback", 1


def _verbs_with(option: str, ctx: Any) -> list[str]:
    """The verbs that do have an option which the verb of ``ctx`` lacks."""
    verbs = getattr(ctx.parent.command, "commands", {}) if ctx.parent is not None else {}
    return [
        f"flashmoe {name}"
        for name, command in verbs.items()
        if any(option in p.opts for p in command.get_params(ctx))
    ]


def _explain_usage(exc: typer.TyperException, verb: str | None) -> tuple[str, str, int]:
    """A misused command line, with the nearest flag and where to read on."""
    message = " ".join(exc.format_message().split())
    ctx = getattr(exc, "ctx", None)
    path = f"flashmoe {verb}" if verb else "flashmoe"
    hint = f"{path} --help lists what there is"
    option = getattr(exc, "option_name", None)
    if option and ctx is not None and message.lower().startswith("no such option"):
        message = f"no such option {option}"
        known = [o for p in ctx.command.get_params(ctx) for o in (*p.opts, *p.secondary_opts)]
        known = [o for o in known if o.startswith("--")]
        elsewhere = _verbs_with(option, ctx) if option.startswith("--") else []
        near = get_close_matches(option, known, n=1, cutoff=0.6) or getattr(
            exc, "possibilities", None
        )
        misspelt = get_close_matches(option, known, n=1, cutoff=0.85)
        if elsewhere and not misspelt:
            hint = f"{option} is of {' and '.join(elsewhere)}; {hint}"
        elif near:
            hint = f"did you mean {near[0]}? {hint}"
    elif (choice := _NO_CHOICE.match(message)) is not None:
        near = get_close_matches(choice["value"], re.findall(r"'([^']+)'", choice["known"]), n=1)
        message = f"{choice['flag']} {choice['value']}: it is one of {choice['known']}"
        message = message.replace("'", "")
        if near:
            hint = f"did you mean {near[0]}? {hint}"
    elif (bad := _BAD_VALUE.fullmatch(message)) is not None:
        message = f"{bad['flag'].replace(chr(39), '')} must be {bad['what'].rstrip('.')}"
    else:
        message, _, suggestion = message.partition(" Did you mean ")
        if suggestion:
            hint = f"did you mean {suggestion.replace(chr(39), '').rstrip('?')}? {hint}"
        message = message[:1].lower() + message[1:].rstrip(".")
    return message, hint, getattr(exc, "exit_code", _USAGE)

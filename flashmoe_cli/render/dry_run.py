"""What ``--dry-run`` prints: the commands that start a run on one node, and on several."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashmoe_cli.output import SCHEMA, Terminal
from flashmoe_cli.render.text import fit

if TYPE_CHECKING:
    from flashmoe.session import Request

_OURS = ("--dry-run", "--processes")
_OURS_WITH_VALUE = ("--gpus", "--ranks", "--ranks-per-gpu")
#: How the dry run itself prints: no part of the run.
_OF_DRY_RUN = ("--dry-run", "--json")


@dataclass(frozen=True)
class Command:
    """A command line that starts the run: by which launcher, on how many nodes, in words."""

    launcher: str
    nodes: int
    where: str
    line: str


def dry_run_commands(request: Request, argv: Sequence[str], nodes: int = 2) -> list[Command]:
    """The same run by flashmoe itself, srun and torchrun; ``argv`` is the command line as typed."""
    kept = [a for a in argv if a not in _OF_DRY_RUN]
    bare = shlex.join(_without_places(kept))
    each = -(-request.ranks // nodes)
    total = each * nodes
    gpus = f" --gpus-per-node={-(-each // request.ranks_per_gpu)}" if request.gpus else ""
    return [
        Command("flashmoe", 1, "on this node", f"flashmoe {shlex.join(kept)}"),
        Command(
            "srun",
            nodes,
            f"on {nodes} nodes by Slurm, {plural_ranks(each)} on each",
            f"srun --nodes={nodes} --ntasks={total} --ntasks-per-node={each}{gpus} flashmoe {bare}",
        ),
        Command(
            "torchrun",
            nodes,
            f"on {nodes} nodes by torchrun, typed on each of them (HOST is the first)",
            f"torchrun --nnodes={nodes} --nproc-per-node={each} --rdzv-backend=c10d "
            f"--rdzv-endpoint=HOST:29500 -m flashmoe_cli {bare}",
        ),
    ]


def dry_run_lines(request: Request, argv: Sequence[str], where: Terminal) -> list[str]:
    """The commands, each whole below where it is to be typed, and what to know of them."""
    lines = []
    for command in dry_run_commands(request, argv):
        lines += [*fit(f"{command.where}:", where.width), f"  {command.line}"]
    notes = ["nodes and ranks on each are yours to change; -o must name a place that all nodes see"]
    if request.world == "host":
        notes.append(
            "the host engine's processes share memory: on several nodes only GPU worlds run"
        )
    return lines + [part for text in notes for part in fit(text, where.width)]


def dry_run_json(verb: str, request: Request, argv: Sequence[str]) -> dict[str, Any]:
    """The commands as the object that ``--json`` prints."""
    commands = [
        {"launcher": c.launcher, "nodes": c.nodes, "command": c.line}
        for c in dry_run_commands(request, argv)
    ]
    return {"schema": SCHEMA, "verb": verb, "commands": commands}


def plural_ranks(n: int) -> str:
    """``1 rank``, ``4 ranks``."""
    return f"{n} rank" + ("" if n == 1 else "s")


def _without_places(argv: Sequence[str]) -> list[str]:
    """The arguments but for those that another launcher says instead."""
    kept: list[str] = []
    skip = False
    for argument in argv:
        if skip:
            skip = False
        elif argument in _OURS_WITH_VALUE:
            skip = True
        elif argument not in _OURS and not argument.startswith(
            tuple(f"{o}=" for o in _OURS_WITH_VALUE)
        ):
            kept.append(argument)
    return kept

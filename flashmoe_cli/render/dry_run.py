"""What ``--dry-run`` prints: the commands that start a run on one node, and on several."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashmoe.session import Request

_OURS = ("--dry-run", "--processes")
_OURS_WITH_VALUE = ("--gpus", "--ranks", "--ranks-per-gpu")


def dry_run_lines(request: Request, argv: Sequence[str], nodes: int = 2) -> list[str]:
    """The same run by flashmoe itself, srun and torchrun; ``argv`` is the command line as typed."""
    here = [a for a in argv if a != "--dry-run"]
    bare = shlex.join(_without_places(argv))
    each = -(-request.ranks // nodes)
    total = each * nodes
    gpus = f" --gpus-per-node={-(-each // request.ranks_per_gpu)}" if request.gpus else ""
    lines = [
        "on this node:",
        f"  flashmoe {shlex.join(here)}",
        f"on {nodes} nodes by Slurm, {plural_ranks(each)} on each:",
        f"  srun --nodes={nodes} --ntasks={total} --ntasks-per-node={each}{gpus} flashmoe {bare}",
        f"on {nodes} nodes by torchrun, typed on each of them (HOST is the first):",
        f"  torchrun --nnodes={nodes} --nproc-per-node={each} --rdzv-backend=c10d "
        f"--rdzv-endpoint=HOST:29500 -m flashmoe_cli {bare}",
        "nodes and ranks on each are yours to change; -o must name a place that all nodes see",
    ]
    if request.world == "host":
        lines.append(
            "the host engine's processes share memory: on several nodes only GPU worlds run"
        )
    return lines


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

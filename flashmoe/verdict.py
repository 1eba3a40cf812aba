"""Is the result right, and what crossed between ranks: what a run is judged and summed up by."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from flashmoe.config import MoEConfig
    from flashmoe.inputs import Inputs
    from flashmoe.session import Progress, Request
    from flashmoe.trace.diagnosis import HangReport
    from flashmoe.world.base import Engine, RankOutput, Routing


def experts_of_rank(experts: int, ranks: int) -> list[tuple[int, int]]:
    """The experts [a, b) that each rank owns: consecutive, as even as whole numbers allow."""
    return [(r * experts // ranks, (r + 1) * experts // ranks) for r in range(ranks)]


def check(inputs: Inputs, outputs: Sequence[RankOutput], progress: Progress) -> dict[str, Any]:
    """Holds every rank's output against the float32 reference, and its routing against the router.

    The output is judged on the engine's own ids and weights (before the shared expert), so that a
    near-tie in the routing is no error of the arithmetic.  Runs where the weights lie.  Gives
    ``ok``, sums and maxima over the ranks, and ``ranks``, each rank's figures.
    """
    from flashmoe.numerics import check_output, check_routing

    device = inputs.weights.gate.device
    ranks = []
    for r, (x, out) in enumerate(zip(inputs.x, outputs, strict=True)):
        progress("checking against the float32 reference", r, len(outputs))
        x, y, ids, weights = (t.to(device) for t in (x, out.y, out.ids, out.weights))
        args = (inputs.weights, inputs.config, ids, weights)
        verdict: dict[str, Any] = {"output": _plain(check_output(y, x, *args))}
        if inputs.config.routing.kind != "external":
            verdict["routing"] = _plain(check_routing(x, *args))
        ranks.append(verdict)
    return combine(ranks)


def combine(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each rank's verdict as one of all; see ``check``."""
    output = _worst([v["output"] for v in ranks])
    routing = _worst([v["routing"] for v in ranks if "routing" in v])
    ok = output["ok"] and (routing is None or routing["ok"])
    return {"ok": ok, "output": output, "routing": routing, "ranks": list(ranks)}


def _plain(verdict: Any) -> dict[str, Any]:
    """A verdict's fields; a float that is not finite, which JSON cannot hold, is None."""

    def finite(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: finite(value) for name, value in asdict(verdict).items()}


_SUMS = (
    *("elements", "over", "not_finite", "unbounded"),
    *("tokens", "bad_ids", "wrong", "wrong_weights", "near_ties", "differ"),
)
_MAXIMA = ("max_abs", "max_ratio", "relative_rms", "max_weight_abs", "max_weight_ratio")


def _worst(verdicts: Sequence[dict[str, Any]]) -> Any:
    """All ranks' verdicts as one: counts summed, errors as their maximum; None of none."""
    if not verdicts:
        return None
    whole: dict[str, Any] = {"ok": all(v["ok"] for v in verdicts)}
    whole |= {k: sum(v[k] for v in verdicts) for k in _SUMS if k in verdicts[0]}
    whole |= {k: max(v[k] or 0.0 for v in verdicts) for k in _MAXIMA if k in verdicts[0]}
    return whole


def with_shared(inputs: Inputs, outputs: Sequence[RankOutput]) -> list[torch.Tensor]:
    """Each rank's y [T, H], DeepSeek's shared expert added in float32 where the layer has one."""
    if inputs.shared is None:
        return [out.y for out in outputs]
    from flashmoe.reference import mlp

    device = inputs.weights.gate.device
    whole = []
    for x, out in zip(inputs.x, outputs, strict=True):
        dense = mlp(x.to(device), inputs.shared.gate, inputs.shared.up, inputs.shared.down)
        whole.append((out.y.to(device).float() + dense).to(out.y.dtype).cpu())
    return whole


def save_output(request: Request, inputs: Inputs, outputs: Sequence[RankOutput]) -> Path:
    """Writes y [T, H], ids and weights [T, k] of all ranks, rank-major, as safetensors."""
    import torch

    from flashmoe.tokens import save_outputs

    assert request.save_output is not None
    y = torch.cat(with_shared(inputs, outputs))
    ids = torch.cat([out.ids for out in outputs])
    weights = torch.cat([out.weights for out in outputs])
    save_outputs(request.save_output, y, ids, weights, force=request.force)
    return request.save_output


def traffic_of(
    routings: Sequence[Routing], config: MoEConfig, ranks: int
) -> tuple[np.ndarray, np.ndarray]:
    """(rows of each expert uint64 [E], payload bytes uint64 [W, W]) of the last of ``routings``.

    Payload is what crosses from the row's rank to the column's: each row to its expert's owner,
    and each result row back.  What stays on a rank does not count.  Zeros where nothing ran.
    """
    payload = np.zeros((ranks, ranks), np.uint64)
    if not routings:
        return np.zeros(config.experts, np.uint64), payload
    counts = routings[-1].chunk_counts.sum(axis=1, dtype=np.uint64)  # [W, E]
    for owner, (a, b) in enumerate(experts_of_rank(config.experts, ranks)):
        there = counts[:, a:b].sum(axis=1) * np.uint64(config.row_bytes)
        payload[:, owner] += there
        payload[owner, :] += there
    np.fill_diagonal(payload, 0)
    return counts.sum(axis=0), payload


def diagnose_hang(engine: Engine, slots: np.ndarray) -> HangReport:
    """Why the engine's last launch did not end, from its flight recorder's ``slots``."""
    from flashmoe.trace.diagnosis import diagnose

    options = engine.options
    deadline_s = options.deadline_s
    if int(slots["epoch"].max(initial=0)) <= 1:
        deadline_s = options.first_s
    # The host engine stamps by CLOCK_MONOTONIC; a GPU's clock cannot be read from here, and the
    # launch has just ended, so that its last change of state is now.
    on_host = engine.world == "host"
    now_ns = time.monotonic_ns() if on_host else int(slots["since_ns"].max(initial=0))
    routing = engine.routing()
    return diagnose(
        slots,
        ranks=options.ranks,
        deadline_s=deadline_s,
        now_ns=now_ns,
        counts_seen=engine.counts_seen(),
        chunk_counts=routing.chunk_counts,
        tiles=routing.tiles,
    )

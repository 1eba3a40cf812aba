"""What run.json must hold for its run to be read: what readers rely on of docs/trace-format.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeAlias

from flashmoe.errors import FlashmoeError
from flashmoe.trace.schema import N_LANES, RingMode

Rule: TypeAlias = "Callable[[Any], bool] | dict[str, Rule]"


#: No count, time or figure of a run comes near it: what is below it fits 64 bits and a float.
_MOST: Final = 1 << 63


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MOST


def _count(value: Any) -> bool:
    return _whole(value) and bool(value >= 0)


def _below(most: int) -> Callable[[Any], bool]:
    return lambda value: _count(value) and bool(value < most)


def _number(value: Any) -> bool:
    """Also false of NaN and the infinities."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MOST < value < _MOST


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _list_of(rule: Rule) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list) and all(_first_wrong(v, rule, "") is None for v in value)
    )


def _span(value: Any) -> bool:
    """Experts [a, b)."""
    return _list_of(_count)(value) and len(value) == 2 and value[0] <= value[1]


_RING: Final[Rule] = {
    **dict.fromkeys(("rank", "sm", "cta"), _below(1 << 16)),
    "lane": _below(N_LANES),
    "mode": _below(len(RingMode)),
    "began": _flag,
    **dict.fromkeys(("count", "capacity", "dropped"), _count),
    **dict.fromkeys(("begin_ns", "end_ns", "begin_cycles", "end_cycles"), _count),
}

_EXCHANGE: Final[Rule] = {"at_ns": _whole, "offset_ns": _whole, "bound_ns": _count}


def _aligned(value: Any) -> bool:
    """A rank's entry of ``clock.ranks``; null where its clock was not compared."""
    return value is None or _first_wrong(value, _ALIGNED, "") is None


_ALIGNED: Final[Rule] = {
    "start": _EXCHANGE,
    "end?": _EXCHANGE,
    "drift_ppm?": _number,
    "applied": _flag,
    "tightened?": {"start": _EXCHANGE, "end": _EXCHANGE},
}


def _linked(value: Any) -> bool:
    """A rank's entry of ``nvlink``."""
    if not isinstance(value, dict) or not _count(value.get("rank")):
        return False
    counters = value.get("counters")
    names = ("data_tx", "data_rx", "raw_tx", "raw_rx")
    known = counters is None or (
        isinstance(counters, dict) and all(_count(counters.get(name)) for name in names)
    )
    payload = _count(value.get("payload_tx")) and _count(value.get("payload_rx"))
    texts = _text(value.get("why")) and _text(value.get("gpu"))
    return known and payload and texts and _flag(value.get("certain"))


_PROCESS: Final[Rule] = {"rank": _count, "message": _text, "gpu?": _text}


# A key that ends in ? may be missing or null.
_RULES: Final[dict[str, Rule]] = {
    "config": {
        **dict.fromkeys(("hidden", "intermediate", "experts", "top_k"), _count),
        **dict.fromkeys(("activation", "dtype"), _text),
        "routing": {"kind": _text},
        "name?": _text,
        "checkpoint?": _text,
    },
    "world": {
        **dict.fromkeys(("ranks", "sms_per_rank"), _count),
        "kind": _text,
        "topology?": _text,
        "experts_of_rank": _list_of(_span),
        "tokens": _list_of(_count),
        **dict.fromkeys(("row_bytes?", "tile_rows?"), _count),
        "processes?": {
            "launcher": _text,
            "nodes": _count,
            "transport": _text,
            "why_transport?": _text,
            "pointers": _flag,
            "ranks": _list_of(_PROCESS),
        },
    },
    "rings": {
        **dict.fromkeys(("n", "capacity", "records", "dropped"), _count),
        "mode?": _text,
        "per_ring": _list_of(_RING),
    },
    "tool?": {"version?": _text, "commit?": _text},
    "device?": {"name": _text, "throttle?": _list_of(_text)},
    "clock?": {
        "source": _text,
        **dict.fromkeys(("step_ns", "record_cost_ns", "sm_mhz?"), _number),
        "ranks?": _list_of(_aligned),
        "tightening?": {"pairs": _count, "contradiction_ns": _number},
    },
    "iterations?": _count,
    "nvlink?": {"launches": lambda n: _count(n) and n > 0, "ranks": _list_of(_linked)},
    "timing?": {"launch_ms": _list_of(_number)},
    "check?": {
        "output": {
            "ok": _flag,
            **dict.fromkeys(("over", "not_finite", "unbounded"), _count),
            **dict.fromkeys(("max_abs", "max_ratio"), _number),
        },
        "routing?": {
            "ok": _flag,
            **dict.fromkeys(("wrong", "bad_ids", "wrong_weights", "near_ties"), _count),
        },
    },
    "status?": {"code": _count, "message": _text},
    "hang?": {"reason?": _text, "text?": _list_of(_text)},
}


def require_described(meta: dict[str, Any], file: Path) -> None:
    """Holds the metadata of a run that says what ran to what readers rely on.

    Raises FlashmoeError, naming the first key of ``file`` that is missing or of another type, or
    the keys that contradict each other.
    """
    wrong = _first_wrong(meta, _RULES, "") or _first_contradiction(meta)
    if wrong is not None:
        raise FlashmoeError(
            f"{file} is damaged: {wrong} is not what flashmoe writes there",
            "copy the run again, or trace again",
        )


def _first_contradiction(meta: dict[str, Any]) -> str | None:
    """The first key that another contradicts, where each alone is of its type."""
    world, rings, clock = meta["world"], meta["rings"], meta.get("clock") or {}
    edges = [0, *(b for _, b in world["experts_of_rank"])]
    begins = [a for a, _ in world["experts_of_rank"]]
    if not world["ranks"] == len(world["tokens"]) == len(begins) > 0:
        return "world.ranks"
    if begins != edges[:-1] or edges[-1] != meta["config"]["experts"]:
        return "world.experts_of_rank"
    if rings["n"] != len(rings["per_ring"]):
        return "rings.n"
    if any(ring["rank"] >= world["ranks"] for ring in rings["per_ring"]):
        return "rings.per_ring"
    clocks = clock.get("ranks")
    if clocks is not None and len(clocks) != world["ranks"]:
        return "clock.ranks"
    if not clock.get("tightening") and any(c and c.get("tightened") for c in clocks or ()):
        return "clock.tightening"
    return None


def _first_wrong(value: Any, rule: Rule, path: str) -> str | None:
    if not isinstance(rule, dict):
        return None if rule(value) else path
    if not isinstance(value, dict):
        return path
    for key, inner in rule.items():
        name = key.removesuffix("?")
        if key != name and value.get(name) is None:
            continue
        wrong = _first_wrong(value.get(name), inner, f"{path}.{name}" if path else name)
        if wrong is not None:
            return wrong
    return None

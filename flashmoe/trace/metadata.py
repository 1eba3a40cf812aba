"""What run.json must hold for its run to be read: what readers rely on of docs/trace-format.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeAlias

from flashmoe.errors import FlashmoeError

Rule: TypeAlias = "Callable[[Any], bool] | dict[str, Rule]"


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _list_of(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(rule, value))


def _pair(value: Any) -> bool:
    return _list_of(_count)(value) and len(value) == 2


_RING: Final = ("rank", "sm", "cta", "lane", "count", "begin_ns", "end_ns", "begin_cycles",
                "end_cycles", "dropped")  # fmt: skip


def _ring(value: Any) -> bool:
    return isinstance(value, dict) and all(_count(value.get(name)) for name in _RING)


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


def _process(value: Any) -> bool:
    return isinstance(value, dict) and _count(value.get("rank"))


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
        "experts_of_rank": _list_of(_pair),
        "tokens": _list_of(_count),
        **dict.fromkeys(("row_bytes?", "tile_rows?"), _count),
        "processes?": {"nodes": _count, "pointers": _flag, "ranks": _list_of(_process)},
    },
    "rings": {
        **dict.fromkeys(("n", "capacity", "records", "dropped"), _count),
        "mode?": _text,
        "per_ring": _list_of(_ring),
    },
    "tool?": {"version?": _text, "commit?": _text},
    "device?": {"name": _text},
    "clock?": {"source": _text, "step_ns": _number, "record_cost_ns": _number, "sm_mhz?": _number},
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
    wrong = _first_wrong(meta, _RULES, "")
    if wrong is None:
        world, experts = meta["world"], meta["config"]["experts"]
        edges = [0, *(b for _, b in world["experts_of_rank"])]
        begins = [a for a, _ in world["experts_of_rank"]]
        if not world["ranks"] == len(world["tokens"]) == len(begins) > 0:
            wrong = "world.ranks"
        elif begins != edges[:-1] or edges[-1] != experts:
            wrong = "world.experts_of_rank"
    if wrong is not None:
        raise FlashmoeError(
            f"{file} is damaged: {wrong} is not what flashmoe writes there",
            "copy the run again, or trace again",
        )


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

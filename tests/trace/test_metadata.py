"""A run.json that flashmoe did not write so is refused by name of the key, never by a traceback."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashmoe.errors import FlashmoeError
from flashmoe.trace.account import Actors
from flashmoe.trace.align import Alignment
from flashmoe.trace.metadata import require_described
from flashmoe.trace.rundir import open_run
from flashmoe_cli.output import Terminal
from flashmoe_cli.reading import open_described
from flashmoe_cli.render.info import info_lines, title

WRONG = ("DELETED", None, "x", -7, 2.5, [], {}, [[]], [{}], float("nan"), 10**400)

Key = str | int


def keys(of: Any, path: tuple[Key, ...] = ()) -> Iterator[tuple[Key, ...]]:
    """The paths of an object's keys, and of the first entry of its lists."""
    if isinstance(of, dict):
        for key, value in of.items():
            yield (*path, key)
            yield from keys(value, (*path, key))
    elif isinstance(of, list) and of:
        yield (*path, 0)
        yield from keys(of[0], (*path, 0))


def changed(meta: dict[str, Any], path: tuple[Key, ...], to: Any) -> dict[str, Any]:
    meta = copy.deepcopy(meta)
    inner: Any = meta
    for key in path[:-1]:
        inner = inner[key]
    if to == "DELETED":
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return meta


CHECK = {
    "ok": True,
    "output": {"ok": True, "over": 0, "not_finite": 0, "unbounded": 0, "max_abs": 0.1,
               "max_ratio": 0.5},
    "routing": {"ok": True, "wrong": 0, "bad_ids": 0, "wrong_weights": 0, "near_ties": 1},
}  # fmt: skip


LINKS = {
    "launches": 3,
    "ranks": [
        {"rank": 0, "gpu": "GPU-0", "counters": None, "certain": False, "why": "Not Supported",
         "payload_tx": 8, "payload_rx": 8},
    ],
}  # fmt: skip


PROCESSES = {
    "launcher": "flashmoe", "nodes": 1, "transport": "ipc", "why_transport": "", "pointers": True,
    "ranks": [{"rank": 0, "pid": 1, "message": "ok", "gpu": None}],
}  # fmt: skip


def clocks(ranks: int) -> dict[str, Any]:
    """What ``clock`` says of ranks that are processes."""
    ends = {name: {"at_ns": at, "offset_ns": -7, "bound_ns": 5}
            for name, at in (("start", 1), ("end", 10**9))}  # fmt: skip
    how = ends | {"drift_ppm": 0.1, "drift_bound_ppm": 1.0, "applied": True, "tightened": ends}
    return {"ranks": [how] * ranks, "tightening": {"pairs": 3, "contradiction_ns": 0.0}}


@pytest.fixture(scope="module")
def meta(run_path: Path) -> dict[str, Any]:
    meta = open_run(run_path).meta
    device = {"name": "a GPU", "throttle": ["power cap"]}
    more = {"check": CHECK, "device": device, "nvlink": LINKS}
    more["world"] = meta["world"] | {"processes": PROCESSES}
    more["clock"] = meta["clock"] | clocks(meta["world"]["ranks"])
    return meta | more


def test_what_flashmoe_writes_passes(meta: dict[str, Any]) -> None:
    require_described(meta, Path("run.json"))
    older = changed(changed(meta, ("timing",), "DELETED"), ("world", "row_bytes"), "DELETED")
    require_described(older | {"new": 1}, Path("run.json"))


def test_whatever_key_is_wrong_it_is_refused_or_shown(meta: dict[str, Any], run_path: Path) -> None:
    """Nothing that passes makes `info` fail, or what every figure begins with."""
    refused = 0
    for path in keys(meta):
        for to in WRONG:
            try:
                other = changed(meta, path, to)
                require_described(other, Path("run.json"))
            except FlashmoeError as error:
                assert error.hint
                refused += 1
                continue
            title(run_path, other)
            assert info_lines(run_path, other, Terminal(80, False, True), verbose=True)
            assert len(Actors.of(other)) <= len(other["rings"]["per_ring"])
            for said in (other.get("clock") or {}).get("ranks") or ():
                assert said is None or Alignment.from_dict(said).start.bound_ns >= 0
    assert refused > 100


@pytest.mark.parametrize(
    ("path", "to"),
    [
        ("config.experts", "8"),
        ("config.routing.kind", None),
        ("world.ranks", "DELETED"),
        ("world.tokens", [1, True]),
        ("world.experts_of_rank", [[0, 4], [5, 8]]),
        ("world.experts_of_rank", [[0, 4], [4, 7]]),
        ("clock.step_ns", "slow"),
        ("rings.per_ring", [{}]),
        ("rings.n", 1),
        ("rings.per_ring.0.mode", 2),
        ("rings.per_ring.0.began", "DELETED"),
        ("rings.per_ring.0.lane", 6),
        ("rings.per_ring.0.rank", 60000),
        ("clock.ranks", []),
        ("clock.ranks", [{}]),
        ("clock.ranks.0.start.bound_ns", -1),
        ("clock.ranks.0.tightened.end", None),
        ("clock.tightening", None),
        ("clock.tightening.pairs", "DELETED"),
        ("world.processes.ranks.0.message", "DELETED"),
        ("check.routing.wrong", "none"),
        ("nvlink.launches", 0),
        ("nvlink.ranks", [{"rank": 0}]),
    ],
)
def test_the_message_names_the_key(meta: dict[str, Any], path: str, to: Any) -> None:
    keys = tuple(int(key) if key.isdecimal() else key for key in path.split("."))
    named = path.partition(".0")[0]
    with pytest.raises(FlashmoeError, match=rf"run\.json is damaged: {named} ") as found:
        require_described(changed(meta, keys, to), Path("a/run.json"))
    assert "again" in found.value.hint


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_is_no_json(meta: dict[str, Any], tmp_path: Path, number: str) -> None:
    wrong = json.dumps(changed(meta, ("config", "skew"), float(number)))
    (tmp_path / "run.json").write_text(wrong)
    with pytest.raises(FlashmoeError, match=r"run\.json is damaged"):
        open_described(tmp_path)


def test_keys_of_a_newer_version_are_left(meta: dict[str, Any]) -> None:
    how = meta["clock"]["ranks"][0]
    newer = how | {"start": how["start"] | {"new": 1}}
    assert Alignment.from_dict(newer) == Alignment.from_dict(how)


def test_the_verbs_hold_a_run_to_it(meta: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(changed(meta, ("world", "kind"), 7)))
    with pytest.raises(FlashmoeError, match=r"world\.kind"):
        open_described(tmp_path)

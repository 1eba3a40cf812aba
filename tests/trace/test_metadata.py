"""A run.json that flashmoe did not write so is refused by name of the key, never by a traceback."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashmoe.errors import FlashmoeError
from flashmoe.trace.metadata import require_described
from flashmoe.trace.rundir import open_run
from flashmoe_cli.output import Terminal
from flashmoe_cli.reading import open_described
from flashmoe_cli.render.info import info_lines, title

WRONG = ("DELETED", None, "x", -7, 2.5, [], {}, [[]], [{}])


def keys(of: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in of.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from keys(value, (*path, key))


def changed(meta: dict[str, Any], path: tuple[str, ...], to: Any) -> dict[str, Any]:
    meta = copy.deepcopy(meta)
    inner = meta
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


@pytest.fixture(scope="module")
def meta(run_path: Path) -> dict[str, Any]:
    more = {"check": CHECK, "device": {"name": "a GPU"}, "nvlink": LINKS}
    return open_run(run_path).meta | more


def test_what_flashmoe_writes_passes(meta: dict[str, Any]) -> None:
    require_described(meta, Path("run.json"))
    older = changed(changed(meta, ("timing",), "DELETED"), ("world", "row_bytes"), "DELETED")
    require_described(older | {"new": 1}, Path("run.json"))


def test_whatever_key_is_wrong_it_is_refused_or_shown(meta: dict[str, Any], run_path: Path) -> None:
    """Nothing that passes makes `info` fail."""
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
        ("check.routing.wrong", "none"),
        ("nvlink.launches", 0),
        ("nvlink.ranks", [{"rank": 0}]),
    ],
)
def test_the_message_names_the_key(meta: dict[str, Any], path: str, to: Any) -> None:
    with pytest.raises(FlashmoeError, match=rf"run\.json is damaged: {path} ") as found:
        require_described(changed(meta, tuple(path.split(".")), to), Path("a/run.json"))
    assert "again" in found.value.hint


def test_the_verbs_hold_a_run_to_it(meta: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(changed(meta, ("world", "kind"), 7)))
    with pytest.raises(FlashmoeError, match=r"world\.kind"):
        open_described(tmp_path)

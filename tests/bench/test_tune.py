"""Tuning: which cut is chosen, what the table holds, and who reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashmoe import tuning
from flashmoe.bench.shapes import Shape
from flashmoe.bench.tune import Score, TuneOptions, candidates, choose, score, tune_layer
from flashmoe.config import MoEConfig
from flashmoe.errors import FlashmoeError
from flashmoe.presets import PRESETS
from flashmoe.tuning import Tiling, described, put, tiling_of
from flashmoe.world.kernel import ARCH, TWO_WAVES_BYTES, launch_shape, tiling, untuned
from flashmoe.world.tiles import extension

from . import fakes
from .fakes import HostStopwatch, TorchEngine, machine, opened_gpu, quiet

TINY = PRESETS["tiny"].config
CUT = Tiling(160, 2)
MOST_ROWS = extension().TILE_ROWS[TINY.dtype]
UNTUNED = Tiling(MOST_ROWS, 4)


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "deep" / "tuning.json"
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    return path


def entry(config: MoEConfig = TINY, cut: Tiling = CUT, **more: Any) -> dict[str, Any]:
    key = tuning.key_of(config, ARCH)
    return {**key, "tile_rows": cut.tile_rows, "waves": cut.waves, "measured": {}, **more}


def test_what_was_put_is_what_a_launch_is_told(table: Path) -> None:
    assert tiling(TINY, 64) == untuned(TINY, 64)
    assert put(entry()) == table
    assert tiling(TINY, 64) == CUT
    shape = launch_shape(TINY, 2, 4, 64, tiling(TINY, 64))
    owned = TINY.experts // 2
    assert (shape["tile_m"], shape["wave_experts"]) == (160, -(-owned // 2))
    assert [p.name for p in table.parent.iterdir()] == ["tuning.json"]


@pytest.mark.parametrize("field", ["hidden", "intermediate", "dtype"])
def test_an_entry_holds_for_its_own_key_alone(field: str) -> None:
    put(entry())
    other = {"hidden": 128, "intermediate": 128, "dtype": "fp16"}[field]
    changed = MoEConfig(**{**_fields(TINY), field: other})
    assert tiling(changed, 64) == untuned(changed, 64)
    assert tiling(MoEConfig(**{**_fields(TINY), "experts": 4}), 64) == CUT  # nor on E, k or W
    put(entry(changed, Tiling(64, 8)))
    assert tiling(changed, 64) == Tiling(64, 8)
    assert tiling(TINY, 64) == CUT
    put(entry(cut=Tiling(128, 8)))
    assert tiling(TINY, 64) == Tiling(128, 8)


def _fields(config: MoEConfig) -> dict[str, Any]:
    names = ("hidden", "intermediate", "experts", "top_k", "activation", "dtype", "routing")
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "{}",
        json.dumps({"schema": 99, "entries": []}),
        json.dumps({"schema": 1, "entries": [{"tile_rows": 128, "waves": 8}]}),
        json.dumps({"schema": 1, "entries": [entry(tile_rows="128")]}),
        json.dumps({"schema": 1, "entries": [entry(tile_rows=200)]}),
        json.dumps({"schema": 1, "entries": [entry(tile_rows=100)]}),
        json.dumps({"schema": 1, "entries": [entry(waves=0)]}),
    ],
)
def test_a_table_of_no_use_is_one_clear_error(table: Path, text: str) -> None:
    table.parent.mkdir()
    table.write_text(text)
    with pytest.raises(FlashmoeError, match=r"tuning table .* is of no use") as caught:
        tiling(TINY, 64)
    assert tuning.VARIABLE in caught.value.hint


def test_h_that_l2_holds_half_of_is_cut_in_two_waves() -> None:
    row_bytes = TINY.top_k * TINY.intermediate * 2
    most = TWO_WAVES_BYTES // row_bytes
    assert untuned(TINY, most) == Tiling(MOST_ROWS, 2)
    assert untuned(TINY, most + 1) == Tiling(MOST_ROWS, 4)
    shape = launch_shape(TINY, 1, 4, most, tiling(TINY, most))
    assert shape["wave_experts"] == -(-TINY.experts // 2)


def test_the_hash_is_of_key_and_cut() -> None:
    assert described(TINY, ARCH, UNTUNED, UNTUNED)["tuned"] is None
    one = described(TINY, ARCH, CUT, UNTUNED)
    assert (one["tile_rows"], one["waves"]) == (160, 2)
    assert one == described(TINY, ARCH, Tiling(160, 2), UNTUNED)
    assert one["tuned"] != described(TINY, ARCH, Tiling(160, 8), UNTUNED)["tuned"]
    other = MoEConfig(**{**_fields(TINY), "hidden": 128})
    assert one["tuned"] != described(other, ARCH, CUT, UNTUNED)["tuned"]


def test_the_default_place_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuning.VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert tuning.table_path() == tmp_path / "flashmoe" / "tuning.json"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert tuning.table_path() == Path.home() / ".config" / "flashmoe" / "tuning.json"


def test_candidates_are_what_the_kernel_is_compiled_for() -> None:
    step, first = extension().TILE_ROWS_STEP[TINY.dtype], untuned(TINY, 64)
    rows, waves = candidates(TuneOptions(first, step, 1))
    assert rows
    assert all(tuning.takes(cut, first, step) for cut in rows)
    assert first not in rows
    assert waves
    assert first.waves not in waves


def test_only_what_is_surely_ahead_is_chosen() -> None:
    first = Score(UNTUNED, 1.0, 1.0, (1.0,))
    sure, lucky = Score(CUT, 0.97, 0.99, (0.97,)), Score(Tiling(128, 8), 0.96, 1.01, (0.96,))
    assert choose([first, sure]) is sure
    assert choose([first, lucky]) is first
    times, ours = [[1.0, 1.1, 0.9], [2.0, 2.0, 2.0]], [[0.5, 0.55, 0.45], [1.0, 1.0, 1.0]]
    found = score(CUT, ours, times)
    assert found.ratio == pytest.approx(0.5)
    assert found.high >= found.ratio
    assert found.ms == (0.5, 1.0)


class Uneven(TorchEngine):
    """Takes time by its cut, on a clock of its own: 160 rows and 2 waves are the fastest."""

    now_s = 0.0

    def enqueue(self) -> None:
        cut = self.options.tiling
        assert cut is not None
        Uneven.now_s += 0.002 + 0.002 * (cut.tile_rows != 160) + 0.002 * (cut.waves != 2)
        super().enqueue()


def test_the_fastest_cut_is_found_in_two_steps() -> None:
    from dataclasses import replace

    shapes = [Shape("tiny", TINY, t) for t in (8, 16)]
    stopwatch = HostStopwatch(lambda: Uneven.now_s)
    fake = replace(machine(), build=Uneven, stopwatch=stopwatch)
    found = tune_layer(TINY, shapes, fake, TuneOptions(UNTUNED, 16, 5), quiet)
    assert found["chosen"] == {"tile_rows": 160, "waves": 2}
    assert found["tuned"]
    assert 0.2 < found["ratio"] < 0.8
    assert found["tokens"] == [8, 16]
    assert len(found["scores"]) == 5 + 4  # 176 to 96 rows; untuned, 160 rows, two more of waves


def test_a_wrong_result_is_not_chosen_but_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchEngine, "spoil", "wrong")
    with pytest.raises(FlashmoeError, match="tiny 8: wrong result with Tiling"):
        tune_layer(TINY, [Shape("tiny", TINY, 8)], machine(), TuneOptions(UNTUNED, 16, 1), quiet)


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of fakes in the place of a GPU."""
    from flashmoe import build_info
    from flashmoe.bench import machine as module

    monkeypatch.setattr(module, "require_gpu", lambda device: None)
    monkeypatch.setattr(module, "gpu_machine", opened_gpu)
    monkeypatch.setattr(build_info, "require_runner", lambda: None)


def run(*args: str) -> Any:
    from typer.testing import CliRunner

    from flashmoe_cli.main import app

    return CliRunner().invoke(app, ["tune", *args], prog_name="flashmoe")


def test_the_command_writes_the_table(gpu: None, table: Path) -> None:
    done = run("tiny", "-T", "8,16", "-n", "2")
    assert done.exit_code == 0, done.output
    assert "tiny (H 64, I 96, bf16), T 8, 16" in done.stdout
    assert f"written to {table}" in done.stdout
    (written,) = json.loads(table.read_text())["entries"]
    assert written["measured"]["tokens"] == [8, 16]
    assert written["measured"]["commit"] == fakes.ENVIRONMENT["commit"]
    assert tiling_of(TINY, ARCH, UNTUNED, 16) == Tiling(written["tile_rows"], written["waves"])


def test_a_dry_run_writes_nothing(gpu: None, table: Path) -> None:
    said = json.loads(run("tiny", "-T", "8", "-n", "1", "--dry-run", "--json").stdout)
    assert said["table"] is None
    assert said["results"][0]["preset"] == "tiny"
    assert not table.exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "missing argument"),
        (("tinny",), "no preset 'tinny'"),
        (("tiny", "-T", "x"), "-t x is not a number"),
    ],
)
def test_misuse_ends_with_2(gpu: None, args: tuple[str, ...], says: str) -> None:
    done = run(*args)
    assert done.exit_code == 2
    assert says in done.stderr.lower()

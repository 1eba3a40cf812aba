"""From flags to a request: overrides, tokens per rank, faults, contradictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashmoe.errors import FlashmoeError
from flashmoe.presets import PRESETS
from flashmoe.world.base import Fault
from flashmoe.world.rendezvous import Place
from flashmoe_cli import request


def test_a_flag_overrides_the_preset_and_leaves_the_rest() -> None:
    name, config, tokens = request.shape("mixtral", {"hidden": 64, "top_k": None})
    mixtral = PRESETS["mixtral"]
    assert (name, config.hidden, config.intermediate) == ("mixtral", 64, 14336)
    assert tokens == mixtral.tokens


def test_four_sizes_are_a_shape_of_their_own() -> None:
    given = {"hidden": 64, "intermediate": 32, "experts": 4, "top_k": 2, "dtype": "fp16"}
    name, config, _ = request.shape(None, given)
    assert (name, config.experts, config.dtype) == ("custom", 4, "fp16")


def test_some_sizes_without_a_preset_name_those_that_lack() -> None:
    with pytest.raises(FlashmoeError) as caught:
        request.shape(None, {"hidden": 64, "experts": 4})
    assert "--intermediate --top-k" in caught.value.hint


def test_a_shape_that_cannot_be_is_refused() -> None:
    with pytest.raises(FlashmoeError) as caught:
        request.shape("tiny", {"top_k": 9})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "ranks", "tokens"),
    [(None, 2, (64, 64)), ("5", 3, (5, 5, 5)), ("0,7", 2, (0, 7)), ("0", 1, (0,))],
)
def test_tokens_per_rank(text: str | None, ranks: int, tokens: tuple[int, ...]) -> None:
    assert request.tokens_per_rank(text, ranks, 64) == tokens


@pytest.mark.parametrize("text", ["-1", "x", "1,2,3", "", "1.5", "²", "٣", "9" * 5000])
def test_tokens_that_are_none(text: str) -> None:
    with pytest.raises(FlashmoeError) as caught:
        request.tokens_per_rank(text, 2, 64)
    assert caught.value.exit_code == 2


def test_faults() -> None:
    specs = ["never-starts:1", "lost-signal:0:3", "wrong-count:0:1:2", "slow:1:0.25"]
    assert request.faults(specs, ranks=2) == (
        Fault("never-starts", 1),
        Fault("lost-signal", 0, expert=3),
        Fault("wrong-count", 0, peer=1, expert=2),
        Fault("slow", 1, seconds=0.25),
    )
    assert request.faults(None, ranks=1) == ()


@pytest.mark.parametrize(
    "spec",
    [
        *("lost-signal:0:8", "lost-signal:0:-1", "wrong-count:0:1:8"),
        *("slow:0:inf", "slow:0:nan", "slow:0:-1", "slow:0:3600", "slow:0:1e300"),
    ],
)
def test_faults_that_do_nothing_or_never_end_are_refused(spec: str) -> None:
    with pytest.raises(FlashmoeError) as caught:
        request.faults([spec], ranks=2, experts=8)
    assert caught.value.exit_code == 2
    assert "are" in caught.value.hint
    request.faults(["lost-signal:0:7", "slow:0:3599"], ranks=2, experts=8)


def test_a_fault_at_the_kernel_may_not_come_too_late() -> None:
    with pytest.raises(FlashmoeError, match="no time to wait"):
        request.faults(["killed:0:kernel:inf"], 2, True)


@pytest.mark.parametrize("spec", ["gone:1", "slow:1", "never-starts:2", "lost-signal:0:x", "slow"])
def test_bad_faults_say_how_to_write_them(spec: str) -> None:
    with pytest.raises(FlashmoeError) as caught:
        request.faults([spec], ranks=2)
    assert caught.value.exit_code == 2
    assert caught.value.hint


@pytest.mark.parametrize(
    ("folder", "layer", "preset", "overrides"),
    [
        (None, 3, None, {}),
        (Path("x"), None, None, {}),
        (Path("x"), 0, "tiny", {}),
        (Path("x"), 0, None, {"hidden": 64}),
    ],
)
def test_a_checkpoint_says_its_own_shape(
    folder: Path | None, layer: int | None, preset: str | None, overrides: dict[str, int]
) -> None:
    with pytest.raises(FlashmoeError) as caught:
        request.checkpoint_args(folder, layer, preset, overrides)
    assert caught.value.exit_code == 2


def test_a_checkpoint_may_be_rounded_to_another_dtype() -> None:
    request.checkpoint_args(Path("x"), 0, None, {"dtype": "fp16", "hidden": None})


def test_ranks_that_are_processes() -> None:
    assert request.processes({})[0] == 1
    assert request.processes({"ranks": 3})[1]["processes"] is False
    ranks, fields = request.processes({"ranks": 3, "processes": True, "no_pointers": True})
    assert (ranks, fields["processes"], fields["no_pointers"]) == (3, True, True)
    ranks, fields = request.processes({"gpus": 2, "ranks_per_gpu": 4})
    assert (ranks, fields["processes"], fields["gpus"]) == (8, True, 2)
    for wrong in ({"gpus": 2, "ranks": 3}, {"ranks_per_gpu": 2}):
        with pytest.raises(FlashmoeError) as caught:
            request.processes(wrong)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("asked", [{"gpus": 1}, {"processes": True, "ranks": 2}, {}])
def test_processes_take_no_device(asked: dict[str, Any]) -> None:
    place = None if asked else Place(0, 2, 0, 2, 1, "torchrun", "127.0.0.1", 1)
    for device in (0, 3):
        with pytest.raises(FlashmoeError, match=f"--device {device} names one GPU") as caught:
            request.processes({"device": device, **asked}, place)
        assert caught.value.exit_code == 2
        assert f"CUDA_VISIBLE_DEVICES={device}" in caught.value.hint
    assert request.processes({"device": 3})[1]["processes"] is False


def test_faults_of_a_process() -> None:
    specs = ["killed:1:start", "raises:0:kernel:0.5", "killed:0:kernel"]
    assert request.faults(specs, 2, True) == (
        Fault("killed", 1, point="start"),
        Fault("raises", 0, point="kernel", seconds=0.5),
        Fault("killed", 0, point="kernel"),
    )
    with pytest.raises(FlashmoeError, match="ranks are no processes here"):
        request.faults(specs, 2)
    for wrong in ("killed:1", "killed:1:later", "killed:1:start:3", "killed:x:start"):
        with pytest.raises(FlashmoeError) as caught:
            request.faults([wrong], 2, True)
        assert caught.value.exit_code == 2


def test_a_dry_run_leaves_to_each_launcher_what_is_its_own(
    cli: Any, runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("trace", "tiny", "--world", "host", "--processes", "--ranks", "6", "--dry-run")
    monkeypatch.setattr("sys.argv", ["flashmoe", *args])
    done = cli(*args)
    assert done.exit_code == 0, done.output
    lines = [line.strip() for line in done.stdout.splitlines()]
    (srun,) = (line for line in lines if line.startswith("srun"))
    assert srun.startswith("srun --nodes=2 --ntasks=6 --ntasks-per-node=3 flashmoe ")
    (torchrun,) = (line for line in lines if line.startswith("torchrun"))
    assert "--nproc-per-node=3" in torchrun and "-m flashmoe_cli" in torchrun
    assert "--ranks" not in srun and "--processes" not in torchrun
    assert not list(runs.iterdir())


def test_a_dry_run_is_json_where_that_is_asked_for(
    cli: Any, runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("run", "tiny", "--world", "host", "--ranks", "4", "--dry-run", "--json")
    monkeypatch.setattr("sys.argv", ["flashmoe", *args])
    said = json.loads(cli(*args).stdout)
    assert (said["schema"], said["verb"]) == (1, "run")
    assert [c["launcher"] for c in said["commands"]] == ["flashmoe", "srun", "torchrun"]
    assert said["commands"][0]["command"] == "flashmoe run tiny --world host --ranks 4"
    assert not any("--json" in c["command"] for c in said["commands"])

"""Presets, and what a configuration may be."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from flashmoe.config import MoEConfig, Routing
from flashmoe.errors import FlashmoeError
from flashmoe.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name: str) -> None:
    found = preset(name)
    found.config.validate()
    assert found.tokens > 0
    assert MoEConfig.from_dict(found.config.to_dict()) == found.config


@pytest.mark.parametrize(
    ("name", "dims"),
    [
        ("mixtral", (4096, 14336, 8, 2)),
        ("qwen3-30b", (2048, 768, 128, 8)),
        ("olmoe", (2048, 1024, 64, 8)),
        ("deepseek-v3", (7168, 2048, 256, 8)),
        ("deepseek-v3-ep8", (7168, 2048, 32, 8)),
        ("paper", (2048, 2048, 32, 2)),
    ],
)
def test_published_dimensions(name: str, dims: tuple[int, int, int, int]) -> None:
    config = preset(name).config
    assert (config.hidden, config.intermediate, config.experts, config.top_k) == dims


def test_one_of_eight_ranks_holds_one_group_of_deepseek_v3() -> None:
    whole, share = preset("deepseek-v3").config, preset("deepseek-v3-ep8").config
    assert whole.experts // 8 == share.experts == whole.experts // whole.routing.groups
    assert (share.hidden, share.intermediate) == (whole.hidden, whole.intermediate)
    assert (share.routing.kind, share.routing.groups) == ("softmax", 1)


def test_rows_of_the_up_matrix() -> None:
    assert preset("mixtral").config.up_rows == 2 * 14336
    assert preset("paper").config.up_rows == 2048
    assert preset("paper").config.row_bytes == 4096


@pytest.mark.parametrize(
    ("typed", "meant"), [("mixtrl", "mixtral"), ("deepsek-v3", "deepseek-v3"), ("OLMoE", "olmoe")]
)
def test_near_names_are_suggested(typed: str, meant: str) -> None:
    with pytest.raises(FlashmoeError) as caught:
        preset(typed)
    assert f"did you mean '{meant}'" in caught.value.hint
    assert caught.value.exit_code == 2


def test_far_names_list_all() -> None:
    with pytest.raises(FlashmoeError) as caught:
        preset("zzz")
    assert "did you mean" not in caught.value.hint
    assert all(name in caught.value.hint for name in PRESETS)


TINY = PRESETS["tiny"].config


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (replace(TINY, hidden=60), "hidden size 60"),
        (replace(TINY, hidden=0), "hidden size 0"),
        (replace(TINY, intermediate=97), "intermediate size 97"),
        (replace(TINY, experts=0), "0 experts"),
        (replace(TINY, experts=0xFFFF), "65535 experts"),
        (replace(TINY, top_k=9), "top-k 9"),
        (replace(TINY, top_k=0), "top-k 0"),
        (replace(TINY, activation="tanh"), "activation 'tanh'"),  # type: ignore[arg-type]
        (replace(TINY, dtype="fp8"), "dtype 'fp8'"),  # type: ignore[arg-type]
        (replace(TINY, routing=Routing("hash")), "routing 'hash'"),  # type: ignore[arg-type]
        (replace(TINY, routing=Routing(scale=float("nan"))), "scale"),
        (replace(TINY, routing=Routing(groups=2)), "groups"),
        (replace(TINY, routing=Routing("sigmoid", groups=3)), "3 groups"),
        (replace(TINY, routing=Routing("sigmoid", groups=8)), "two best"),
        (replace(TINY, routing=Routing("sigmoid", groups=4, top_groups=5)), "5 of 4"),
        (replace(TINY, top_k=3, routing=Routing("sigmoid", groups=4)), "hold only 2"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(config: MoEConfig, says: str) -> None:
    with pytest.raises(FlashmoeError, match=says) as caught:
        config.validate()
    assert caught.value.hint
    assert caught.value.exit_code == 2


def test_import_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['numpy'] = None\n"
        "import flashmoe.config, flashmoe.presets; flashmoe.presets.preset('tiny')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

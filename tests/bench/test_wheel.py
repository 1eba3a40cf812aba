"""Reading a wheel that cannot be imported: configurations, versions, modules with stand-ins."""

from __future__ import annotations

import json
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

from flashmoe.bench.peers import wheel
from flashmoe.bench.peers.base import Case, Unavailable
from flashmoe.config import MoEConfig
from flashmoe.weights import random_weights

FOLDER = "sglang/srt/layers/moe/moe_runner/triton_utils/configs"
H200, H100 = "NVIDIA_H200", "NVIDIA_H100_80GB_HBM3"

KERNELS = """
import json
from sglang.srt.utils import is_cuda, is_hip, get_thing
from sglang.srt.environ import envs
try:
    import sgl_kernel
except ImportError:
    raise RuntimeError("not stood in for")
if is_cuda():
    from vllm.ops import fast
    from sglang.kernels.jit.utils import is_arch_support_pdl
cuda, hip, flag = is_cuda(), is_hip(), bool(envs.SOME_FLAG.get())
def needs_more():
    return get_thing()
def lazily():
    from sglang.srt.never import here
def invoke():
    return is_arch_support_pdl()
"""


def config_name(triton: str | None, e: int, n: int, device: str, more: str = "") -> str:
    folder = f"{FOLDER}/triton_{triton}" if triton else FOLDER
    return f"{folder}/E={e},N={n},device_name={device}{more}.json"


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A small wheel of the published one's layout, with text of our own."""
    path = tmp_path / "sglang-9.9.9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("sglang/kernels/moe/fused_moe_triton_kernels.py", KERNELS)
        made.writestr("sglang/other/fused_moe_triton_kernels.py", "nothing = 0")
        made.writestr("sglang-9.9.9.dist-info/METADATA", "Name: sglang\nVersion: 9.9.9\n")
        small, large = {"BLOCK_SIZE_M": 16}, {"BLOCK_SIZE_M": 128, "USE_TMA": True}
        made.writestr(config_name("3_1_0", 8, 96, H200), json.dumps({"16": small, "4096": large}))
        made.writestr(config_name("3_2_0", 64, 32, H200), json.dumps({"1": small}))
        made.writestr(config_name("3_2_0", 64, 32, H200, "_down"), json.dumps({"1": large}))
    return path


def test_a_wheel_is_read_where_it_lies(fake: Path) -> None:
    source = wheel.locate(fake)
    assert source.version() == "9.9.9"
    name = source.holding("fused_moe_triton_kernels.py", "def invoke")
    assert name == "sglang/kernels/moe/fused_moe_triton_kernels.py"
    with pytest.raises(Unavailable, match=r"no fused_moe\.py"):
        source.holding("fused_moe.py", "x")


def test_a_folder_of_the_same_layout_serves_as_well(fake: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unpacked"
    with zipfile.ZipFile(fake) as packed:
        packed.extractall(folder)
    source = wheel.Source(folder)
    assert sorted(source.names()) == sorted(wheel.Source(fake).names())
    assert source.version() == "9.9.9"


def test_where_a_wheel_is_looked_for(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        wheel.importlib.metadata,
        "distribution",
        lambda name: (_ for _ in ()).throw(wheel.importlib.metadata.PackageNotFoundError(name)),
    )
    monkeypatch.delenv(wheel.VARIABLE, raising=False)
    with pytest.raises(Unavailable, match="--sglang-wheel"):
        wheel.locate(None)
    monkeypatch.setenv(wheel.VARIABLE, str(fake))
    assert wheel.locate(None).place == fake
    with pytest.raises(Unavailable, match="no file"):
        wheel.locate(tmp_path / "absent.whl")
    (tmp_path / "text.whl").write_text("no zip")
    with pytest.raises(Unavailable, match="is no wheel"):
        wheel.locate(tmp_path / "text.whl")


def test_modules_load_with_stand_ins_and_leave_none_behind(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = type(sys)("vllm")
    monkeypatch.setitem(sys.modules, "vllm", real)
    before = set(sys.modules)
    source = wheel.locate(fake)
    name = source.holding("fused_moe_triton_kernels.py", "def invoke")
    module = wheel.load(source, name, {"is_arch_support_pdl": lambda: "told"})
    assert (module.cuda, module.hip, module.flag) == (True, False, False)
    assert module.invoke() == "told"
    with pytest.raises(RuntimeError, match="get_thing of SGLang is not part"):
        module.needs_more()
    assert sys.modules["vllm"] is real
    left = set(sys.modules) - before
    assert not any(name.split(".")[0] in ("sglang", "sgl_kernel", "vllm") for name in left)
    assert not Path(module.__file__ or "").exists()


def test_triton_needs_the_source_of_a_module_no_longer(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    path = tmp_path / "kernels.zip"
    text = "import triton\n@triton.jit\ndef kernel(x):\n    other(x)\n"
    text += "@triton.jit\ndef other(x):\n    pass\n"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("sglang/kernels.py", text)
    module = wheel.load(wheel.Source(path), "sglang/kernels.py")
    assert not Path(module.__file__ or "").exists()
    assert "other(x)" in module.kernel.src
    assert module.kernel.cache_key  # goes through what it calls


def test_a_module_that_does_not_run_is_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "broken.zip"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("sglang/a.py", "import nowhere_to_be_found")
    with pytest.raises(Unavailable, match="ModuleNotFoundError"):
        wheel.load(wheel.Source(path), "sglang/a.py")


NAMES = [
    config_name("3_1_0", 8, 96, H200),
    config_name("3_4_0", 8, 96, H200),
    config_name("3_10_0", 8, 96, H200),
    config_name("3_4_0", 8, 96, H100),
    config_name("3_4_0", 8, 960, H200),
    config_name("3_4_0", 8, 96, H200, ",dtype=fp8_w8a8"),
    config_name("3_6_0", 16, 96, H200, "_down"),
    config_name(None, 4, 32, H200),
]


@pytest.mark.parametrize(
    ("experts", "intermediate", "devices", "triton", "expected"),
    [
        (8, 96, (H200,), "3.4.0", NAMES[1]),  # of the running version
        (8, 96, (H200,), "3.6.0", NAMES[2]),  # else the newest, by number and not by letter
        (8, 96, (H100, H200), "3.6.0", NAMES[3]),  # this GPU's before the H200's
        (8, 96, ("NVIDIA_L40", H200), "3.1.0", NAMES[0]),
        (16, 96, (H200,), "3.6.0", None),  # one for the second product alone is no answer
        (64, 96, (H200,), "3.6.0", None),
        (4, 32, (H200,), "3.6.0", NAMES[7]),
    ],
)
def test_which_configuration_is_chosen(
    experts: int, intermediate: int, devices: tuple[str, ...], triton: str, expected: str | None
) -> None:
    assert wheel.choose_config(NAMES, experts, intermediate, devices, triton) == expected


def test_the_second_product_may_have_a_file_of_its_own() -> None:
    assert wheel.choose_config(NAMES, 16, 96, (H200,), "3.6.0", down=True) == NAMES[6]
    assert wheel.choose_config(NAMES, 8, 96, (H200,), "3.6.0", down=True) is None


def case(experts: int, intermediate: int, tokens: int) -> Case:
    config = MoEConfig(32, intermediate, experts, 2)
    x = torch.zeros(tokens, config.hidden, dtype=torch.bfloat16)
    return Case(config, random_weights(config, 0), x, lambda x: (x, x))


def test_what_is_shipped_for_both_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.6.0"))
    from flashmoe.bench.peers.triton_moe import shipped_config

    default = "def get_default_config(*args):\n    return {'BLOCK_SIZE_M': 64, 'args': args}\n"
    one = {"BLOCK_SIZE_M": 16, "num_warps": 4}
    other = {"BLOCK_SIZE_M": 128, "num_warps": 8, "USE_TMA": True}
    path = tmp_path / "configs.zip"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("sglang/fused_moe_triton_config.py", default)
        made.writestr(config_name("3_6_0", 8, 96, H200), json.dumps({"16": one, "64": other}))
        made.writestr(config_name("3_6_0", 64, 32, H200), json.dumps({"16": one}))
        made.writestr(config_name("3_6_0", 64, 32, H200, "_down"), json.dumps({"16": other}))
    source = wheel.Source(path)
    up, down, origin = shipped_config(case(8, 96, 20), source)
    assert up == down == one
    assert origin == f"triton_3_6_0/E=8,N=96,device_name={H200}.json"
    up, down, origin = shipped_config(case(64, 32, 20), source)
    assert up == one
    assert down == {"BLOCK_SIZE_M": 16, "num_warps": 8}  # rows are sorted once for both
    assert origin.endswith("_down.json")
    up, down, origin = shipped_config(case(4, 32, 20), source)
    assert up == down == {"BLOCK_SIZE_M": 64, "args": (20, 4, 32, 32, 2, None, False)}
    assert "default" in origin


def test_the_best_pair_is_of_one_block_height() -> None:
    from flashmoe.bench.peers.triton_moe import best_pair

    a, b, c = ({"BLOCK_SIZE_M": m, "name": n} for m, n in ((16, "a"), (64, "b"), (64, "c")))
    assert best_pair([a, b, c], [1.0, 9.0, 3.0], [9.0, 1.0, 4.0]) == (c, b)
    assert best_pair([a, b, c], [1.0, 9.0, 3.0], [2.0, 1.0, 4.0]) == (a, a)


def test_the_entry_of_the_nearest_number_of_tokens(fake: Path) -> None:
    source = wheel.locate(fake)
    by_tokens = json.loads(source.read(config_name("3_1_0", 8, 96, H200)))
    assert wheel.nearest(by_tokens, 100) == {"BLOCK_SIZE_M": 16}
    assert wheel.nearest(by_tokens, 3000) == {"BLOCK_SIZE_M": 128}  # TMA left out


def test_published_configurations_most_frequent_first(fake: Path) -> None:
    found = wheel.published(wheel.locate(fake), H200, 4096)
    assert found == [{"BLOCK_SIZE_M": 128}, {"BLOCK_SIZE_M": 16}]
    assert wheel.published(wheel.locate(fake), H100, 4096) == []

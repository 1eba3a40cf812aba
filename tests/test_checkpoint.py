"""Layers out of checkpoints that transformers itself wrote, held to transformers' own blocks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashmoe.checkpoint import layer_config, load_layer
from flashmoe.config import Routing
from flashmoe.errors import FlashmoeError
from flashmoe.reference import mlp, moe, route

transformers = pytest.importorskip("transformers")

H, LAYER = 64, 1
COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": H,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
    "pad_token_id": None,
    "initializer_range": 0.1,
}


def _mixtral() -> Any:
    config = transformers.MixtralConfig(
        **COMMON, intermediate_size=96, num_local_experts=8, num_experts_per_tok=2
    )
    return transformers.MixtralForCausalLM(config)


def _qwen3() -> Any:
    config = transformers.Qwen3MoeConfig(
        **COMMON,
        intermediate_size=128,
        moe_intermediate_size=48,
        num_experts=12,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        head_dim=16,
        mlp_only_layers=[0],
    )
    return transformers.Qwen3MoeForCausalLM(config)


def _olmoe() -> Any:
    config = transformers.OlmoeConfig(
        **COMMON, intermediate_size=40, num_experts=8, num_experts_per_tok=3
    )
    return transformers.OlmoeForCausalLM(config)


def _deepseek() -> Any:
    config = transformers.DeepseekV3Config(
        **COMMON,
        intermediate_size=96,
        moe_intermediate_size=48,
        n_routed_experts=16,
        n_shared_experts=2,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    )
    model = transformers.DeepseekV3ForCausalLM(config)
    for layer in model.model.layers[1:]:  # a fresh model's correction is all zero
        layer.mlp.gate.e_score_correction_bias.normal_(std=0.1)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": _mixtral,
    "qwen3": _qwen3,
    "olmoe": _olmoe,
    "deepseek": _deepseek,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder a model, in bf16; DeepSeek's in several shards, the others in one file."""
    folders = {}
    for name, build in MODELS.items():
        torch.manual_seed(7)
        folders[name] = tmp_path_factory.mktemp(name)
        shards = "60KB" if name == "deepseek" else "1GB"
        build().bfloat16().save_pretrained(folders[name], max_shard_size=shards)
    return folders


@pytest.fixture
def mixtral(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the Mixtral checkpoint to damage."""
    return Path(shutil.copytree(checkpoints["mixtral"], tmp_path / "mixtral"))


def _edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_same_result_as_the_models_own_block(name: str, checkpoints: dict[str, Path]) -> None:
    # Both in float32 on the values that the file holds: only the order of sums may differ.  (In
    # bf16, transformers rounds at other places than a fused kernel, logits among them.)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoints[name], dtype=torch.float32
    ).eval()
    block = model.model.layers[LAYER].mlp
    loaded = load_layer(checkpoints[name], LAYER)
    x = torch.randn(50, H, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        expected = block(x.float()[None])[0]
        _, expected_weights, expected_ids = block.gate(x.float())
    routed = route(x, loaded.weights, loaded.config)
    y = moe(x, loaded.weights, loaded.config, routed.ids, routed.weights)
    if loaded.shared is not None:
        y = y + mlp(x, loaded.shared.gate, loaded.shared.up, loaded.shared.down)
    # DeepSeek's top-k comes unsorted: compare expert by expert.
    order, expected_order = routed.ids.argsort(1), expected_ids.argsort(1)
    assert torch.equal(routed.ids.gather(1, order).long(), expected_ids.gather(1, expected_order))
    torch.testing.assert_close(
        routed.weights.gather(1, order), expected_weights.gather(1, expected_order)
    )
    assert expected.std() > 0.05, "the comparison would hold for a layer of zeros"
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_what_the_configuration_says(checkpoints: dict[str, Path]) -> None:
    def dims(name: str) -> tuple[int, ...]:
        c = layer_config(checkpoints[name], LAYER)
        assert (c.activation, c.dtype) == ("swiglu", "bf16")
        return (c.hidden, c.intermediate, c.experts, c.top_k)

    assert dims("mixtral") == (64, 96, 8, 2)
    assert dims("qwen3") == (64, 48, 12, 4)
    assert dims("olmoe") == (64, 40, 8, 3)
    assert dims("deepseek") == (64, 48, 16, 4)
    assert layer_config(checkpoints["mixtral"], 0).routing == Routing(renormalize=True)
    assert layer_config(checkpoints["qwen3"], 1).routing == Routing(renormalize=True)
    assert layer_config(checkpoints["olmoe"], 0).routing == Routing(renormalize=False)
    expected = Routing("sigmoid", renormalize=True, scale=2.5, groups=4, top_groups=2)
    assert layer_config(checkpoints["deepseek"], 1).routing == expected


def test_layers_differ(checkpoints: dict[str, Path]) -> None:
    first, second = (load_layer(checkpoints["olmoe"], n).weights.up for n in (0, 1))
    assert not torch.equal(first, second)


def test_fused_names_of_transformers_modules(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    separate = load_layer(checkpoints["qwen3"], LAYER)
    prefix = f"model.layers.{LAYER}.mlp."
    shutil.copy(checkpoints["qwen3"] / "config.json", tmp_path)
    save_file(
        {
            f"{prefix}gate.weight": separate.weights.gate,
            f"{prefix}experts.gate_up_proj": separate.weights.up,
            f"{prefix}experts.down_proj": separate.weights.down,
        },
        tmp_path / "model.safetensors",
    )
    fused = load_layer(tmp_path, LAYER)
    assert torch.equal(fused.weights.up, separate.weights.up)
    assert torch.equal(fused.weights.down, separate.weights.down)


def test_a_bare_body_has_no_model_prefix(mixtral: Path) -> None:
    whole = load_layer(mixtral, LAYER)

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    _edit_tensors(mixtral, strip)
    assert torch.equal(load_layer(mixtral, LAYER).weights.down, whole.weights.down)


def test_only_the_layers_shards_are_needed(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["deepseek"], tmp_path / "deepseek"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    wanted = {file for name, file in index.items() if f"layers.{LAYER}.mlp" in name}
    others = set(index.values()) - wanted
    assert len(wanted) > 1 and others, "the shards must tell the layers apart"
    for file in others:
        (folder / file).unlink()
    load_layer(folder, LAYER)
    (folder / min(wanted)).unlink()
    with pytest.raises(FlashmoeError, match="is missing"):
        load_layer(folder, LAYER)


def test_rounding_to_another_dtype_is_said(mixtral: Path) -> None:
    loaded = load_layer(mixtral, LAYER, dtype="fp16")
    assert loaded.weights.up.dtype == torch.float16
    assert loaded.config.dtype == "fp16"
    assert any("rounded to fp16" in remark for remark in loaded.remarks)
    assert load_layer(mixtral, LAYER).remarks == []


def test_float32_needs_a_word(mixtral: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.float() for name, tensor in tensors.items()})

    before = load_layer(mixtral, LAYER)
    _edit_tensors(mixtral, widen)
    with pytest.raises(FlashmoeError, match="F32") as caught:
        load_layer(mixtral, LAYER)
    assert "--dtype bf16" in caught.value.hint
    assert torch.equal(load_layer(mixtral, LAYER, dtype="bf16").weights.up, before.weights.up)


GATE = f"model.layers.{LAYER}.block_sparse_moe.gate.weight"
W2 = f"model.layers.{LAYER}.block_sparse_moe.experts.5.w2.weight"
W1_OF_0 = f"model.layers.{LAYER}.block_sparse_moe.experts.0.w1.weight"


def _to_fp8(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda tensors: tensors.pop(GATE), GATE),
        (lambda tensors: tensors.pop(W2), W2),
        (lambda tensors: tensors.update({W2: torch.zeros(8, 8).bfloat16()}), "shape"),
        (_to_fp8(W2), "F8_E4M3"),
        (_to_fp8(W1_OF_0), "F8_E4M3"),
    ],
)
def test_tensors_that_do_not_serve(
    edit: Callable[[dict[str, torch.Tensor]], None], says: str, mixtral: Path
) -> None:
    _edit_tensors(mixtral, edit)
    _refused(mixtral, LAYER, says)


def _refused(folder: Path, layer: int, says: str) -> FlashmoeError:
    with pytest.raises(FlashmoeError) as caught:
        load_layer(folder, layer)
    assert says in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize("layer", [-1, 3])
def test_layer_out_of_range(layer: int, mixtral: Path) -> None:
    assert "0 to 2" in _refused(mixtral, layer, "does not exist").hint


@pytest.mark.parametrize("name", ["qwen3", "deepseek"])
def test_dense_layer(name: str, checkpoints: dict[str, Path]) -> None:
    assert "1-2" in _refused(checkpoints[name], 0, "layer 0 is dense").hint


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"model_type": None}, "model type"),
        ({"hidden_act": "quick_gelu"}, "'quick_gelu'"),
        ({"hidden_size": None}, "'hidden_size'"),
        ({"intermediate_size": "wide"}, "'intermediate_size'"),
        ({"intermediate_size": 50}, "50"),
        ({"num_local_experts": 9}, "[9, 64]"),
        ({"num_experts_per_tok": 20}, "top-k 20"),
    ],
)
def test_configurations_that_do_not_serve(
    changes: dict[str, Any], says: str, mixtral: Path
) -> None:
    _edit_config(mixtral, **changes)
    _refused(mixtral, LAYER, says)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("mixtral", {"model_type": ["mixtral"]}, "'model_type'"),
        ("mixtral", {"hidden_act": ["silu"]}, "'hidden_act'"),
        ("qwen3", {"decoder_sparse_step": 0}, "'decoder_sparse_step'"),
        ("qwen3", {"num_local_experts": None, "num_experts": "12"}, "'num_experts' is \"12\""),
        ("qwen3", {"decoder_sparse_step": "1"}, "'decoder_sparse_step'"),
        ("qwen3", {"mlp_only_layers": 0}, "'mlp_only_layers'"),
        ("qwen3", {"norm_topk_prob": "yes"}, "'norm_topk_prob'"),
        ("deepseek", {"first_k_dense_replace": "1"}, "'first_k_dense_replace'"),
        ("deepseek", {"moe_layer_freq": 0}, "'moe_layer_freq'"),
        ("deepseek", {"moe_layer_freq": [0, 1]}, "'moe_layer_freq'"),
        ("deepseek", {"moe_layer_freq": [0, 1, 2]}, "'moe_layer_freq'"),
        ("deepseek", {"routed_scaling_factor": "2"}, "'routed_scaling_factor'"),
        ("deepseek", {"routed_scaling_factor": float("nan")}, "'routed_scaling_factor'"),
        ("deepseek", {"n_group": [4]}, "'n_group'"),
        ("deepseek", {"n_shared_experts": "2"}, "'n_shared_experts'"),
    ],
)
def test_values_of_another_type_are_named(
    name: str, changes: dict[str, Any], says: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoints[name], tmp_path / name))
    _edit_config(folder, **changes)
    _refused(folder, LAYER, says)


def test_moe_layers_may_be_listed(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["deepseek"], tmp_path / "listed"))
    before = layer_config(folder, LAYER)
    _edit_config(folder, moe_layer_freq=[0, 1, 0])
    assert layer_config(folder, LAYER) == before
    assert _refused(folder, 2, "layer 2 is dense").hint == "layers with experts: 1"


def test_folders_of_another_kind(tmp_path: Path, mixtral: Path) -> None:
    _refused(tmp_path / "nowhere", 0, "is no folder")
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / "empty", 0, "no config.json")
    weights = mixtral / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    _refused(mixtral, LAYER, "can't be read")
    weights.unlink()
    _refused(mixtral, LAYER, "holds neither")
    (mixtral / "pytorch_model.bin").touch()
    _refused(mixtral, LAYER, "pytorch_model.bin")
    (mixtral / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a"}}')
    _refused(mixtral, LAYER, "outside its folder")
    (mixtral / "model.safetensors.index.json").write_text("[]")
    _refused(mixtral, LAYER, "is no index")
    (mixtral / "config.json").write_text("{")
    _refused(mixtral, LAYER, "config.json can't be read")

"""One MoE layer out of a Hugging Face checkpoint folder; only that layer's tensors are read."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flashmoe.config import Activation, DType, MoEConfig, MoEWeights, Routing
from flashmoe.errors import FlashmoeError
from flashmoe.tensor_files import ROUNDABLE, TensorFiles, unsupported, wrong
from flashmoe.weights import TORCH_DTYPES

# Names of a gated activation by what config.json calls the function applied to the gate.
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "geglu",
}

_DTYPES: dict[str, DType] = {"BF16": "bf16", "F16": "fp16"}


@dataclass(frozen=True)
class SharedExpert:
    """A dense SwiGLU that every token passes: ``gate`` and ``up`` [J, H], ``down`` [H, J]."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class LayerCheckpoint:
    """One layer as it came from disk.

    ``shared`` is DeepSeek's shared expert, or None; ``source`` says in a line what was read;
    ``remarks`` what was changed on the way.
    """

    config: MoEConfig
    weights: MoEWeights
    shared: SharedExpert | None
    source: str
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Family:
    """How one model type spells its layer: blocks below ``layers.N.``, and an expert's matrices."""

    title: str
    routing: Callable[[_Settings], Routing]
    width_key: str
    blocks: tuple[str, ...] = ("mlp",)
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    dense: Callable[[_Settings, int], bool] = lambda settings, layer: False


class _Settings:
    """config.json, with errors that name the file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as why:
            raise wrong(f"{file} can't be read: {why}", "download the checkpoint again") from why
        if not isinstance(values, dict):
            raise wrong(f"{file} holds no JSON object", "download the checkpoint again")
        self.values: dict[str, Any] = values

    def get(self, *keys: str, default: Any = None) -> Any:
        """The first of ``keys`` that is there and not null."""
        value = self.values.get(self._found(*keys))
        return default if value is None else value

    def _found(self, *keys: str) -> str:
        return next((k for k in keys if self.values.get(k) is not None), keys[0])

    def size(self, *keys: str, default: int | None = None) -> int:
        """A whole number from 0 up under the first of ``keys``; raises FlashmoeError."""
        value = self.get(*keys, default=default)
        if not _is_size(value):
            raise self.wrong(self._found(*keys), "a size")
        return int(value)

    def every(self, key: str) -> int:
        """Each how manyth layer ``key`` means, 1 where it is not there; raises FlashmoeError."""
        value = self.size(key, default=1)
        if value == 0:
            raise self.wrong(key, "a number of layers from 1 up")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number; raises FlashmoeError."""
        value = self.get(key, default=default)
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not abs(value) <= sys.float_info.max:
            raise self.wrong(key, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A truth value; raises FlashmoeError."""
        value = self.get(key, default=default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """A name; raises FlashmoeError."""
        value = self.get(key, default=default)
        if not isinstance(value, str):
            raise self.wrong(key, "a name")
        return value

    def wrong(self, key: str, what: str) -> FlashmoeError:
        """That the value of ``key`` is not ``what`` it should be."""
        return wrong(
            f"{self.file}: '{key}' is {json.dumps(self.get(key))[:60]}, not {what}",
            "the folder may be of another model or incomplete; download it again",
        )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _deepseek_dense(settings: _Settings, layer: int) -> bool:
    if layer < settings.size("first_k_dense_replace", default=0):
        return True
    listed = settings.get("moe_layer_freq", default=1)
    if not isinstance(listed, list):
        return layer % settings.every("moe_layer_freq") > 0
    # Models that derive from DeepSeek's list each layer: 1 with experts, 0 dense.
    if len(listed) != settings.size("num_hidden_layers") or any(n not in (0, 1) for n in listed):
        raise settings.wrong("moe_layer_freq", "a list of 0 or 1 for each layer")
    return not listed[layer]


def _qwen_dense(settings: _Settings, layer: int) -> bool:
    dense = settings.get("mlp_only_layers", default=[])
    if not isinstance(dense, list) or not all(map(_is_size, dense)):
        raise settings.wrong("mlp_only_layers", "a list of layers")
    return layer in dense or (layer + 1) % settings.every("decoder_sparse_step") > 0


def _deepseek_routing(settings: _Settings) -> Routing:
    scoring = settings.get("scoring_func", default="sigmoid")
    if scoring != "sigmoid":
        raise wrong(
            f"{settings.file}: scoring_func '{scoring}' is not DeepSeek-V3's",
            "only sigmoid scores with a correction bias are known for this model type",
        )
    return Routing(
        "sigmoid",
        renormalize=settings.flag("norm_topk_prob", default=True),
        scale=settings.number("routed_scaling_factor", default=1.0),
        groups=settings.size("n_group", default=1) or 1,
        top_groups=settings.size("topk_group", default=1) or 1,
    )


def _softmax_routing(settings: _Settings) -> Routing:
    return Routing(renormalize=settings.flag("norm_topk_prob", default=False))


_FAMILIES: dict[str, _Family] = {
    "mixtral": _Family(
        "Mixtral",
        routing=lambda settings: Routing(),
        width_key="intermediate_size",
        blocks=("block_sparse_moe", "mlp"),
        matrices=("w1", "w3", "w2"),
    ),
    "qwen3_moe": _Family(
        "Qwen3-MoE",
        routing=_softmax_routing,
        width_key="moe_intermediate_size",
        dense=_qwen_dense,
    ),
    "olmoe": _Family("OLMoE", routing=_softmax_routing, width_key="intermediate_size"),
    "deepseek_v3": _Family(
        "DeepSeek-V3",
        routing=_deepseek_routing,
        width_key="moe_intermediate_size",
        dense=_deepseek_dense,
    ),
}


def load_layer(
    folder: str | os.PathLike[str],
    layer: int,
    dtype: str | None = None,
    device: str | torch.device = "cpu",
) -> LayerCheckpoint:
    """Layer ``layer`` (from 0) of the checkpoint in ``folder``.

    ``dtype`` None takes the experts' own, which must be bf16 or fp16; otherwise all is rounded to
    ``bf16`` or ``fp16``.  Mixtral, Qwen3-MoE, OLMoE and DeepSeek-V3, by the published names, one
    matrix an expert, or by those of transformers' modules (``experts.gate_up_proj``).

    Raises FlashmoeError (exit code 2) where the folder is of another kind or incomplete, the layer
    does not exist or is dense, or a dtype or shape does not fit.
    """
    with ExitStack() as files:
        return _Layer(Path(folder), layer, dtype, files).load(device)


def layer_config(folder: str | os.PathLike[str], layer: int, dtype: str | None = None) -> MoEConfig:
    """What ``load_layer`` would load, without reading a weight.  Raises as it does."""
    with ExitStack() as files:
        return _Layer(Path(folder), layer, dtype, files).config


class _Layer:
    """A layer found in its folder: names resolved and checked, nothing read yet."""

    def __init__(self, folder: Path, layer: int, dtype: str | None, files: ExitStack) -> None:
        if not (folder / "config.json").is_file():
            what = "holds no config.json" if folder.is_dir() else "is no folder"
            raise wrong(f"{folder} {what}", "--checkpoint takes a Hugging Face model folder")
        if dtype is not None and dtype not in TORCH_DTYPES:
            raise wrong(f"unknown dtype '{dtype}'", f"use one of: {', '.join(TORCH_DTYPES)}")
        self.folder, self.layer = folder, layer
        self.settings = _Settings(folder / "config.json")
        self.family = self._family()
        self._require_moe_layer()
        self.tensors = TensorFiles(folder, files)
        self.block = self._block()
        first = f"{self.block}.experts.0.{self.family.matrices[0]}.weight"
        self.fused = f"{self.block}.experts.gate_up_proj" in self.tensors
        self.expert_dtype = self._expert_dtype(
            f"{self.block}.experts.gate_up_proj" if self.fused else first, dtype
        )
        self.config = self._config()

    def _family(self) -> _Family:
        model_type = self.settings.text("model_type", default="")
        if model_type not in _FAMILIES:
            raise wrong(
                f"{self.settings.file}: model type '{model_type}' is not known",
                f"known are: {', '.join(_FAMILIES)}",
            )
        return _FAMILIES[model_type]

    def _require_moe_layer(self) -> None:
        count = self.settings.size("num_hidden_layers")
        if not 0 <= self.layer < count:
            raise wrong(
                f"layer {self.layer} does not exist: the model has {count} layers",
                f"use --layer 0 to {count - 1}",
            )
        if self.family.dense(self.settings, self.layer):
            moe = [n for n in range(count) if not self.family.dense(self.settings, n)]
            raise wrong(
                f"layer {self.layer} is dense: it has no experts",
                f"layers with experts: {_spans(moe)}" if moe else "no layer has experts",
            )

    def _block(self) -> str:
        """The name before the router's and the experts': by a whole model or its bare body."""
        tried = [
            f"{body}layers.{self.layer}.{block}"
            for body in ("model.", "")
            for block in self.family.blocks
        ]
        for name in tried:
            if f"{name}.gate.weight" in self.tensors:
                return name
        raise wrong(
            f"{self.folder} lacks the tensor {tried[0]}.gate.weight",
            "the download may be incomplete, or the weights of another model",
        )

    def _expert_dtype(self, name: str, asked: str | None) -> DType:
        found = self.tensors.dtype(name)
        if found not in ROUNDABLE:
            raise unsupported(name, found)
        if asked is not None:
            return "bf16" if asked == "bf16" else "fp16"
        if found not in _DTYPES:
            raise wrong(
                f"{name} is {found}, the kernel takes bf16 and fp16",
                "round the weights with --dtype bf16",
            )
        return _DTYPES[found]

    def _config(self) -> MoEConfig:
        settings = self.settings
        name = settings.text("hidden_act", default="silu")
        if name not in _ACTIVATIONS:
            raise wrong(
                f"{settings.file}: activation '{name}' is not known",
                f"known are: {', '.join(_ACTIVATIONS)}",
            )
        config = MoEConfig(
            hidden=settings.size("hidden_size"),
            intermediate=settings.size(self.family.width_key),
            experts=settings.size("num_local_experts", "num_experts", "n_routed_experts"),
            top_k=settings.size("num_experts_per_tok"),
            activation=_ACTIVATIONS[name],
            dtype=self.expert_dtype,
            routing=self.family.routing(settings),
        )
        config.validate()
        return config

    def load(self, device: str | torch.device) -> LayerCheckpoint:
        config, block, tensors = self.config, self.block, self.tensors
        dtype = TORCH_DTYPES[config.dtype]
        h, i, e = config.hidden, config.intermediate, config.experts

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        weights = MoEWeights(
            gate=empty(e, h), bias=None, up=empty(e, 2 * i, h), down=empty(e, h, i)
        )
        tensors.read_into(f"{block}.gate.weight", weights.gate)
        if config.routing.kind == "sigmoid":
            weights.bias = torch.empty(e, dtype=torch.float32, device=device)
            tensors.read_into(f"{block}.gate.e_score_correction_bias", weights.bias)
        if self.fused:
            tensors.read_into(f"{block}.experts.gate_up_proj", weights.up)
            tensors.read_into(f"{block}.experts.down_proj", weights.down)
        else:
            gate, up, down = self.family.matrices
            for expert in range(e):
                of = f"{block}.experts.{expert}"
                tensors.read_into(f"{of}.{gate}.weight", weights.up[expert, :i])
                tensors.read_into(f"{of}.{up}.weight", weights.up[expert, i:])
                tensors.read_into(f"{of}.{down}.weight", weights.down[expert])

        shared = None
        if self.settings.size("n_shared_experts", default=0):
            j = i * self.settings.size("n_shared_experts")
            shared = SharedExpert(gate=empty(j, h), up=empty(j, h), down=empty(h, j))
            for name in ("gate", "up", "down"):
                into = getattr(shared, name)
                tensors.read_into(f"{block}.shared_experts.{name}_proj.weight", into)
        return LayerCheckpoint(
            config,
            weights,
            shared,
            source=f"{self.family.title}, layer {self.layer} of {self.folder}",
            remarks=self._remarks(),
        )

    def _remarks(self) -> list[str]:
        own = next(k for k, v in _DTYPES.items() if v == self.config.dtype)
        name = (
            "experts.gate_up_proj" if self.fused else f"experts.0.{self.family.matrices[0]}.weight"
        )
        remarks = []
        for what, tensor in (("experts'", name), ("router's", "gate.weight")):
            found = self.tensors.dtype(f"{self.block}.{tensor}")
            if found != own:
                remarks.append(f"the {what} {found} weights were rounded to {self.config.dtype}")
        return remarks


def _spans(numbers: list[int]) -> str:
    """Ascending numbers as ranges: 3-7, 9."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)

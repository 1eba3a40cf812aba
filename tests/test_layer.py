"""The layer's operators and module without a GPU: the operators' CPU kernel is float32 torch here.

What torch asks of an operator (schema, fake kernel, functionalization, compilation) does not depend
on the device; what the kernel computes is the business of tests/gpu.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flashmoe
from flashmoe import layer as layers
from flashmoe import ops, reference
from flashmoe.checkpoint import SharedExpert
from flashmoe.config import MoEConfig, MoEWeights, Routing
from flashmoe.errors import FlashmoeError
from flashmoe.layer import MoE, moe
from flashmoe.weights import random_weights
from flashmoe.workspace import Workspace

CONFIG = MoEConfig(64, 96, 8, 2)
EXTERNAL = replace(CONFIG, routing=Routing("external"))
DEEPSEEK = MoEConfig(64, 48, 16, 4, routing=Routing("sigmoid", True, 2.5, 4, 2))
CONFIGS = {"softmax": CONFIG, "external": EXTERNAL, "deepseek": DEEPSEEK}
MAX_TOKENS = 32


def forward(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """y of the operators' arguments, by the reference."""
    ops._check(x, *arguments)
    gate, bias, up, down, ids, routing_weights, workspace, _, *scalars = arguments
    config = ops._config(*down.shape[1:], down.shape[0], up.dtype, *scalars)
    weights = MoEWeights(gate, bias, up, down)
    if ids is None:
        routed = reference.route(x, weights, config)
        ids, routing_weights = routed.ids, routed.weights
    workspace.fill_(0)
    return reference.moe(x, weights, config, ids, routing_weights).to(x.dtype)


def forward_out(x: torch.Tensor, *arguments: Any) -> None:
    ops._check_out(x, arguments[-1])
    arguments[-1].copy_(forward(x, *arguments[:-1]))


@pytest.fixture(scope="module", autouse=True)
def cpu_kernel() -> Iterator[None]:
    library = torch.library.Library("flashmoe", "IMPL")
    library.impl("moe", forward, "CPU")
    library.impl("moe_out", forward_out, "CPU")
    yield
    library._destroy()


class Room:
    """What a Workspace is to a layer, on the CPU: one tensor for all."""

    shared = torch.zeros(1, dtype=torch.int64)

    def __init__(self, config: MoEConfig, max_tokens: int, *_: Any, **__: Any) -> None:
        self.tensor = self.shared
        self.settings = ops.settings(config, max_tokens)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are made on the CPU."""
    monkeypatch.setattr(layers, "gpu", lambda device: torch.device("cpu"))
    monkeypatch.setattr(layers, "Workspace", Room)


def tokens(count: int, config: MoEConfig = CONFIG) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, config.hidden, generator=generator).bfloat16()


def external(config: MoEConfig, count: int) -> tuple[Any, Any]:
    if config.routing.kind != "external":
        return None, None
    scores = torch.rand(count, config.experts, generator=torch.Generator().manual_seed(count))
    weights, ids = scores.topk(config.top_k)
    return ids.to(torch.int32), weights


def op_arguments(config: MoEConfig, count: int) -> list[Any]:
    w = random_weights(config)
    room = Room(config, MAX_TOKENS)
    return [
        *(tokens(count, config), w.gate, w.bias, w.up, w.down),
        *(*external(config, count), room.tensor, *room.settings),
    ]


def made(config: MoEConfig = CONFIG, **keywords: Any) -> MoE:
    return MoE(config, random_weights(config), max_tokens=MAX_TOKENS, **keywords)


def test_the_package_offers_the_layer() -> None:
    assert (flashmoe.MoE, flashmoe.moe, flashmoe.Workspace) == (MoE, moe, Workspace)
    with pytest.raises(AttributeError, match="no attribute 'MOE'"):
        _ = flashmoe.MOE


def test_schema_says_what_changes() -> None:
    for op, changed in (
        (torch.ops.flashmoe.moe, {"workspace"}),
        (torch.ops.flashmoe.moe_out, {"workspace", "out"}),
    ):
        arguments = op.default._schema.arguments
        assert {a.name for a in arguments if a.alias_info and a.alias_info.is_write} == changed


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("count", [1, 5, 0])
def test_opcheck(config: MoEConfig, count: int) -> None:
    arguments = op_arguments(config, count)
    torch.library.opcheck(torch.ops.flashmoe.moe.default, tuple(arguments))
    arguments.append(torch.empty_like(arguments[0]))
    torch.library.opcheck(torch.ops.flashmoe.moe_out.default, tuple(arguments))


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_fake_kernel_needs_no_gpu(device: str) -> None:
    arguments = op_arguments(CONFIG, 5)
    with FakeTensorMode() as mode:
        fakes = [
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=device)
            if isinstance(a, torch.Tensor)
            else a
            for a in arguments
        ]
        y = torch.ops.flashmoe.moe(*fakes)
        fakes[0] = torch.empty_strided((5, 64), (1, 5), dtype=torch.bfloat16, device=device)
        assert torch.ops.flashmoe.moe(*fakes).is_contiguous()
    assert (y.shape, y.dtype, y.device.type) == ((5, 64), torch.bfloat16, device)
    assert y.fake_mode is mode


def test_operator_raises_where_grad_is_wanted() -> None:
    arguments = op_arguments(CONFIG, 3)
    arguments[0].requires_grad_()
    with pytest.raises(FlashmoeError, match="requires grad") as caught:
        torch.ops.flashmoe.moe(*arguments)
    assert "no_grad" in caught.value.hint
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.ops.flashmoe.moe(*arguments).shape == (3, 64)


def test_a_change_of_the_workspace_is_counted() -> None:
    arguments = op_arguments(CONFIG, 3)
    before = arguments[7]._version
    torch.ops.flashmoe.moe(*arguments)
    assert arguments[7]._version > before


@pytest.mark.usefixtures("on_cpu")
class TestModule:
    @pytest.mark.parametrize("leading", [(), (7,), (0,), (2, 3), (3, 0, 2), (2, 1, 4)])
    def test_leading_dimensions(self, leading: tuple[int, ...]) -> None:
        layer = made()
        count = torch.Size(leading).numel()
        x = tokens(count)
        y = layer(x.reshape(*leading, 64))
        assert y.shape == (*leading, 64)
        assert torch.equal(y.reshape(-1, 64), layer(x))

    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    def test_y_and_out_are_the_reference(self, config: MoEConfig) -> None:
        layer, x = made(config), tokens(6, config)
        ids, weights = external(config, 6)
        expected = forward(*op_arguments(config, 6)[:5], ids, weights, *op_arguments(config, 6)[7:])
        assert torch.equal(layer(x, ids, weights), expected)
        out = torch.full_like(x, float("nan"))
        assert layer(x, ids, weights, out=out) is out
        assert torch.equal(out, expected)

    def test_function_and_module_agree(self) -> None:
        x, room = tokens(6), Room(CONFIG, MAX_TOKENS)
        y = moe(x, random_weights(CONFIG), room)  # type: ignore[arg-type]
        assert torch.equal(y, made()(x))

    def test_int64_ids_keep_their_range(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[torch.Tensor] = []
        layer, x = made(EXTERNAL), tokens(3)
        ids = torch.tensor([[0, 1], [1 << 32, 1], [-(1 << 32), 2]])
        monkeypatch.setattr(torch.ops.flashmoe, "moe", lambda *a: seen.append(a[5]) or x)
        layer(x, ids, torch.ones(3, 2))
        assert seen[0].dtype == torch.int32
        assert seen[0].tolist() == [[0, 1], [0x7FFFFFFF, 1], [-1, 2]]

    # The GPU tests compile by inductor too.
    @pytest.mark.parametrize(
        "backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
    )
    def test_compiles_whole_and_for_any_number_of_tokens(self, backend: str) -> None:
        torch._dynamo.reset()
        first, second = made(), made(replace(CONFIG, intermediate=48))

        def model(x: torch.Tensor) -> torch.Tensor:
            return second(first(x * 0.5)) + x

        compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for count in (4, 9, 31):
                assert torch.equal(compiled(tokens(count)), model(tokens(count)))

    def test_compiling_keeps_every_call(self) -> None:
        graphs: list[torch.fx.GraphModule] = []

        def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append(graph)
            return graph

        layer = made()
        torch.compile(lambda x: (layer(x), layer(x))[1], backend=backend, fullgraph=True)(tokens(4))
        targets = [node.target for node in graphs[0].graph.nodes]
        assert targets.count(torch.ops.flashmoe.moe) == 2

    def test_state_dict_is_the_weights(self) -> None:
        layer, other = made(DEEPSEEK), made(DEEPSEEK)
        state = layer.state_dict()
        assert set(state) == {"gate", "bias", "up", "down"}
        assert "bias" not in made().state_dict()
        other.load_state_dict({name: t * 0.5 for name, t in state.items()})
        assert torch.equal(other.up, layer.up * 0.5)
        assert not list(layer.parameters())

    def test_weights_that_fit_are_not_copied(self) -> None:
        weights = random_weights(CONFIG)
        layer = MoE(CONFIG, weights, max_tokens=4)
        assert layer.up.data_ptr() == weights.up.data_ptr()

    def test_shared_expert_is_added(self) -> None:
        shapes = ((32, 64), (32, 64), (64, 32))
        shared = SharedExpert(*(torch.randn(shape).mul_(0.1) for shape in shapes))
        layer, x = made(shared=shared), tokens(5)
        dense = reference.mlp(x, *(t.bfloat16() for t in (shared.gate, shared.up, shared.down)))
        assert dense.abs().max() > 0.2
        torch.testing.assert_close((layer(x) - made()(x)).float(), dense, rtol=0.05, atol=0.05)
        assert torch.equal(layer(x, out=torch.empty_like(x)), layer(x))
        assert set(layer.state_dict()) >= {"shared_gate", "shared_up", "shared_down"}

    def test_a_layer_off_the_gpu_says_so_and_copies_work(self) -> None:
        layer = made().cpu()
        with pytest.raises(FlashmoeError, match="the layer is on cpu"):
            layer(tokens(1))
        again = copy.deepcopy(layer)
        assert torch.equal(again.up, layer.up)
        assert again.up.data_ptr() != layer.up.data_ptr()
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert torch.equal(loaded.down, layer.down)
        assert (loaded.config, loaded.max_tokens) == (layer.config, layer.max_tokens)

    def test_conversions(self) -> None:
        layer = made(DEEPSEEK).half()
        assert layer.config.dtype == "fp16"
        assert layer.bias is not None and layer.bias.dtype == torch.float32
        assert layer.workspace.dtype == torch.int64
        with pytest.raises(FlashmoeError, match=r"cannot be torch\.float32"):
            layer.float()
        assert layer.up.dtype == torch.float16

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.zeros(3, 32, dtype=torch.bfloat16), "rows of 32 elements, and the layer is 64"),
            (torch.zeros(3, 64), r"x is torch.float32, and the layer is torch.bfloat16"),
            (torch.zeros(33, 64, dtype=torch.bfloat16), "33 tokens, .* max_tokens 32"),
            (torch.zeros((), dtype=torch.bfloat16), "without a row"),
            (torch.zeros(3, 64, dtype=torch.bfloat16, device="meta"), "x is on meta"),
        ],
    )
    def test_wrong_x(self, x: torch.Tensor, message: str) -> None:
        with pytest.raises(FlashmoeError, match=message) as caught:
            made()(x)
        assert caught.value.exit_code == 2
        assert caught.value.hint

    def test_wrong_routing(self) -> None:
        ids, weights = external(EXTERNAL, 3)
        with pytest.raises(FlashmoeError, match="external routing needs"):
            made(EXTERNAL)(tokens(3))
        with pytest.raises(FlashmoeError, match="softmax routing takes no"):
            made()(tokens(3), ids, weights)
        with pytest.raises(FlashmoeError, match=r"ids is \(3, 2\), and x \(4, 64\)"):
            made(EXTERNAL)(tokens(4), ids, weights)
        with pytest.raises(FlashmoeError, match=r"ids is \(\), and x \(64,\)"):
            made(EXTERNAL)(tokens(1)[0], ids[0, 0], weights[0])
        with pytest.raises(FlashmoeError, match=r"ids is torch.int32 \(3, 1\)"):
            made(EXTERNAL)(tokens(3), ids[:, :1], weights)
        with pytest.raises(FlashmoeError, match=r"ids is torch.float32"):
            made(EXTERNAL)(tokens(3), ids.float(), weights)

    @pytest.mark.parametrize(
        "out",
        [
            torch.zeros(4, 64, dtype=torch.bfloat16),
            torch.zeros(3, 64),
            torch.zeros(64, 3, dtype=torch.bfloat16).t(),
        ],
    )
    def test_wrong_out(self, out: torch.Tensor) -> None:
        with pytest.raises(FlashmoeError, match="out is"):
            made()(tokens(3), out=out)

    def test_wrong_weights(self) -> None:
        weights = random_weights(CONFIG)
        weights.down = weights.down[:, :32]
        with pytest.raises(FlashmoeError, match=r"down is \(8, 32, 96\).*\(8, 64, 96\)"):
            MoE(CONFIG, weights, max_tokens=4)

    def test_no_compiler_sees_an_input_that_requires_grad(self) -> None:
        torch._dynamo.reset()
        layer = made()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with pytest.raises(Exception, match="requires grad"):
            compiled(tokens(3).requires_grad_())


@pytest.mark.parametrize("count", [0, -1])
def test_no_room_for_a_token(count: int) -> None:
    with pytest.raises(FlashmoeError, match=f"max_tokens {count} leaves no room"):
        Workspace(CONFIG, count)


def test_a_layer_is_of_a_gpu() -> None:
    with pytest.raises(FlashmoeError, match="runs on a CUDA GPU, not on cpu") as caught:
        MoE(CONFIG, random_weights(CONFIG), max_tokens=4, device="cpu")
    assert caught.value.exit_code == 5


def test_without_a_gpu_the_error_says_why() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(FlashmoeError, match=r"driver|GPU") as caught:
        MoE(CONFIG, random_weights(CONFIG), max_tokens=4)
    assert caught.value.exit_code == 5
    assert "flashmoe doctor" in caught.value.hint

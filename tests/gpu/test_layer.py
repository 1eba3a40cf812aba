"""The layer as a model calls it: operators, graphs, streams, failures, memory."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flashmoe import MoE, Workspace, moe
from flashmoe.checkpoint import SharedExpert
from flashmoe.config import MoEConfig, MoEWeights, Routing
from flashmoe.errors import FlashmoeError
from flashmoe.numerics import check_output
from flashmoe.ops import settings
from flashmoe.presets import PRESETS
from flashmoe.tokens import random_tokens
from flashmoe.weights import random_weights
from flashmoe.world.base import Fault
from flashmoe.world.shared_heap import SharedHeap, heap_of

from .layers import SMALL, deal, engine_for, forward, inputs

EXTERNAL = replace(SMALL, routing=Routing("external"))
CONFIGS = {
    "swiglu": SMALL,
    "relu-fp16": replace(SMALL, activation="relu", dtype="fp16"),
    "deepseek": MoEConfig(256, 192, 64, 6, routing=Routing("sigmoid", True, 2.5, 8, 4)),
    "qwen3-30b": PRESETS["qwen3-30b"].config,
}
MAX_TOKENS = 300


def made(config: MoEConfig = SMALL, max_tokens: int = MAX_TOKENS, seed: int = 0) -> MoE:
    return MoE(config, random_weights(config, seed, "cuda"), max_tokens=max_tokens)


def tokens(count: int, config: MoEConfig = SMALL, seed: int = 1) -> torch.Tensor:
    return random_tokens([count], config, seed)[0].cuda()


def local(config: MoEConfig, x: torch.Tensor) -> torch.Tensor:
    """What the local world's one rank makes of x with ``made(config)``'s weights."""
    engine = engine_for(config, random_weights(config, 0, "cuda"), deal(x, 1))
    y = forward(engine).y
    engine.close()
    return y.cuda()


def chosen(config: MoEConfig, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """External ids and weights of ``count`` tokens."""
    generator = torch.Generator(device="cuda").manual_seed(count)
    scores = torch.rand(count, config.experts, generator=generator, device="cuda")
    weights, ids = scores.topk(config.top_k)
    return ids.to(torch.int32), weights


@pytest.fixture(autouse=True)
def heap() -> Iterator[SharedHeap]:
    """The GPU's heap, left as it was found."""
    heap = heap_of(torch.device("cuda", torch.cuda.current_device()))
    yield heap
    heap.faults, heap.deadline_s = (), 10.0
    heap.reset()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_y_is_the_local_worlds(config: MoEConfig) -> None:
    layer = made(config)
    for count in (0, 1, 7, 128, MAX_TOKENS):
        x = tokens(count, config)
        y = layer(x)
        assert y.shape == x.shape
        if count:
            assert torch.equal(y, local(config, x)), f"T {count}"
    layer.check()


def test_external_routing_is_the_reference() -> None:
    weights, x = inputs(EXTERNAL, 200)
    ids, routing = chosen(EXTERNAL, 200)
    layer = MoE(EXTERNAL, weights, max_tokens=MAX_TOKENS)
    y = layer(x, ids, routing)
    assert check_output(y, x, weights, EXTERNAL, ids, routing).ok
    assert torch.equal(layer(x, ids.long(), routing), y)
    leading = layer(x.view(2, 100, -1), ids.view(2, 100, -1), routing.view(2, 100, -1))
    assert torch.equal(leading.view_as(y), y)
    room = Workspace(EXTERNAL, MAX_TOKENS)
    assert torch.equal(moe(x, weights, room, ids, routing), y)


def test_out_and_any_layout_of_x() -> None:
    layer, x = made(), tokens(40)
    y = layer(x)
    out = torch.full_like(x, float("nan"))
    assert layer(x, out=out) is out
    assert torch.equal(out, y)
    assert torch.equal(layer(x.t().contiguous().t()), y)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view_as(x).copy_(x)
    assert shifted.data_ptr() % 16
    assert torch.equal(layer(shifted), y)
    with pytest.raises(FlashmoeError, match="out overlaps x"):
        layer(x, out=x)


def test_shared_expert_is_added() -> None:
    config, x = CONFIGS["deepseek"], tokens(50, CONFIGS["deepseek"])
    shapes = ((64, 256), (64, 256), (256, 64))
    shared = SharedExpert(*(torch.randn(s, device="cuda").mul_(0.05) for s in shapes))
    weights = random_weights(config, 0, "cuda")
    whole = MoE(config, weights, max_tokens=50, shared=shared)
    zero = SharedExpert(*(torch.zeros(s, device="cuda") for s in shapes))
    routed = MoE(config, weights, max_tokens=50, shared=zero)
    gate, up, down = (t.bfloat16().float() for t in (shared.gate, shared.up, shared.down))
    dense = (torch.nn.functional.silu(x.float() @ gate.T) * (x.float() @ up.T)) @ down.T
    assert dense.abs().max() > 0.2
    difference = whole(x).float() - routed(x).float()
    torch.testing.assert_close(difference, dense, rtol=0.05, atol=0.05)


# -- torch.library, torch.compile, CUDA graphs ----------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, EXTERNAL], ids=["softmax", "external"])
def test_opcheck(config: MoEConfig) -> None:
    w, room = random_weights(config, 0, "cuda"), Workspace(config, MAX_TOKENS)
    routed = chosen(config, 33) if config is EXTERNAL else (None, None)
    arguments = (
        *(tokens(33), w.gate, w.bias, w.up, w.down, *routed, room.tensor),
        *settings(config, MAX_TOKENS),
    )
    torch.library.opcheck(torch.ops.flashmoe.moe.default, arguments)
    out = torch.empty_like(arguments[0])
    torch.library.opcheck(torch.ops.flashmoe.moe_out.default, (*arguments, out))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_whole(mode: str) -> None:
    torch._dynamo.reset()
    first, second = made(), made(replace(SMALL, intermediate=96), seed=3)

    def model(x: torch.Tensor) -> torch.Tensor:
        return second(first(x * 0.5)) + x

    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.inference_mode():
        for seed in range(5):  # reduce-overhead: warm-up, capture, then replays
            x = tokens(64, seed=seed)
            expected = model(x)
            assert torch.equal(compiled(x).clone(), expected), f"call {seed}"
    first.check()


def test_compiled_for_any_number_of_tokens() -> None:
    torch._dynamo.reset()
    layer = made()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for count in (2, 300, 65, 128):
            x = tokens(count)
            assert torch.equal(compiled(x), layer(x))


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def test_graph_replays_with_other_input() -> None:
    first, second = made(), made(replace(SMALL, intermediate=96), seed=3)
    x = tokens(100)
    graph, y = captured(lambda: second(first(x)))
    for seed in range(4):
        x.copy_(tokens(100, seed=seed))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, second(first(x)))
    first.check()


def test_graphs_and_calls_on_other_streams_take_turns() -> None:
    layer, other = made(), made(PRESETS["qwen3-30b"].config)
    x, z = tokens(200), tokens(250, other.config)
    expected, expected_other = layer(x), other(z)
    graph, y = captured(lambda: layer(x))
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for i in range(60):
        with torch.cuda.stream(streams[i % 3]):
            if i % 2:
                graph.replay()
            else:
                results.append(other(z))
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
    assert all(torch.equal(r, expected_other) for r in results)
    layer.check()


def test_capture_that_forks_is_in_order_too() -> None:
    layer, x, side = made(), tokens(200), torch.cuda.Stream()
    expected = layer(x)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        here = layer(x)
        with torch.cuda.stream(side):
            there = layer(x)
        main.wait_stream(side)
        return here, there

    graph, results = captured(both)
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(r, expected) for r in results)
    layer.check()


def test_two_streams() -> None:
    layer, other = made(), made(CONFIGS["deepseek"])
    batches = [tokens(n, seed=n) for n in (1, 50, 300)]
    z = tokens(100, other.config)
    expected, expected_other = [layer(x) for x in batches], other(z)
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    results, others = [], []
    for i in range(60):
        with torch.cuda.stream(streams[i % 2]):
            results.append(layer(batches[i % 3]))
            others.append(other(z))
    torch.cuda.synchronize()
    for i, y in enumerate(results):
        assert torch.equal(y, expected[i % 3])
    assert all(torch.equal(y, expected_other) for y in others)


# -- nothing waits, nothing is allocated ----------------------------------------------------------


def test_no_call_waits_for_the_gpu() -> None:
    layer, x = made(EXTERNAL), tokens(100)
    ids, weights = chosen(EXTERNAL, 100)
    layer(x, ids.long(), weights)  # torch's allocator then has what the calls below take
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    began = time.monotonic()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            layer(x, ids.long(), weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    queued = time.monotonic() - began
    torch.cuda.synchronize()
    assert queued < 0.3 < time.monotonic() - began


def test_memory_is_that_of_construction() -> None:
    layer = made()
    xs = [tokens(n) for n in (1, 300, 17)]
    out = torch.empty_like(xs[1])
    layer(xs[1], out=out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(20):
        layer(xs[1], out=out)
    assert torch.cuda.max_memory_allocated() == before, "out= allocates nothing"
    for i in range(20):
        y = layer(xs[i % 3])
        del y
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before <= xs[1].nbytes + 512


def test_layers_share_one_heap(heap: SharedHeap) -> None:
    config = replace(SMALL, hidden=1024)
    weights = random_weights(config, 0, "cuda")
    first = MoE(config, weights, max_tokens=4000)
    torch.cuda.synchronize()
    before, room = torch.cuda.memory_allocated(), heap._rows.numel()
    same = MoE(config, weights, max_tokens=4000)
    assert torch.cuda.memory_allocated() == before
    smaller = MoE(config, weights, max_tokens=1000)
    assert torch.cuda.memory_allocated() - before < 1 << 20, "signals of its own, no rows"
    assert heap._rows.numel() == room
    x = tokens(900, config)
    assert torch.equal(first(x), same(x))
    assert torch.equal(first(x), smaller(x))


def test_growing_keeps_earlier_layers_and_graphs(heap: SharedHeap) -> None:
    layer, x = made(), tokens(100)
    expected = layer(x)
    graph, y = captured(lambda: layer(x))
    size = heap._rows.numel()
    larger = made(max_tokens=1 + 2 * size // (2 * 2 * (256 + 192)))
    assert heap._rows.numel() > size
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
    assert torch.equal(layer(x), expected)
    assert torch.equal(larger(x), expected)
    larger.check()


def test_a_heap_that_does_not_fit_is_told_in_bytes() -> None:
    config = PRESETS["qwen3-30b"].config
    weights = random_weights(config, 0, "cuda")
    before = torch.cuda.memory_allocated()
    with pytest.raises(FlashmoeError, match=r"max_tokens 10000000 needs .* \(\d+ bytes\)"):
        MoE(config, weights, max_tokens=10_000_000)
    assert torch.cuda.memory_allocated() == before


# -- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [[0, 8], [-1, 0], [3, 3]])
def test_bad_ids_give_nan_and_raise_once_known(bad: list[int]) -> None:
    layer, x = made(EXTERNAL), tokens(50)
    ids, weights = chosen(EXTERNAL, 50)
    good = layer(x, ids, weights)
    wrong = ids.clone()
    wrong[20] = torch.tensor(bad, dtype=torch.int32)
    y = layer(x, wrong, weights)
    assert y.isnan().all()
    with pytest.raises(FlashmoeError, match="expert ids"):
        layer.check()
    with pytest.raises(FlashmoeError, match="expert ids"):
        layer(x, ids, weights)
    layer.reset()
    layer.check()
    assert torch.equal(layer(x, ids, weights), good)


def test_a_failure_in_a_graph_is_nan_in_its_replays() -> None:
    layer, x = made(EXTERNAL), tokens(50)
    ids, weights = chosen(EXTERNAL, 50)
    graph, y = captured(lambda: layer(x, ids, weights))
    graph.replay()
    torch.cuda.synchronize()
    good, kept = y.clone(), ids[7].clone()
    assert not good.isnan().any()
    ids[7] = 99
    graph.replay()
    torch.cuda.synchronize()
    assert y.isnan().all()
    ids[7] = kept
    graph.replay()
    assert y.isnan().all(), "a failure lasts until reset()"
    with pytest.raises(FlashmoeError, match="expert ids"):
        layer.check()
    layer.reset()
    graph.replay()
    assert torch.equal(y, good)


def test_a_hang_gives_nan_and_raises(heap: SharedHeap) -> None:
    layer, x = made(), tokens(200)
    good = layer(x)
    heap.faults, heap.deadline_s = (Fault("lost-signal", rank=0, expert=2),), 0.3
    out = torch.zeros_like(x)
    layer(x, out=out)
    torch.cuda.synchronize()
    assert out.isnan().all()
    with pytest.raises(FlashmoeError, match=r"waited 0.3 s in vain") as caught:
        layer(x)
    assert caught.value.exit_code == 124
    heap.faults, heap.deadline_s = (), 10.0
    layer.reset()
    assert torch.equal(layer(x), good)


def test_epochs_begin_anew_before_32_bits_are_over(heap: SharedHeap) -> None:
    config = replace(SMALL, hidden=512)  # signals of its own
    layer, x = made(config), tokens(200, config)
    first = layer(x)
    layer.check()
    (place,) = [p for (c, _), p in heap._places.items() if c == config]
    words = place.signals.view(torch.int64)

    def word(name: str) -> int:
        return int(words[place.layout[name] // 8])

    chunks = place.shape["chunks"]
    assert (word("epoch_word"), word("exits")) == (1, chunks)
    last = 2**31 - 1  # odd, as 1 is: sets alternate by it
    for name, value in (("epoch_word", last), ("exits", last * chunks), ("barrier", last * chunks)):
        words[place.layout[name] // 8] = value
    assert torch.equal(layer(x), first)
    layer.check()
    assert not words.any()
    graph, y = captured(lambda: layer(x))
    for epoch in (2, 3):
        graph.replay()
        layer.check()
        assert word("epoch_word") == epoch
        assert torch.equal(y, first)


def test_inference_only() -> None:
    layer, x = made(), tokens(5).requires_grad_()
    with pytest.raises(FlashmoeError, match="requires grad"):
        layer(x)
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(layer(x), layer(x.detach()))


@pytest.mark.parametrize("change", ["device", "dtype", "width", "tokens"])
def test_wrong_x(change: str) -> None:
    x = {
        "device": lambda: tokens(5).cpu(),
        "dtype": lambda: tokens(5).half(),
        "width": lambda: tokens(5)[:, :128],
        "tokens": lambda: tokens(MAX_TOKENS + 1),
    }[change]()
    with pytest.raises(FlashmoeError):
        made()(x)


# -- as a module ----------------------------------------------------------------------------------


def test_moves_copies_and_state(tmp_path: Path) -> None:
    layer, x = made(), tokens(60)
    y = layer(x)
    again = made(seed=9)
    assert not torch.equal(again(x), y)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), y)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(layer.cpu().cuda()(x), y)
    torch.save(layer, tmp_path / "layer.pt")
    assert torch.equal(torch.load(tmp_path / "layer.pt", weights_only=False)(x), y)
    half = copy.deepcopy(layer).half()
    assert half(x.half()).dtype == torch.float16


def test_from_checkpoint(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.1,
    )
    transformers.MixtralForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    from flashmoe.checkpoint import load_layer

    loaded = load_layer(tmp_path, 1, device="cuda")
    layer = MoE.from_checkpoint(tmp_path, 1, max_tokens=70)
    x = tokens(70, loaded.config)
    weights: MoEWeights = loaded.weights
    engine = engine_for(loaded.config, weights, deal(x, 1))
    assert torch.equal(layer(x).cpu(), forward(engine).y)


def test_the_heap_goes_with_the_last_layer() -> None:
    """In a process of its own: here, graphs that were captured before hold the heap."""
    import subprocess
    import sys

    program = """
import gc, torch
from flashmoe import MoE
from flashmoe.config import MoEConfig
from flashmoe.weights import random_weights
config = MoEConfig(256, 192, 8, 2)
weights = random_weights(config, 0, "cuda")
before = torch.cuda.memory_allocated()
layer = MoE(config, weights, max_tokens=4096)
assert torch.cuda.memory_allocated() > before
layer(torch.zeros(10, 256, dtype=torch.bfloat16, device="cuda"))
del layer
gc.collect()
assert torch.cuda.memory_allocated() == before, torch.cuda.memory_allocated() - before
"""
    gc.collect()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

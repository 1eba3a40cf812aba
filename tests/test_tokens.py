"""Random weights and tokens, skew, and the files tokens come from and outputs go to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flashmoe.config import MoEConfig, Routing
from flashmoe.errors import FlashmoeError
from flashmoe.presets import PRESETS
from flashmoe.reference import logits, moe, route
from flashmoe.tokens import random_tokens, read_tokens, save_outputs, zipf_order, zipf_shares
from flashmoe.weights import nbytes, random_weights

TINY = PRESETS["tiny"].config
SIGMOID = MoEConfig(64, 96, 16, 4, routing=Routing("sigmoid", groups=4, top_groups=2))


@pytest.mark.parametrize("config", [TINY, SIGMOID, PRESETS["olmoe"].config])
def test_size_of_the_weights(config: MoEConfig) -> None:
    if config.experts > 16:
        # H + 2I rows of the three matrices, and the router: 2 bytes an element.
        assert nbytes(config) == 2 * (64 * 3 * 2048 * 1024 + 64 * 2048)
        return
    weights = random_weights(config)
    tensors = [t for t in (weights.gate, weights.bias, weights.up, weights.down) if t is not None]
    assert nbytes(config) == sum(t.nbytes for t in tensors)
    assert (weights.bias is not None) == (config.routing.kind == "sigmoid")


def test_weights_follow_the_seed() -> None:
    one, again, other = (random_weights(TINY, seed) for seed in (1, 1, 2))
    assert torch.equal(one.up, again.up) and torch.equal(one.gate, again.gate)
    assert not torch.equal(one.up, other.up)
    assert not torch.equal(one.up[0], one.up[1])


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu", "gelu", "silu"])
def test_outputs_are_of_order_one(activation: str) -> None:
    config = MoEConfig(256, 512, 4, 1, activation=activation)  # type: ignore[arg-type]
    weights = random_weights(config)
    (x,) = random_tokens([64], config)
    routed = route(x, weights, config)
    y = moe(x, weights, config, routed.ids, routed.weights)
    assert 0.9 < float(y.std()) < 1.1
    assert 0.8 < float(logits(x, weights).std()) < 1.2


def test_the_global_batch_does_not_depend_on_the_ranks() -> None:
    (whole,) = random_tokens([12], TINY, seed=3)
    parts = random_tokens([5, 0, 7], TINY, seed=3)
    assert [len(part) for part in parts] == [5, 0, 7]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(random_tokens([12], TINY, seed=4)[0], whole)
    assert whole.dtype == torch.bfloat16


@pytest.mark.parametrize("skew", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("config", [TINY, MoEConfig(256, 8, 64, 8)])
def test_first_choices_follow_zipfs_law(config: MoEConfig, skew: float) -> None:
    weights = random_weights(config, seed=1)
    (x,) = random_tokens([8192], config, seed=1, skew=skew, gate=weights.gate)
    first = route(x, weights, config).ids[:, 0].long()
    shares = torch.bincount(first, minlength=config.experts).double() / len(first)
    wanted = zipf_shares(config.experts, skew, seed=1)
    # Total variation; the noise of a fair draw alone is some sqrt(E / (2 pi T)): 0.01 and 0.035.
    assert float((shares - wanted).abs().sum() / 2) < 0.045
    assert float(x.float().std()) < 2.5, "tokens keep their scale"


def test_skew_loads_experts_more_unevenly_than_none() -> None:
    weights = random_weights(TINY)

    def largest(skew: float) -> float:
        (x,) = random_tokens([2048], TINY, skew=skew, gate=weights.gate)
        rows = torch.bincount(route(x, weights, TINY).ids.flatten().long(), minlength=8)
        return float(rows.max() / rows.sum())

    assert largest(0.0) < 0.2
    assert largest(0.0) < largest(1.0) < largest(2.0) <= 0.5


def test_skew_reaches_sigmoid_routing() -> None:
    weights = random_weights(SIGMOID)
    (x,) = random_tokens([2048], SIGMOID, skew=1.5, gate=weights.gate)
    rows = torch.bincount(route(x, weights, SIGMOID).ids.flatten().long(), minlength=16)
    hottest = zipf_order(16, seed=0)[:3].tolist()
    assert int(rows.argmax()) in hottest
    assert float(rows.max() / rows.double().mean()) > 2


@pytest.mark.parametrize("skew", [-1.0, float("nan"), float("inf")])
def test_skew_must_be_a_number_from_zero_up(skew: float) -> None:
    with pytest.raises(FlashmoeError, match="skew"):
        random_tokens([1], TINY, skew=skew, gate=random_weights(TINY).gate)
    with pytest.raises(FlashmoeError, match="router"):
        random_tokens([1], TINY, skew=1.0)


def _npy(path: Path, values: np.ndarray) -> Path:
    np.save(path, values)
    return path


def test_npy_and_safetensors_give_the_same_tokens(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(7, 64)).astype(np.float32)
    npy = read_tokens(_npy(tmp_path / "t.npy", values), TINY)
    save_file({"anything": torch.from_numpy(values)}, tmp_path / "one.safetensors")
    save_file(
        {"hidden_states": torch.from_numpy(values), "mask": torch.ones(7)},
        tmp_path / "two.safetensors",
    )
    assert npy.dtype == torch.bfloat16 and npy.shape == (7, 64)
    assert torch.equal(npy, torch.from_numpy(values).bfloat16())
    assert torch.equal(npy, read_tokens(tmp_path / "one.safetensors", TINY))
    assert torch.equal(npy, read_tokens(tmp_path / "two.safetensors", TINY))


def _truncated(path: Path) -> Path:
    _npy(path, np.zeros((4, 64)))
    path.write_bytes(path.read_bytes()[:200])
    return path


def _two_unnamed(path: Path) -> Path:
    save_file({"a": torch.ones(1, 64), "b": torch.ones(1, 64)}, path)
    return path


def _foreign(path: Path) -> Path:
    path.write_text("no tensors here")
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: d / "none.npy", "no file"),
        (lambda d: _foreign(d / "t.txt"), "not '.txt'"),
        (lambda d: _npy(d / "t.npy", np.zeros((4, 32))), "[4, 32]"),
        (lambda d: _npy(d / "t.npy", np.zeros((2, 4, 64))), "[2, 4, 64]"),
        (lambda d: _npy(d / "t.npy", np.zeros((4, 64), dtype=np.int64)), "int64"),
        (lambda d: _npy(d / "t.npy", np.full((4, 64), np.nan)), "finite"),
        (lambda d: _npy(d / "t.npy", np.array(["text"])), "can't be read"),
        (lambda d: _npy(d / "t.npy", np.array([{}])), "can't be read"),
        (lambda d: _truncated(d / "t.npy"), "can't be read"),
        (lambda d: _foreign(d / "t.npy"), "can't be read"),
        (lambda d: _foreign(d / "t.safetensors"), "can't be read"),
        (lambda d: _two_unnamed(d / "t.safetensors"), "2 tensors"),
    ],
)
def test_files_that_hold_no_tokens(make: Callable[[Path], Path], says: str, tmp_path: Path) -> None:
    with pytest.raises(FlashmoeError) as caught:
        read_tokens(make(tmp_path), TINY)
    assert says in caught.value.message
    assert caught.value.hint and caught.value.exit_code == 2


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_others_may_read_outputs_as_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    file = tmp_path / "out.safetensors"
    before = os.umask(umask)
    try:
        save_outputs(file, torch.ones(1, 8), torch.zeros(1, 2), torch.ones(1, 2))
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == mode


def test_outputs_are_written_whole_and_never_over_others(tmp_path: Path) -> None:
    y, ids = torch.randn(3, 64).bfloat16(), torch.zeros(3, 2, dtype=torch.int32)
    file = tmp_path / "out.safetensors"
    save_outputs(file, y, ids, torch.ones(3, 2))
    back = load_file(file)
    assert torch.equal(back["y"], y) and torch.equal(back["ids"], ids)
    assert back["weights"].dtype == torch.float32
    with pytest.raises(FlashmoeError, match="exists"):
        save_outputs(file, y * 0, ids, torch.ones(3, 2))
    assert torch.equal(load_file(file)["y"], y)
    save_outputs(file, y * 0, ids, torch.ones(3, 2), force=True)
    assert not load_file(file)["y"].any()
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]
    (tmp_path / "null").symlink_to("/dev/null")
    with pytest.raises(FlashmoeError, match="is no file"):
        save_outputs(tmp_path / "null", y, ids, torch.ones(3, 2), force=True)
    with pytest.raises(FlashmoeError, match="can't be written"):
        save_outputs(tmp_path / "none" / "out.safetensors", y, ids, torch.ones(3, 2))

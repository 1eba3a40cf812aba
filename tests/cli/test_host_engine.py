"""The whole path on the host engine: run, trace, read back, hang, stop, a real model's layer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import flashmoe_cli

HOST = ("--world", "host")


def test_what_crossed_by_the_trace_is_what_the_routing_says(runs: Path, cli: Any) -> None:
    args = ("trace", "tiny", "--ranks", "3", "-T", "40,0,23", "-n", "2", "--skew", "1", *HOST)
    said = json.loads(cli(*args, "--json").stdout)
    assert said["check"]["ok"]
    moved = np.array(json.loads(cli("traffic", "--json").stdout)["matrix_bytes"])
    np.fill_diagonal(moved, 0)
    assert (moved == 2 * np.array(said["payload_bytes"])).all()
    one = np.array(json.loads(cli("traffic", "--json", "--iteration", "1").stdout)["matrix_bytes"])
    np.fill_diagonal(one, 0)
    assert (one == said["payload_bytes"]).all()


def test_the_timeline_of_a_real_run_adds_up(runs: Path, cli: Any) -> None:
    assert cli("trace", "tiny", "--ranks", "2", "-n", "3", *HOST, "-q").exit_code == 0
    figures = json.loads(cli("timeline", "--json").stdout)
    assert figures["world"] == "host"
    assert {e["iter"] for e in figures["iterations"]} == {0, 1, 2}
    for entry in figures["actors"]:
        spent = sum(entry[f"{c}_ns"] for c in ("busy", "comm", "wait", "idle"))
        assert spent == entry["actor_ns"]
        assert entry["unrecorded_ns"] == 0
    assert figures["tiles"]["ran"] == figures["tiles"]["planned"] > 0
    text = cli("timeline").stdout
    assert "not GPU times" in text
    assert "every launch" in text


def test_it_exports(runs: Path, cli: Any) -> None:
    assert cli("trace", "tiny", "--ranks", "2", *HOST, "-q", "-o", "a.fmoe").exit_code == 0
    assert cli("export", "a", "-o", "a.json", "--format", "chrome").exit_code == 0
    events = json.loads(Path("a.json").read_text())["traceEvents"]
    assert {"gemm1", "gemm2"} <= {e.get("name") for e in events}


def test_the_same_seed_gives_the_same_bits(runs: Path, cli: Any) -> None:
    for name, ranks, tokens in (("a", "1", "64"), ("b", "2", "32"), ("c", "1", "64")):
        args = ("run", "tiny", "-T", tokens, "--ranks", ranks, "-n", "1", *HOST)
        assert cli(*args, "--save-output", f"{name}.safetensors").exit_code == 0
    saved = [load_file(f"{name}.safetensors") for name in "abc"]
    for other in saved[1:]:
        assert all(torch.equal(saved[0][k], other[k]) for k in ("y", "ids", "weights"))


@pytest.mark.parametrize(
    ("fault", "culprit"), [("never-starts:1", 1), ("lost-signal:1:2", 1), ("wrong-count:0:1:5", 0)]
)
def test_an_injected_fault_is_a_hang_with_its_culprit(
    runs: Path, cli: Any, fault: str, culprit: int
) -> None:
    args = ("trace", "tiny", "--ranks", "2", *HOST, "--deadline", "0.2", "--fault", fault)
    done = cli(*args, "-o", "hung.fmoe", "--json")
    assert done.exit_code == 124, done.output
    said = json.loads(done.stdout)
    assert said["hang"]["culprit"] == culprit
    assert said["status"]["code"] == 124
    assert said["hang"]["reason"] in " ".join(cli("info", "hung").stdout.split())
    seen = cli("timeline", "hung", "--strict")
    assert seen.exit_code == 4
    assert f"this run hung: {said['hang']['reason']}" in " ".join(seen.stdout.split())


def test_an_untraced_run_is_not_exported_but_said_to_be_one(runs: Path, cli: Any) -> None:
    assert cli("run", "tiny", *HOST, "-o", "plain.fmoe").exit_code == 0
    done = cli("export", "plain")
    assert done.exit_code == 1
    assert "it was not traced" in done.stderr
    assert not Path("plain.pftrace").exists()


def test_a_slow_rank_is_no_hang(runs: Path, cli: Any) -> None:
    args = ("run", "tiny", "--ranks", "2", *HOST, "--fault", "slow:1:0.01", "--deadline", "3")
    assert cli(*args, "-n", "1").exit_code == 0


def test_a_full_ring_is_said_and_the_rest_stays_readable(runs: Path, cli: Any) -> None:
    args = ("trace", "tiny", *HOST, "--ring-capacity", "5")
    done = cli(*args, "-o", "cut.fmoe")
    assert done.exit_code == 0, done.output
    assert "records dropped" in done.stdout
    assert "unrecorded" in done.stdout
    assert "<=" in done.stdout
    assert cli(*args, "-o", "end.fmoe", "--ring-mode", "keep-last").exit_code == 0
    meta = json.loads(cli("info", "end", "--json").stdout)["meta"]
    assert meta["rings"]["mode"] == "keep-last"
    assert meta["rings"]["dropped"] > 0


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_what_stops_a_real_run_ends_it_with_130_and_saves_it(runs: Path, by: int, cli: Any) -> None:
    place = {"PYTHONPATH": str(Path(flashmoe_cli.__file__).parents[1])}
    # Slow enough to be in the middle of it, fast enough to end a launch soon.
    args = ("trace", "tiny", *HOST, "--fault", "slow:0:0.002", "-n", "1000", "-o", "part.fmoe")
    with subprocess.Popen(
        [sys.executable, "-m", "flashmoe_cli", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | place,
    ) as process:
        assert process.stderr is not None
        while (line := process.stderr.readline().strip()) != "running":
            assert line, "it ended before it ran"
        time.sleep(0.5)
        process.send_signal(by)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-2:] == ["saved what had run: part.fmoe", "interrupted"]
    assert "Traceback" not in err
    assert out == ""
    meta = json.loads(cli("info", "part", "--json").stdout)["meta"]
    assert meta["status"] == {"code": 130, "message": "interrupted"}
    assert meta["iterations"] > 0
    assert cli("timeline", "part").exit_code == 0


def _models() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    common: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    }
    return {
        "mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                **common, intermediate_size=96, num_local_experts=8, num_experts_per_tok=2
            )
        ),
        "deepseek": lambda: transformers.DeepseekV3ForCausalLM(
            transformers.DeepseekV3Config(
                **common,
                intermediate_size=96,
                moe_intermediate_size=48,
                n_routed_experts=16,
                n_shared_experts=1,
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
        ),
    }


@pytest.mark.parametrize("family", ["mixtral", "deepseek"])
def test_a_checkpoints_layer_gives_what_the_models_own_block_gives(
    runs: Path, cli: Any, family: str
) -> None:
    from flashmoe.checkpoint import load_layer
    from flashmoe.numerics import output_bound
    from flashmoe.reference import route

    torch.manual_seed(3)
    model = _models()[family]().bfloat16()
    model.save_pretrained("model")
    x = torch.randn(33, 64)
    np.save("x.npy", x.numpy())
    done = cli(
        *("run", "--checkpoint", "model", "--layer", "1", "--tokens", "x.npy", "--ranks", "2"),
        *(*HOST, "--save-output", "y.safetensors"),
    )
    assert done.exit_code == 0, done.output
    shared = "the shared expert is added by torch, outside the kernel"
    assert (shared in done.stdout) == (family == "deepseek")

    saved, layer, x = load_file("y.safetensors"), load_layer("model", 1), x.bfloat16()
    with torch.no_grad():
        expected = model.float().model.layers[1].mlp(x.float()[None])[0]
    alike = saved["ids"].sort().values == route(x, layer.weights, layer.config).ids.sort().values
    alike = alike.all(dim=1)  # near-ties apart
    assert alike.float().mean() > 0.9
    bound = output_bound(x, layer.weights, layer.config, saved["ids"], saved["weights"])
    if layer.shared is not None:  # the sum is rounded to bf16 once more
        bound = bound + 2.0**-8 * expected.abs()
    assert ((saved["y"].float() - expected).abs() <= bound)[alike].all()

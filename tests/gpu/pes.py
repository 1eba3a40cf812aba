"""Runs of ranks that are processes on GPUs, and what they must have left behind: nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from flashmoe.config import MoEConfig
from flashmoe.presets import PRESETS

from ..procs.harness import Done, Job
from .layers import deal, engine_for, forward, inputs

TRANSPORTS = ("ipc",)

SEED = 0


def shared(ranks: int) -> tuple[str, ...]:
    """So many ranks on one GPU."""
    return ("--gpus", "1", "--ranks-per-gpu", str(ranks))


def apart(ranks: int) -> tuple[str, ...]:
    """A GPU for each."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs, and there are {torch.cuda.device_count()}")
    return ("--gpus", str(ranks))


def start(folder: Path, *args: str, **env: str) -> Job:
    """The command line in ``folder``, with ranks as processes."""
    return Job(folder, args, {"FLASHMOE_RENDEZVOUS_S": "60"} | env)


def finish(job: Job, code: int = 0, timeout: float = 150) -> Done:
    """Waits for its end, which must have this exit code and leave nothing."""
    done = job.end(timeout)
    assert done.code == code, done
    assert job.left() == [], done
    return done


def mps_folders() -> set[str]:
    """Folders of private MPS daemons that are there now."""
    return {path.name for path in Path(tempfile.gettempdir()).glob("flashmoe-mps-*")}


def global_batch(folder: Path, preset: str, tokens: int) -> tuple[Path, torch.Tensor]:
    """Tokens of all ranks together, as a file and as what is in it."""
    from safetensors.torch import save_file

    _, x = inputs(PRESETS[preset].config, tokens, SEED)
    path = folder / "tokens.safetensors"
    save_file({"tokens": x.cpu().contiguous()}, path)
    return path, x


def bits_of(y: torch.Tensor) -> bytes:
    return y.cpu().contiguous().view(torch.int16).numpy().tobytes()


def bits_in(path: Path) -> bytes:
    """Those of the ``y`` that a run has saved."""
    from safetensors.torch import load_file

    found: torch.Tensor = load_file(path)["y"]
    return bits_of(found)


def local_bits(config: MoEConfig, x: torch.Tensor, ranks: int) -> bytes:
    """The local world's, with so many virtual ranks in this process."""
    weights, _ = inputs(config, 1, SEED)
    engine = engine_for(config, weights, deal(x, ranks))
    y = forward(engine).y
    engine.close()
    del weights, engine
    torch.cuda.empty_cache()  # the ranks' processes need the memory
    return bits_of(y)

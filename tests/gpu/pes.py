"""Runs of ranks that are processes on GPUs, and what they must have left behind: nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from flashmoe.config import MoEConfig
from flashmoe.presets import PRESETS
from flashmoe.world import nvshmem

from ..procs.harness import Done, Job
from .layers import deal, engine_for, forward, inputs

WAYS = {
    "ipc": ("--transport", "ipc"),
    "nvshmem": ("--transport", "nvshmem"),
    "put-with-signal": ("--transport", "nvshmem", "--no-pointers"),
}
"""How ranks reach each other: by pointers of CUDA IPC's or NVSHMEM's, or by its put-with-signal."""


def _why_no_nvshmem() -> str:
    refused = nvshmem.refusal()
    return "" if refused is None else refused.message


needs_nvshmem = pytest.mark.skipif(bool(_why_no_nvshmem()), reason=_why_no_nvshmem() or "-")


def ways(*names: str) -> pytest.MarkDecorator:
    """The test's parameter ``way``: these of ``WAYS``, or all."""
    return pytest.mark.parametrize("way", [
        pytest.param(name, marks=() if name == "ipc" else needs_nvshmem) for name in names or WAYS
    ])  # fmt: skip


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


def leavings() -> set[str]:
    """What private MPS daemons and NVSHMEM have in the file system now."""
    found = list(Path(tempfile.gettempdir()).glob("flashmoe-mps-*"))
    found += Path("/tmp").glob("nvshmem-socket-*")
    found += [*Path("/dev/shm").glob("*nvshmem*"), *Path("/dev/shm").glob("mps_shm_*")]
    return {str(path) for path in found}


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

"""Hidden states that go into a layer, and what comes out of it: random ones and files."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from flashmoe.config import MoEConfig
from flashmoe.errors import FlashmoeError
from flashmoe.weights import torch_dtype

# Keeps the tokens' random numbers apart from the weights' where both have the same seed.
_SEED_STRIDE = 0x9E3779B97F4A7C15


def zipf_order(experts: int, seed: int) -> torch.Tensor:
    """Experts from the most to the least wanted under skew: int64 [E], a shuffle by the seed.

    Shuffled, because the hot experts of a real layer do not all live on the first rank.
    """
    generator = torch.Generator().manual_seed((seed + 2 * _SEED_STRIDE) % 2**63)
    return torch.randperm(experts, generator=generator)


def zipf_shares(experts: int, skew: float, seed: int) -> torch.Tensor:
    """Share of the tokens whose first choice each expert is meant to be: float64 [E], sum 1.

    The n-th most wanted expert's share is proportional to 1 / n^skew.
    """
    places = torch.arange(1, experts + 1, dtype=torch.float64)
    shares = torch.empty(experts, dtype=torch.float64)
    shares[zipf_order(experts, seed)] = places.pow(-skew)
    return shares / shares.sum()


def random_tokens(
    tokens: Sequence[int],
    config: MoEConfig,
    seed: int = 0,
    skew: float = 0.0,
    gate: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Standard normal hidden states in the layer's dtype, on the CPU: [T, H] for each T given.

    ``tokens`` holds the T of each rank.  One global batch is drawn and dealt out rank by rank, so
    the same total gives the same tokens whatever the number of ranks.

    With ``skew`` s > 0 the tokens are moved so that the layer's own gate (``gate`` [E, H]) routes
    them unevenly: expert e is the first choice with the probability of ``zipf_shares``, and the
    others follow without replacement (Plackett-Luce).  To that end the logits are set to
    ln(share) + a constant + Gumbel noise, by the smallest change of each token that does so; exact
    where H >= E and the gate has full rank, up to the rounding to the dtype.  A correction bias and
    expert groups act on top of it.

    Raises FlashmoeError where the skew is not a finite number >= 0, or has no gate to act on.
    """
    if not (np.isfinite(skew) and skew >= 0):
        raise FlashmoeError(
            f"skew {skew} is not a number from 0 up",
            "use --skew 0 for even routing, 1 for Zipf's law",
            exit_code=2,
        )
    generator = torch.Generator().manual_seed((seed + _SEED_STRIDE) % 2**63)
    x = torch.randn(sum(tokens), config.hidden, generator=generator)
    if skew > 0:
        if gate is None:
            raise FlashmoeError(
                "skewed tokens follow the router, and there is none",
                "pass the layer's gate, or give the expert ids instead of a skew",
                exit_code=2,
            )
        wanted = zipf_shares(config.experts, skew, seed).log()
        # Softmax ranks alike whatever is added to all logits: mean 0 moves tokens least.  Sigmoids
        # of large logits are all 1, so there the best expert's logit stays at about 0.
        wanted -= wanted.max() if config.routing.kind == "sigmoid" else wanted.mean()
        x = _steered(x, gate, wanted, generator)
    return list(x.to(torch_dtype(config)).split(list(tokens)))


def _steered(
    x: torch.Tensor, gate: torch.Tensor, wanted: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """x [T, H] moved to the nearest tokens whose logits are ``wanted`` [E] + Gumbel noise."""
    router = gate.detach().cpu().double()
    uniform = torch.rand(x.shape[0], wanted.numel(), dtype=torch.float64, generator=generator)
    gumbel = -torch.log(-torch.log(uniform.clamp_min(1e-300)))
    lacking = wanted + gumbel - x.double() @ router.T
    return (x.double() + lacking @ torch.linalg.pinv(router).T).float()


def read_tokens(path: str | os.PathLike[str], config: MoEConfig) -> torch.Tensor:
    """Hidden states [T, H] of a .npy or .safetensors file, in the layer's dtype on the CPU.

    A safetensors file must hold exactly one tensor, or one named ``hidden_states``, ``tokens`` or
    ``x``.  float32 and float64 are rounded to the layer's dtype.  Raises FlashmoeError (exit code
    2) where the file is missing, of another kind or shape, or holds values that are not finite.
    """
    file = Path(path)
    if not file.is_file():
        raise FlashmoeError(
            f"no file {file}", "give --tokens a .npy or .safetensors file", exit_code=2
        )
    if file.suffix == ".npy":
        found = _read_npy(file)
    elif file.suffix == ".safetensors":
        found = _read_safetensors(file)
    else:
        raise FlashmoeError(
            f"{file}: tokens come as .npy or .safetensors, not '{file.suffix}'",
            "save them with numpy.save or safetensors.torch.save_file",
            exit_code=2,
        )
    if found.ndim != 2 or found.shape[1] != config.hidden:
        raise FlashmoeError(
            f"{file}: tokens of shape {list(found.shape)}, the layer takes [T, {config.hidden}]",
            "one row a token, as wide as the model; reshape the array, or use the model's preset",
            exit_code=2,
        )
    if not found.dtype.is_floating_point:
        raise FlashmoeError(
            f"{file}: tokens are {str(found.dtype).removeprefix('torch.')}, not floating point",
            "these must be hidden states, not token ids",
            exit_code=2,
        )
    rounded = found.to(torch_dtype(config))
    if not bool(rounded.isfinite().all()):
        raise FlashmoeError(
            f"{file}: not every value is finite in {config.dtype}",
            "look for NaN or infinity in the file, or use --dtype bf16 for large values",
            exit_code=2,
        )
    return rounded.contiguous()


def _unreadable(file: Path, why: Exception) -> FlashmoeError:
    return FlashmoeError(
        f"{file} can't be read: {str(why).splitlines()[0] if str(why) else type(why).__name__}",
        "the file may be truncated or of another kind; write it again",
        exit_code=2,
    )


def _read_npy(file: Path) -> torch.Tensor:
    try:
        array = np.load(file, allow_pickle=False)
        return torch.from_numpy(np.ascontiguousarray(array))
    except (OSError, ValueError, TypeError, EOFError) as why:
        raise _unreadable(file, why) from why


def _read_safetensors(file: Path) -> torch.Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            known = [n for n in ("hidden_states", "tokens", "x") if n in names]
            if len(names) != 1 and not known:
                raise FlashmoeError(
                    f"{file} holds {len(names)} tensors and none is named hidden_states",
                    f"save one tensor, or name it hidden_states (found: {', '.join(names[:5])})",
                    exit_code=2,
                )
            return tensors.get_tensor(known[0] if known else names[0])
    except (OSError, SafetensorError) as why:
        raise _unreadable(file, why) from why


def save_outputs(
    path: str | os.PathLike[str],
    y: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    force: bool = False,
) -> None:
    """Writes ``y`` [T, H], ``ids`` int32 [T, k] and ``weights`` float32 [T, k] as safetensors.

    Complete or not at all: written beside the target and renamed.  Raises FlashmoeError where the
    file exists and ``force`` is not set (exit code 2), or can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file = Path(path)
    if file.exists() and not file.is_file():  # a rename would put the output in a device's place
        raise FlashmoeError(f"{file} is no file", "give the name of a file", exit_code=2)
    if file.exists() and not force:
        raise FlashmoeError(f"{file} exists", "choose another name, or pass --force", exit_code=2)
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in (("y", y), ("ids", ids), ("weights", weights))
    }
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        # safetensors writes for the owner alone; a file made here first tells what umask allows.
        partial.touch(mode=0o666)
        mode = partial.stat().st_mode
        save_file(tensors, partial)
        partial.chmod(stat.S_IMODE(mode))
        os.replace(partial, file)
    except (OSError, SafetensorError) as why:
        raise FlashmoeError(
            f"{file} can't be written: {why}", "check the folder, its permissions and its space"
        ) from why
    finally:
        partial.unlink(missing_ok=True)

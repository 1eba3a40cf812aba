"""The Triton fused MoE kernel of vLLM and SGLang, out of SGLang's published wheel.

Two peers: with the configuration that the wheel ships for the layer, and with the best of all that
it ships for this GPU, tried on the spot.  The order of work is that of its own host code: gate,
sort by expert, first product, activation, second product with the routing weights, sum over k.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from flashmoe.bench.gate import compiled
from flashmoe.bench.peers import wheel
from flashmoe.bench.peers.base import Case, PeerOptions, PeerWork, Unavailable
from flashmoe.bench.peers.torch_grouped import activate
from flashmoe.bench.stopwatch import CudaStopwatch, Prepared, Stopwatch

H200 = "NVIDIA_H200"
CANDIDATES = 16
"""Configurations tried by the tuned peer at most, the most frequent ones."""

_TRIALS = 5
_COMPILERS = 8

NOTE = (
    "rows are sorted by Triton kernels of flashmoe's and activated by a compiled torch function, "
    "since its own are CUDA code of another package; both within the time; USE_TMA of a "
    "configuration is left out"
)


@functools.cache
def _kernels(place: Path | None) -> tuple[wheel.Source, ModuleType]:
    """The wheel and its module of kernels, loaded once a process."""
    source = wheel.locate(place)
    name = source.holding(
        "fused_moe_triton_kernels.py", "def invoke_fused_moe_kernel", "def moe_sum_reduce_triton"
    )
    capable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return source, wheel.load(source, name, {"is_arch_support_pdl": lambda: capable})


def shipped_config(case: Case, source: wheel.Source) -> tuple[dict[str, Any], dict[str, Any], str]:
    """What SGLang would take for the case's two products on this GPU, and where it comes from.

    The file for this GPU, else the H200's, else what its own default says.  Of a file for the
    second product alone all but the height of blocks holds: rows are sorted once for both.
    """
    import triton

    config, tokens = case.config, case.x.shape[0]
    devices = (_device_name(), H200)
    found = [
        wheel.choose_config(
            source.names(), config.experts, config.intermediate, devices, triton.__version__, down
        )
        for down in (False, True)
    ]
    of_file = [
        None if name is None else wheel.nearest(json.loads(source.read(name)), tokens)
        for name in found
    ]
    up, down = of_file
    origin = " and ".join(name.rpartition("configs/")[2] for name in found if name is not None)
    if up is None:
        name = source.holding("fused_moe_triton_config.py", "def get_default_config")
        module = wheel.load(source, name)
        up = dict(
            module.get_default_config(
                tokens, config.experts, config.intermediate, config.hidden, config.top_k, None,
                False,
            )
        )  # fmt: skip
        origin = f"its default: no file is published for this layer{origin and ', but '}{origin}"
    return up, {**(down or up), "BLOCK_SIZE_M": up["BLOCK_SIZE_M"]}, origin


def _device_name() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    return str(torch.cuda.get_device_name()).replace(" ", "_")


class _Layer:
    """One case's buffers, and the launches in their order."""

    def __init__(self, case: Case, kernels: ModuleType) -> None:
        import triton.language as tl

        from flashmoe.bench.peers.align import Aligner

        config, x = case.config, case.x
        self.case = case
        self._kernels = kernels
        self._rows = x.shape[0] * config.top_k
        self._type = {"bf16": tl.bfloat16, "fp16": tl.float16}[config.dtype]
        self._of_up = x.new_empty(self._rows, config.up_rows)
        self._of_down = x.new_empty(x.shape[0], config.top_k, config.hidden)
        self._y = torch.empty_like(x)
        self._activate = compiled(lambda up: activate(up, config))
        self._aligners: dict[int, Aligner] = {}

    def align(self, ids: torch.Tensor, block: int) -> Any:
        """Rows by expert in blocks of ``block`` rows."""
        from flashmoe.bench.peers.align import Aligner

        if block not in self._aligners:
            experts = self.case.config.experts
            self._aligners[block] = Aligner(self._rows, experts, block, ids.device)
        return self._aligners[block](ids)

    def up(
        self, ids: torch.Tensor, weights: torch.Tensor, aligned: Any, config: dict[str, Any]
    ) -> None:
        """The first product: each token's row by each of its experts."""
        case = self.case
        self._gemm(
            case.x, case.weights.up, self._of_up, ids, weights, aligned, config,
            weigh=False, top_k=case.config.top_k,
        )  # fmt: skip

    def activated(self) -> torch.Tensor:
        """The activation of what ``up`` wrote."""
        return self._activate(self._of_up)  # type: ignore[no-any-return]

    def down(
        self,
        h: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        aligned: Any,
        config: dict[str, Any],
    ) -> None:
        """The second product, times the routing weights."""
        self._gemm(
            h, self.case.weights.down, self._of_down, ids, weights, aligned, config,
            weigh=True, top_k=1,
        )  # fmt: skip

    def summed(self) -> torch.Tensor:
        """The sum over k, as its host code chooses it."""
        if self.case.config.top_k == 2:
            return torch.add(self._of_down[:, 0], self._of_down[:, 1], out=self._y)
        self._kernels.moe_sum_reduce_triton(self._of_down, self._y, 1.0)
        return self._y

    def _gemm(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        aligned: Any,
        config: dict[str, Any],
        weigh: bool,
        top_k: int,
    ) -> None:
        self._kernels.invoke_fused_moe_kernel(
            a, b, None, c, None, None, None, weights, ids,
            aligned.sorted_rows, aligned.expert_of, aligned.total,
            weigh, top_k, config,
            compute_type=self._type,
            use_fp8_w8a8=False, use_int8_w8a8=False, use_int8_w8a16=False, use_int4_w4a16=False,
            per_channel_quant=False,
        )  # fmt: skip


def _work(
    layer: _Layer, source: wheel.Source, up: dict[str, Any], down: dict[str, Any], origin: str
) -> PeerWork:
    case = layer.case
    import triton

    def forward() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids, weights = case.gate(case.x)
        aligned = layer.align(ids, up["BLOCK_SIZE_M"])
        layer.up(ids, weights, aligned, up)
        layer.down(layer.activated(), ids, weights, aligned, down)
        return layer.summed(), ids, weights

    settings = {"up": up, "down": down, "from": origin}
    version = f"SGLang {source.version()}, Triton {triton.__version__}"
    return PeerWork(forward, version, NOTE, settings)


def _layer(case: Case, options: PeerOptions) -> tuple[_Layer, wheel.Source]:
    try:
        import triton  # noqa: F401
    except ImportError:
        raise Unavailable("triton is not installed") from None
    source, kernels = _kernels(options.sglang_wheel)
    return _Layer(case, kernels), source


def shipped(case: Case, options: PeerOptions) -> PeerWork:
    """With the configuration published for the layer, or the package's default."""
    layer, source = _layer(case, options)
    return _work(layer, source, *shipped_config(case, source))


def tuned(case: Case, options: PeerOptions) -> PeerWork:
    """With the fastest of the shipped configuration and those of the H200's other layers.

    Both products are timed with each as the bench times everything (in turn, L2 flushed), and the
    best pair of one block height is taken.
    """
    layer, source = _layer(case, options)
    first, _, _ = shipped_config(case, source)
    others = [c for c in wheel.published(source, H200, case.x.shape[0]) if c != first]
    candidates = _that_run(layer, [first, *others[: CANDIDATES - 1]])
    if not candidates:
        raise Unavailable("no published configuration runs on this GPU")
    up_ms, down_ms = _products_ms(layer, candidates, CudaStopwatch(case.x.device))
    up, down = best_pair(candidates, up_ms, down_ms)
    return _work(layer, source, up, down, f"the best of {len(candidates)} published for the H200")


def best_pair(
    candidates: list[dict[str, Any]], up_ms: list[float], down_ms: list[float]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configurations of the two products, of one block height, with the least time in all.

    ``up_ms`` and ``down_ms`` are each candidate's times as the one and the other product.
    """
    pairs = (
        (up_ms[i] + down_ms[j], i, j)
        for i, up in enumerate(candidates)
        for j, down in enumerate(candidates)
        if up["BLOCK_SIZE_M"] == down["BLOCK_SIZE_M"]
    )
    _, i, j = min(pairs)
    return candidates[i], candidates[j]


def _products_ms(
    layer: _Layer, candidates: list[dict[str, Any]], stopwatch: Stopwatch
) -> tuple[list[float], list[float]]:
    """Medians of both products with each of the candidates."""
    ids, weights = (t.clone() for t in layer.case.gate(layer.case.x))
    h = layer.activated()
    works: list[Callable[[], None]] = []
    for config in candidates:
        aligned = layer.align(ids, config["BLOCK_SIZE_M"])
        works.append(functools.partial(layer.up, ids, weights, aligned, config))
        works.append(functools.partial(layer.down, h, ids, weights, aligned, config))
    times = stopwatch.rounds([Prepared(work, work, None, False) for work in works], _TRIALS)
    medians = [statistics.median(ms) for ms in times]
    return medians[::2], medians[1::2]


def _that_run(layer: _Layer, candidates: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The candidates that this GPU has shared memory for: each is compiled and launched once.

    From several threads, since compiling is all that takes time.
    """
    ids, weights = (t.clone() for t in layer.case.gate(layer.case.x))
    aligned = {c["BLOCK_SIZE_M"]: layer.align(ids, c["BLOCK_SIZE_M"]) for c in candidates}
    h = layer.activated()
    torch.cuda.synchronize()

    def runs(config: dict[str, Any]) -> bool:
        torch.cuda.set_device(ids.device)  # each thread has its own
        rows = aligned[config["BLOCK_SIZE_M"]]
        try:
            layer.up(ids, weights, rows, config)
            layer.down(h, ids, weights, rows, config)
        except Exception as exc:
            if "out of resource" not in str(exc) and "OutOfResources" not in type(exc).__name__:
                raise
            return False
        return True

    with ThreadPoolExecutor(_COMPILERS) as pool:
        kept = [c for c, good in zip(candidates, pool.map(runs, candidates), strict=True) if good]
    torch.cuda.synchronize()
    return kept

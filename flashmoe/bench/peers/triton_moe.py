"""The Triton fused MoE kernel of vLLM and SGLang, out of SGLang's published wheel.

Two peers: with the configuration that the wheel ships for the layer, and with the best of all that
it ships for this GPU, tried on the spot.  The order of work is that of its own host code: gate,
sort by expert, first product, activation, second product with the routing weights, sum over k.
"""

from __future__ import annotations

import contextlib
import functools
import json
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

H200 = "NVIDIA_H200"
CANDIDATES = 16
"""Configurations tried by the tuned peer at most, the most frequent ones."""

_TRIALS = 5
_COMPILERS = 8

NOTE = (
    "rows are sorted by Triton kernels of flashmoe's and activated by a compiled torch function, "
    "since its own are CUDA code of another package; both within the time"
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


def shipped_config(case: Case, source: wheel.Source) -> tuple[dict[str, Any], str]:
    """The configuration that SGLang would take for the case on this GPU, and where it comes from.

    The file for this GPU, else the H200's, else what its own default says.
    """
    import triton

    config, tokens = case.config, case.x.shape[0]
    here = _device_name()
    found = wheel.choose_config(
        source.names(), config.experts, config.intermediate, (here, H200), triton.__version__
    )
    if found is not None:
        by_tokens = json.loads(source.read(found))
        return wheel.nearest(by_tokens, tokens), found.rpartition("configs/")[2]
    name = source.holding("fused_moe_triton_config.py", "def get_default_config")
    module = wheel.load(source, name)
    default = module.get_default_config(
        tokens, config.experts, config.intermediate, config.hidden, config.top_k, None, False
    )
    return dict(default), "its default: no file is published for this layer"


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
    config, origin = shipped_config(case, source)
    return _work(layer, source, config, config, origin)


def tuned(case: Case, options: PeerOptions) -> PeerWork:
    """With the fastest of the shipped configuration and those of the H200's other layers.

    Both products are timed with each, and the best pair of one block height is taken.
    """
    layer, source = _layer(case, options)
    first, _ = shipped_config(case, source)
    others = [c for c in wheel.published(source, H200, case.x.shape[0]) if c != first]
    candidates = [first, *others[: CANDIDATES - 1]]
    up, down = _fastest(layer, candidates)
    return _work(layer, source, up, down, f"the best of {len(candidates)} published for the H200")


def _fastest(
    layer: _Layer, candidates: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pair of configurations, of one block height, with the least time for both products."""
    case = layer.case
    ids, weights = (t.clone() for t in case.gate(case.x))
    _compile_all(layer, ids, weights, candidates)
    best: dict[int, list[tuple[float, dict[str, Any]]]] = {}
    for config in candidates:
        block = config["BLOCK_SIZE_M"]
        aligned = layer.align(ids, block)
        try:
            up = _ms(functools.partial(layer.up, ids, weights, aligned, config))
            h = layer.activated()
            down = _ms(functools.partial(layer.down, h, ids, weights, aligned, config))
        except Exception as exc:  # too much shared memory for these sizes, say
            if "out of resource" not in str(exc) and "OutOfResources" not in type(exc).__name__:
                raise
            continue
        slot = best.setdefault(block, [(up, config), (down, config)])
        for at, ms in enumerate((up, down)):
            if ms < slot[at][0]:
                slot[at] = (ms, config)
    if not best:
        raise Unavailable("no published configuration runs on this GPU")
    (_, up_config), (_, down_config) = min(best.values(), key=lambda s: s[0][0] + s[1][0])
    return up_config, down_config


def _compile_all(
    layer: _Layer, ids: torch.Tensor, weights: torch.Tensor, candidates: list[dict[str, Any]]
) -> None:
    """Launches every candidate once from several threads: compiling is all that takes time."""
    aligned = {c["BLOCK_SIZE_M"]: layer.align(ids, c["BLOCK_SIZE_M"]) for c in candidates}
    h = layer.activated()
    torch.cuda.synchronize()

    def once(config: dict[str, Any]) -> None:
        torch.cuda.set_device(ids.device)  # each thread has its own
        rows = aligned[config["BLOCK_SIZE_M"]]
        # What cannot run is found again, and said, when it is timed.
        with contextlib.suppress(Exception):
            layer.up(ids, weights, rows, config)
        with contextlib.suppress(Exception):
            layer.down(h, ids, weights, rows, config)

    with ThreadPoolExecutor(_COMPILERS) as pool:
        list(pool.map(once, candidates))
    torch.cuda.synchronize()


def _ms(work: Callable[[], None]) -> float:
    """The least of a few times by device events, after one call that compiles."""
    work()
    torch.cuda.synchronize()
    times = []
    for _ in range(_TRIALS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return min(times)

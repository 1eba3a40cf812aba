"""The GPU kernel as the host sees it: what it is compiled for, its shape, its launch."""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import TYPE_CHECKING, Any

import torch

from flashmoe import kernels
from flashmoe.errors import FlashmoeError
from flashmoe.kernels import places
from flashmoe.trace import schema
from flashmoe.tuning import Tiling, tiling_of
from flashmoe.world.tiles import extension

if TYPE_CHECKING:
    from flashmoe.config import MoEConfig

LANES = len(schema.Lane)
LINE = 128
"""Bytes of a line of L2."""

ARCH = "sm_90a"
TWO_WAVES_BYTES = 140_000_000
"""Of ``h``, expected of a rank's rows: up to so much, a half of it is small enough to stay in L2
until GEMM2 reads it, and two waves are faster than four (docs/performance.md)."""


# The kernel's sizes are the extension's to say (csrc/core/sizes.h), and asked for where they are
# needed: an installation without it can import this.


def tile_family(dtype: str) -> str:
    """The name of the tile family: weight rows by up to so many rows of tokens."""
    host = extension()
    return f"sm90-{host.TILE_WEIGHT_ROWS}w-{host.TILE_ROWS[dtype]}t"


def unit_family() -> str:
    """The same of few tokens of a rank alone, by units (csrc/core/course.h)."""
    host = extension()
    return f"sm90-{host.UNIT_WEIGHT_ROWS}w-{host.UNIT_ROWS}t"


def even_share(sms: int) -> int:
    """CTAs of a rank that has ``sms`` SMs.

    Pairs of SMs fetch weights together: an odd one out would leave all without a partner.
    """
    return sms - sms % 2 if sms > 1 else sms


def check(result: tuple[Any, ...], what: str) -> Any:
    """The value of a driver call; FlashmoeError where it failed."""
    error, *values = result
    if int(error) != 0:
        raise FlashmoeError(f"{what} failed: {error.name}", "see `flashmoe doctor`")
    return values[0] if len(values) == 1 else values


def check_experts(config: MoEConfig) -> None:
    """Raises FlashmoeError where the kernel does not take as many experts, or groups of them."""
    experts, groups = extension().MAX_EXPERTS, extension().MAX_GROUPS
    if config.experts > experts:
        raise FlashmoeError(
            f"{config.experts} experts: the GPU kernel takes {experts}",
            f"use --experts {experts} or less, or --world host",
            2,
        )
    if config.routing.groups > groups:
        raise FlashmoeError(
            f"{config.routing.groups} groups of experts: the GPU kernel takes {groups}",
            f"use a layer with {groups} groups or fewer, or --world host",
            2,
        )


def untuned(config: MoEConfig, tokens: int) -> Tiling:
    """The cut of tiles for up to ``tokens`` tokens of a rank, where no tuning says otherwise."""
    h_bytes = tokens * config.top_k * config.intermediate * 2
    most = extension().TILE_ROWS[config.dtype]
    return Tiling(most, waves=2 if h_bytes <= TWO_WAVES_BYTES else 4)


def tiling(config: MoEConfig, tokens: int) -> Tiling:
    """How the layer's tiles are cut on this machine: as tuned, or as ever.

    Raises FlashmoeError where the tuning table is damaged.
    """
    step = extension().TILE_ROWS_STEP[config.dtype]
    return tiling_of(config, ARCH, untuned(config, tokens), step)


def launch_shape(
    config: MoEConfig, ranks: int, chunks: int, max_tokens: int, cut: Tiling
) -> dict[str, Any]:
    """The fields of csrc/core/shape.h by name, for ``ranks`` ranks of ``chunks`` CTAs.

    ``pool_rows`` is 0: the layout says what the worst case is.
    """
    routing = config.routing
    owned = -(-config.experts // ranks)
    weight_rows: int = extension().TILE_WEIGHT_ROWS
    return {
        "world": ranks,
        "experts": config.experts,
        "top_k": config.top_k,
        "hidden": config.hidden,
        "inter": config.intermediate,
        "max_tokens": max_tokens,
        "pool_rows": 0,
        "chunks": chunks,
        "tile_m": cut.tile_rows,
        "tile_step": extension().TILE_ROWS_STEP[config.dtype],
        "tile_n1": weight_rows // 2 if config.gated else weight_rows,
        "tile_n2": weight_rows,
        "wave_experts": -(-owned // cut.waves),
        "activation": config.activation,
        "routing": routing.kind,
        "renormalize": routing.renormalize,
        "scale": routing.scale,
        "groups": routing.groups,
        "top_groups": routing.top_groups,
    }


def code(device: int, flavour: str, telling: str = "") -> Any:
    """The cubin of this flavour that fits GPU ``device``: :func:`kernels.load`, once for each."""
    return _loaded(device, flavour, telling)


@functools.cache  # its key tells an argument left out from the same one given: so by code() alone
def _loaded(device: int, flavour: str, telling: str) -> Any:
    return kernels.load(device, flavour, telling=telling)


@functools.cache
def code_place(device: int, entry: str) -> tuple[int, int]:
    """Address and bytes of an entry point's code on GPU ``device``; (0, 0) where it is not told."""
    size = kernels.code_bytes(device, entry)
    if size == 0:
        return 0, 0
    out = torch.zeros(1, dtype=torch.int64, device=torch.device("cuda", device))
    place = Kernel(out.device, places.PLACE, telling=entry)
    place.launch(1, 1, (out.data_ptr(),), (ctypes.c_uint64,))
    address = int(out.item())
    return (address, -(-size // LINE) * LINE) if address != 0 else (0, 0)


class Kernel:
    """One entry point of the cubin that fits GPU ``device``, ready to launch.

    Raises FlashmoeError (exit code 5) as :func:`flashmoe.kernels.load` does.
    """

    def __init__(
        self,
        device: torch.device,
        name: str,
        shared_bytes: int = 0,
        flavour: str = "p2p",
        telling: str = "",
    ) -> None:
        from cuda.bindings import driver

        self.device = device
        self.shared_bytes = shared_bytes
        self.code = 0, 0  # address and bytes, where they are known
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes torch's context the current one
            kernel = code(device.index, flavour, telling).get_kernel(name)
            self.function = check(driver.cuKernelGetFunction(kernel.handle), "finding the kernel")
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(
                driver.cuFuncSetAttribute(self.function, attribute, shared_bytes),
                "sizing the kernel",
            )

    @classmethod
    def moe(
        cls, device: torch.device, config: MoEConfig, traced: bool, flavour: str = "p2p"
    ) -> Kernel:
        """The forward of a layer: see :meth:`launch_moe`."""
        kind = "gated" if config.gated else "plain"
        how = "traced" if traced else "untraced"
        name = f"moe_{config.dtype}_{kind}_{how}"
        # NVSHMEM initialises the one module that the engine has loaded.
        telling = name if flavour == "p2p" else ""
        moe = cls(device, name, extension().SHARED_BYTES, flavour, telling)
        if telling:
            moe.code = code_place(device.index, name)
        return moe

    def launch_moe(self, ranks: int, chunks: int, args: ctypes.Array[ctypes.c_char]) -> None:
        """One launch of ``ranks`` ranks of ``chunks`` CTAs on torch's current stream; no wait.

        ``args``: a LaunchArgs of csrc/core/args.h but for its first two words, where the code lies.
        """
        from cuda.bindings import driver

        config = driver.CUlaunchConfig()
        config.gridDimX = ranks * chunks
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        config.blockDimX = extension().THREADS
        config.sharedMemBytes = self.shared_bytes
        config.hStream = torch.cuda.current_stream(self.device).cuda_stream
        # Cooperative: the driver refuses a grid that is not resident as a whole.
        cooperative = driver.CUlaunchAttribute()
        cooperative.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        cooperative.value.cooperative = 1
        cluster = driver.CUlaunchAttribute()
        cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        (cluster.value.clusterDim.x,) = struct.unpack_from("<I", args, extension().PAIR_SIZE_AT)
        cluster.value.clusterDim.y = cluster.value.clusterDim.z = 1
        config.attrs = [cooperative, cluster]
        config.numAttrs = 2
        struct.pack_into("<QQ", args, 0, *self.code)
        # The driver copies the arguments before it returns.
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        check(
            driver.cuLaunchKernelEx(config, self.function, ctypes.addressof(pointers), 0),
            "launching the kernel",
        )

    def launch(self, blocks: int, threads: int, values: tuple[int, ...], types: Any) -> None:
        """One plain launch on torch's current stream; ``types``: a ctypes type for each value."""
        from cuda.bindings import driver

        stream = torch.cuda.current_stream(self.device).cuda_stream
        grid, block = (blocks, 1, 1), (threads, 1, 1)
        with torch.cuda.device(self.device):
            launched = driver.cuLaunchKernel(
                self.function, *grid, *block, self.shared_bytes, stream, (values, types), 0
            )
        check(launched, "launching a kernel")

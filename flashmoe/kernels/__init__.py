"""Find, check and load the cubin that fits a GPU.

Importing this package needs no driver; ``load`` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashmoe.build_info import BuildInfo, Cubin, build_info
from flashmoe.errors import EXIT_NO_GPU, FlashmoeError
from flashmoe.kernels import places

if TYPE_CHECKING:
    from cuda.core import ObjectCode

#: CUDA's API version that a driver of release 580, the oldest we support, answers with.
MIN_DRIVER_API = 13000

_USE_HOST = "run with --world host, which needs no GPU"


def find(
    compute_capability: tuple[int, int],
    flavour: str = "p2p",
    kernel: str = "moe",
    info: BuildInfo | None = None,
) -> Cubin:
    """The cubin of ``info`` (None: this installation) for a GPU of ``compute_capability``.

    An architecture with the suffix ``a`` runs on exactly its own capability, so nothing newer is
    tried on an older file.  Raises FlashmoeError (exit code 5) that says what is missing.
    """
    info = info or build_info()
    if not info.cubins:
        raise FlashmoeError(
            f"this build of flashmoe holds no GPU kernel: {info.why_no_cubins}",
            f"reinstall it with CUDA 13's nvcc or without FLASHMOE_SKIP_CUDA; or {_USE_HOST}",
            EXIT_NO_GPU,
        )
    flavoured = [c for c in info.cubins if (c.flavour, c.kernel) == (flavour, kernel)]
    if not flavoured:
        held = ", ".join(sorted({f"{c.kernel} {c.flavour}" for c in info.cubins}))
        raise FlashmoeError(
            f"this build of flashmoe holds no {flavour} flavour of the kernel {kernel!r}: {held}",
            f"reinstall flashmoe; or {_USE_HOST}",
            EXIT_NO_GPU,
        )
    for cubin in flavoured:
        if cubin.compute_capability == compute_capability:
            return cubin
    ours = ", ".join(c.arch for c in flavoured)
    major, minor = compute_capability
    raise FlashmoeError(
        f"this GPU has compute capability {major}.{minor}, and flashmoe holds kernels for {ours}",
        f"choose a Hopper GPU (H100, H200, GH200) with --device; or {_USE_HOST}",
        EXIT_NO_GPU,
    )


def driver_api_version() -> int:
    """CUDA's API version of the installed driver (13000 for CUDA 13.0).

    Raises FlashmoeError (exit code 5) where no driver can be asked.
    """
    try:
        from cuda.bindings import driver
    except ImportError as exc:
        raise FlashmoeError(
            "the Python packages that reach the CUDA driver are not installed",
            f"pip install 'cuda-core>=1,<2' 'cuda-bindings>=13,<14'; or {_USE_HOST}",
            EXIT_NO_GPU,
        ) from exc
    try:
        error, version = driver.cuDriverGetVersion()
    except RuntimeError as exc:  # libcuda.so is not there
        raise FlashmoeError(
            "no NVIDIA driver is installed",
            f"install NVIDIA's driver 580 or newer; or {_USE_HOST}",
            EXIT_NO_GPU,
        ) from exc
    if int(error) != 0:
        raise FlashmoeError(
            f"the NVIDIA driver does not answer ({error.name})",
            f"see what nvidia-smi says; or {_USE_HOST}",
            EXIT_NO_GPU,
        )
    return int(version)


def check_driver(api_version: int) -> None:
    """Raises FlashmoeError (exit code 5) where a driver of this API version is too old."""
    if api_version < MIN_DRIVER_API:
        raise FlashmoeError(
            f"the NVIDIA driver here speaks CUDA {api_version // 1000}.{api_version % 1000 // 10}, "
            "and flashmoe's kernels need CUDA 13.0",
            f"install NVIDIA's driver 580 or newer; or {_USE_HOST}",
            EXIT_NO_GPU,
        )


def select(device: int = 0, flavour: str = "p2p", kernel: str = "moe") -> Cubin:
    """The cubin that runs on GPU ``device``, with everything checked but nothing loaded.

    Raises FlashmoeError (exit code 5): no driver, one too old, no such GPU, one of another
    architecture, or a build without kernels.
    """
    check_driver(driver_api_version())
    from cuda.bindings import driver

    (error,) = driver.cuInit(0)
    if int(error) != 0:
        raise FlashmoeError(
            f"the NVIDIA driver finds no usable GPU ({error.name})",
            f"see what nvidia-smi and CUDA_VISIBLE_DEVICES say; or {_USE_HOST}",
            EXIT_NO_GPU,
        )
    _, count = driver.cuDeviceGetCount()
    if not 0 <= device < count:
        raise FlashmoeError(
            f"there is no GPU {device}: the driver shows {count}",
            f"choose --device 0 to {count - 1}" if count else _USE_HOST,
            EXIT_NO_GPU,
        )
    from cuda.core import Device

    capability = Device(device).compute_capability
    cubin = find((capability.major, capability.minor), flavour, kernel)
    if not cubin.path.is_file():
        raise FlashmoeError(
            f"this installation has lost its kernel {cubin.file}", "reinstall flashmoe", EXIT_NO_GPU
        )
    return cubin


def load(
    device: int = 0, flavour: str = "p2p", kernel: str = "moe", telling: str = ""
) -> ObjectCode:
    """The kernel file for GPU ``device`` as cuda.core's ObjectCode; ``get_kernel(name)`` loads.

    Its :data:`places.PLACE` tells where entry point ``telling`` lies.  Raises as :func:`select`
    does.
    """
    cubin = select(device, flavour, kernel)
    from cuda.core import ObjectCode

    binary = cubin.path.read_bytes()
    if telling:
        binary, _ = places.telling(binary, telling)
    return ObjectCode.from_cubin(binary, name=cubin.file)


def code_bytes(device: int, entry: str) -> int:
    """Bytes of the code of an entry point, if :func:`load` can make the cubin tell where it lies.

    Else 0.  Raises as :func:`select` does.
    """
    return places.telling(select(device).path.read_bytes(), entry)[1]

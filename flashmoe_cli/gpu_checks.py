"""What ``flashmoe doctor`` looks at where several GPUs, or several processes on one, are to work
together: P2P, NVLink, MPS, MIG, NVSHMEM, and whether a launch can be resident as a whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flashmoe.gpu import ask, handle_of, nvml_session, visible_handles
from flashmoe.nvlink import Reach, links, p2p_matrix
from flashmoe_cli.checks import Check


def p2p() -> Check | None:
    """The matrix of who reaches whom; None with fewer than two GPUs."""
    matrix = p2p_matrix()
    if matrix is None or len(matrix) < 2:
        return None
    rows = [" ".join(_sign(reach) for reach in row) for row in matrix]
    found = f"{len(matrix)} GPUs, row to column: {' | '.join(rows)} (N NVLink, P PCIe, - none"
    found += "; a: without atomic adds)" if "a" in "".join(rows) else ")"
    reaches = [reach for row in matrix for reach in row if reach is not None]
    if not all(reach.pointer for reach in reaches):
        return Check(
            "P2P", "warn", found,
            "GPUs that no pointer joins use put-with-signal (--transport nvshmem); see whether "
            "IOMMU or ACS is on, and nvidia-smi topo -p2p r",
        )  # fmt: skip
    if not all(reach.atomics for reach in reaches):
        return Check(
            "P2P", "warn", found,
            "ranks count rows at each other by atomic adds: GPUs without them use put-with-signal "
            "(--transport nvshmem); nvidia-smi topo -p2p a",
        )  # fmt: skip
    if not all(reach.nvlink for reach in reaches):
        return Check("P2P", "warn", found, "rates between GPUs on PCIe are those of PCIe")
    return Check("P2P", "ok", found)


def _sign(reach: Reach | None) -> str:
    if reach is None:
        return "."
    if not reach.pointer:
        return "-"
    return ("N" if reach.nvlink else "P") + ("" if reach.atomics else "a")


def nvlink(device: int) -> Check | None:
    """The links of a GPU and their state; None where it has none."""
    found = links(device)
    if not found:
        return None
    up = [link for link in found if link.up]
    versions = sorted({link.version for link in up if link.version is not None})
    version = f", version {', '.join(map(str, versions))}" if versions else ""
    text = f"{len(up)} of {len(found)} links up{version}"
    if len(up) == len(found):
        return Check("NVLink", "ok", text)
    down = ", ".join(str(link.number) for link in found if not link.up)
    return Check(
        "NVLink", "warn", f"{text}; down: {down}",
        "nvidia-smi nvlink --status; on a node with NVSwitch: is nvidia-fabricmanager running?",
    )  # fmt: skip


def mps(device: int) -> Check | None:
    """Whether a CUDA MPS server is in the way, or a GPU refuses a second process."""
    pipe = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    share = os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")
    mode = _ask_device(device, "nvmlDeviceGetComputeMode")
    if mode is None:
        return None
    if share is not None and share != "100":
        return Check(
            "MPS", "warn", f"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE={share}: kernels get few SMs",
            "unset it; --ranks-per-gpu sets the share of its own ranks",
        )  # fmt: skip
    if mode == "prohibited":
        return Check("MPS", "fail", "the GPU's compute mode is prohibited",
                     f"nvidia-smi -i {device} -c DEFAULT")  # fmt: skip
    if (pipe / "control").exists():
        return Check(
            "MPS", "warn", f"a control daemon's pipe is in {pipe}",
            "--ranks-per-gpu starts a private one; for times of one process alone end that one: "
            "echo quit | nvidia-cuda-mps-control",
        )  # fmt: skip
    if mode == "exclusive":
        return Check(
            "MPS", "warn", "the GPU's compute mode is exclusive: one process at a time",
            f"for several ranks on it: nvidia-smi -i {device} -c DEFAULT",
        )  # fmt: skip
    from flashmoe.errors import FlashmoeError
    from flashmoe.world.mps import find_control

    try:
        control = find_control()
    except FlashmoeError as exc:
        return Check("MPS", "warn", exc.message, exc.hint)
    return Check("MPS", "ok", f"none runs; --ranks-per-gpu starts {control}")


def mig(device: int) -> Check | None:
    """Whether the GPU is cut in parts; None where it cannot be."""
    mode = _ask_device(device, "nvmlDeviceGetMigMode")
    if mode is None:
        return None
    current, pending = mode
    if current:
        return Check(
            "MIG", "warn", "on: a part of the GPU has a part of its SMs, and no P2P",
            f"for the whole GPU: nvidia-smi -i {device} -mig 0",
        )  # fmt: skip
    if pending:
        return Check("MIG", "warn", "off, and on after the next reset", "nvidia-smi -mig 0")
    return Check("MIG", "ok", "off")


def _ask_device(device: int, question: str) -> Any:
    """NVML's answer for a GPU, a compute mode by name; None where there is none."""
    try:
        with nvml_session() as nvml:
            handle = handle_of(nvml, device)
            if handle is None:
                return None
            said = ask(nvml, getattr(nvml, question), handle)
            if question == "nvmlDeviceGetComputeMode" and said is not None:
                names = {
                    nvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS: "exclusive",
                    nvml.NVML_COMPUTEMODE_EXCLUSIVE_THREAD: "exclusive",
                    nvml.NVML_COMPUTEMODE_PROHIBITED: "prohibited",
                }
                return names.get(said, "default")
            return said
    except RuntimeError:
        return None


def nvshmem() -> Check | None:
    """NVSHMEM's version against the cubins'; None on a machine without a GPU."""
    from flashmoe.build_info import build_info
    from flashmoe.world.nvshmem import BINDINGS, EXTRA, LIBRARY, installed, refusal

    if not _gpus():
        return None
    info = build_info()
    library, bindings = installed(LIBRARY), installed(BINDINGS)
    have = f" ({LIBRARY} {library} is installed)" if library else ""
    if "nvshmem" not in info.flavours:
        return Check(
            "NVSHMEM", "ok", f"this build holds no cubin for it{have}; GPUs of one node need none"
        )
    refused = refusal(info)
    if refused is None:
        return Check(
            "NVSHMEM", "ok",
            f"{library}, bindings {bindings}; the cubins are compiled with {info.nvshmem}",
        )  # fmt: skip
    if library is None or bindings is None:
        return Check(
            "NVSHMEM", "warn",
            f"not all there ({LIBRARY}: {library or 'no'}, {BINDINGS}: {bindings or 'no'}); the "
            f"cubins are compiled with {info.nvshmem}",
            f"for several nodes, or GPUs without P2P: {EXTRA}",
        )  # fmt: skip
    return Check("NVSHMEM", "fail", refused.message, refused.hint)


def _gpus() -> int:
    try:
        with nvml_session() as nvml:
            return len(visible_handles(nvml))
    except RuntimeError:
        return 0


def residency(device: int) -> Check | None:
    """Whether all CTAs of a launch can be resident together, as its waits need."""
    from flashmoe.errors import FlashmoeError
    from flashmoe.kernels import select

    try:
        select(device)
    except FlashmoeError:
        return None  # the check of the GPU says why
    from cuda.bindings import driver

    attribute = driver.CUdevice_attribute
    _, handle = driver.cuDeviceGet(device)
    error, able = driver.cuDeviceGetAttribute(
        attribute.CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH, handle
    )
    _, sms = driver.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, handle)
    if int(error) != 0 or not able:
        return Check(
            "co-residency", "fail", "this GPU or driver has no cooperative launch",
            "the kernel is launched with all CTAs resident or not at all: use another GPU",
        )  # fmt: skip
    return Check("co-residency", "ok", f"cooperative launch, one CTA on each of {sms} SMs")

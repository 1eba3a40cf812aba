"""What NVML says of the GPUs here.  Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flashmoe.digits import whole_number


@contextmanager
def nvml_session() -> Iterator[Any]:
    """The module ``pynvml``, initialised; raises RuntimeError where there is none to ask."""
    try:
        import pynvml
    except ImportError as exc:
        raise RuntimeError("nvidia-ml-py is not installed") from exc
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as exc:
        raise RuntimeError(f"no NVIDIA driver answers ({exc})") from exc
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def ask(nvml: Any, call: Any, *args: Any) -> Any:
    """The answer to one NVML question, or None where this GPU or driver gives none."""
    try:
        answer = call(*args)
    except nvml.NVMLError:
        return None
    return answer.decode() if isinstance(answer, bytes) else answer


def _throttle_reasons(nvml: Any, handle: Any) -> list[str]:
    """The reasons that hold the clocks down now, in words; empty where nothing does."""
    get = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None) or getattr(
        nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", None
    )
    bits = ask(nvml, get, handle) if get else None
    names = {
        0x2: "applications clocks setting",
        0x4: "software power cap",
        0x8: "hardware slowdown",
        0x10: "sync boost",
        0x20: "software thermal slowdown",
        0x40: "hardware thermal slowdown",
        0x80: "hardware power brake",
        0x100: "display clock setting",
    }
    return [name for bit, name in names.items() if bits and bits & bit]


def handle_of(nvml: Any, device: int) -> Any:
    """NVML's handle of what CUDA calls GPU ``device``, or None: CUDA_VISIBLE_DEVICES renumbers."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    name = str(device)
    if visible is not None:
        names = [n.strip() for n in visible.split(",") if n.strip()]
        if device >= len(names):
            return None
        name = names[device]
    number = whole_number(name)
    if number is not None:
        return ask(nvml, nvml.nvmlDeviceGetHandleByIndex, number)
    return ask(nvml, nvml.nvmlDeviceGetHandleByUUID, name)


def visible_handles(nvml: Any) -> list[Any]:
    """NVML's handles of the GPUs that CUDA shows, in CUDA's order."""
    count = ask(nvml, nvml.nvmlDeviceGetCount) or 0
    found = [handle_of(nvml, device) for device in range(count)]
    return [handle for handle in found if handle is not None]


def snapshot(device: int = 0) -> dict[str, Any] | None:
    """What NVML says of GPU ``device`` now: clocks MHz, power W, temperature C, memory bytes.

    None where NVML does not answer; a single figure that it does not give is None.
    """
    try:
        with nvml_session() as nvml:
            count = nvml.nvmlDeviceGetCount()
            handle = handle_of(nvml, device)
            if handle is None:
                return None
            memory = ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
            cc = ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle)
            power = ask(nvml, nvml.nvmlDeviceGetPowerUsage, handle)
            limit = ask(nvml, nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
            clock = nvml.nvmlDeviceGetClockInfo
            return {
                "index": device,
                "count": count,
                "name": ask(nvml, nvml.nvmlDeviceGetName, handle),
                "uuid": ask(nvml, nvml.nvmlDeviceGetUUID, handle),
                "driver": ask(nvml, nvml.nvmlSystemGetDriverVersion),
                "cc": f"{cc[0]}.{cc[1]}" if cc else None,
                "sm_clock_mhz": ask(nvml, clock, handle, nvml.NVML_CLOCK_SM),
                "memory_clock_mhz": ask(nvml, clock, handle, nvml.NVML_CLOCK_MEM),
                "max_sm_clock_mhz": ask(
                    nvml, nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM
                ),
                "power_w": None if power is None else power / 1000,
                "power_limit_w": None if limit is None else limit / 1000,
                "temperature_c": ask(
                    nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU
                ),
                "memory_total": memory.total if memory else None,
                "memory_free": memory.free if memory else None,
                "throttle": _throttle_reasons(nvml, handle),
            }
    except RuntimeError:
        return None

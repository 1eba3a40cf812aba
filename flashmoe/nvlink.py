"""NVLink as NVML counts it: bytes that went over all links of a GPU, and the links' state.

The counters are of the whole GPU, by whoever sends, and step by a KiB; so they are read around
enough launches to rise well above a step, and shown beside what the trace counted, never in its
place.  Who reads them around launches is ``flashmoe.world.links``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from flashmoe.gpu import ask, handle_of, nvml_session

STEP_BYTES = 1024
"""What one step of a counter stands for."""

ENOUGH_BYTES = 1000 * STEP_BYTES
"""A difference of so many is certain to a tenth of a per cent."""

SETTLE_S = 0.05
"""Two readings so far apart that agree tell that nothing moves any more."""

MOST_READINGS = 10

_ALL_LINKS = 0xFFFFFFFF  # NVML's scope for the sum over a GPU's links


class NoCountersError(Exception):
    """This GPU or driver gives no counters; the text says why, in a few words."""


@dataclass(frozen=True)
class Counters:
    """Bytes since the driver was loaded, sent and received: ``data`` of payloads, ``raw`` with
    headers and all else that the links carry."""

    data_tx: int
    data_rx: int
    raw_tx: int
    raw_rx: int

    def since(self, before: Counters) -> Counters:
        """What was added."""
        return Counters(*(getattr(self, n) - getattr(before, n) for n in asdict(self)))


def read_counters(device: int = 0) -> tuple[Counters, bool]:
    """The counters of GPU ``device`` once nothing moves, and whether that was so.

    False where two readings in a row still differed in their data after half a second: somebody
    else uses the links.  Raises NoCountersError where NVML does not answer, or not this question.
    """
    try:
        with nvml_session() as nvml:
            handle = handle_of(nvml, device)
            if handle is None:
                raise NoCountersError(f"NVML shows no GPU {device}")
            last = _read(nvml, handle)
            for _ in range(MOST_READINGS):
                time.sleep(SETTLE_S)
                now = _read(nvml, handle)
                if (now.data_tx, now.data_rx) == (last.data_tx, last.data_rx):
                    return now, True
                last = now
            return last, False
    except RuntimeError as exc:
        raise NoCountersError(str(exc)) from exc


def _read(nvml: Any, handle: Any) -> Counters:
    try:
        fields = [
            nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX,
            nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX,
            nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_RAW_TX,
            nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_RAW_RX,
        ]
        get = nvml.nvmlDeviceGetFieldValues
    except AttributeError as exc:
        raise NoCountersError("this nvidia-ml-py does not know them") from exc
    try:
        values = get(handle, [(field, _ALL_LINKS) for field in fields])
        for value in values:
            if value.nvmlReturn != nvml.NVML_SUCCESS:
                raise nvml.NVMLError(value.nvmlReturn)
    except nvml.NVMLError as exc:
        raise NoCountersError(str(exc)) from exc
    return Counters(*(int(value.value.ullVal) * STEP_BYTES for value in values))


@dataclass(frozen=True)
class Link:
    """One NVLink of a GPU: whether it is up, and its version (5: Blackwell, 4: Hopper)."""

    number: int
    up: bool
    version: int | None


def links(device: int = 0) -> list[Link] | None:
    """The links that GPU ``device`` has; empty for a GPU without, None without NVML."""
    try:
        with nvml_session() as nvml:
            handle = handle_of(nvml, device)
            if handle is None:
                return None
            found = []
            for number in range(nvml.NVML_NVLINK_MAX_LINKS):
                state = ask(nvml, nvml.nvmlDeviceGetNvLinkState, handle, number)
                if state is not None:
                    version = ask(nvml, nvml.nvmlDeviceGetNvLinkVersion, handle, number)
                    found.append(Link(number, bool(state), version))
            return found
    except RuntimeError:
        return None


@dataclass(frozen=True)
class Reach:
    """How one GPU reaches another: by pointer at all, over NVLink, and with adds that are atomic
    there (where NVML does not say, they are taken to be)."""

    pointer: bool
    nvlink: bool
    atomics: bool = True


def p2p_matrix() -> list[list[Reach | None]] | None:
    """[n][n]: how each GPU that CUDA would show reaches each other; None on the diagonal.

    None as a whole without NVML.
    """
    from flashmoe.gpu import visible_handles

    try:
        with nvml_session() as nvml:
            handles = visible_handles(nvml)

            def status(a: Any, b: Any, index: Any, unknown: bool = False) -> bool:
                # Some versions of pynvml hold this constant as a tuple of one.
                index = index[0] if isinstance(index, tuple) else index
                said = ask(nvml, nvml.nvmlDeviceGetP2PStatus, a, b, index)
                return unknown if said is None else bool(said == nvml.NVML_P2P_STATUS_OK)

            return [
                [
                    None
                    if i == j
                    else Reach(
                        status(a, b, nvml.NVML_P2P_CAPS_INDEX_READ)
                        and status(a, b, nvml.NVML_P2P_CAPS_INDEX_WRITE),
                        status(a, b, nvml.NVML_P2P_CAPS_INDEX_NVLINK),
                        status(a, b, nvml.NVML_P2P_CAPS_INDEX_ATOMICS, unknown=True),
                    )
                    for j, b in enumerate(handles)
                ]
                for i, a in enumerate(handles)
            ]
    except RuntimeError:
        return None


def unreached(gpus: int | None = None) -> tuple[int, int] | None:
    """Two of the first ``gpus`` GPUs (None: of all) of which one reaches the other by no pointer.

    None where all reach each other, as far as NVML tells.
    """
    return _first_pair(gpus, lambda reach: not reach.pointer)


def without_atomics(gpus: int | None = None) -> tuple[int, int] | None:
    """As :func:`unreached`, of which one reaches the other, but its adds are not atomic there."""
    return _first_pair(gpus, lambda reach: reach.pointer and not reach.atomics)


def _first_pair(gpus: int | None, wanted: Callable[[Reach], bool]) -> tuple[int, int] | None:
    for i, row in enumerate((p2p_matrix() or [])[:gpus]):
        for j, reach in enumerate(row[:gpus]):
            if reach is not None and wanted(reach):
                return i, j
    return None

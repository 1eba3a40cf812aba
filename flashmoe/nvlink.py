"""NVLink as NVML counts it: bytes that went over all links of a GPU, and the links' state.

The counters are of the whole GPU, by whoever sends, and step by a KiB; so they are read around
enough launches to rise well above a step, and shown beside what the trace counted, never in its
place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from flashmoe.gpu import ask, handle_of, nvml_session

STEP_BYTES = 1024
"""What one step of a counter stands for."""

ENOUGH_STEPS = 1000
"""A difference of so many steps is certain to a tenth of a per cent."""

_ALL_LINKS = 0xFFFFFFFF  # NVML's scope for the sum over a GPU's links


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


def read_counters(device: int = 0) -> Counters | None:
    """The counters of GPU ``device``; None where NVML does not answer or this GPU has none."""
    try:
        with nvml_session() as nvml:
            handle = handle_of(nvml, device)
            return None if handle is None else _read(nvml, handle)
    except RuntimeError:
        return None


def _read(nvml: Any, handle: Any) -> Counters | None:
    fields = [
        nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX,
        nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX,
        nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_RAW_TX,
        nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_RAW_RX,
    ]
    wanted = [(field, _ALL_LINKS) for field in fields]
    values = ask(nvml, nvml.nvmlDeviceGetFieldValues, handle, wanted)
    if values is None or any(value.nvmlReturn != nvml.NVML_SUCCESS for value in values):
        return None
    return Counters(*(int(value.value.ullVal) * STEP_BYTES for value in values))


@dataclass(frozen=True)
class Measured:
    """Bytes over NVLink while ``launches`` ran; ``certain``: far above the counters' step."""

    launches: int
    bytes: Counters
    certain: bool


def measure(
    run: Callable[[], None], device: int = 0, most: int = 1024, payload_bytes: int = 0
) -> Measured | None:
    """Runs launches until the counters of ``device`` have risen by ``ENOUGH_STEPS``.

    ``run`` does one launch and waits for it.  ``payload_bytes``, what a launch is known to send and
    receive, decides how many are run before the counters are read again; 0: one, then twice as
    many, and so on.  Gives up counting as certain after ``most``.  None without counters.
    """
    before = read_counters(device)
    if before is None:
        return None
    enough = ENOUGH_STEPS * STEP_BYTES
    done, batch = 0, max(1, -(-enough // payload_bytes)) if payload_bytes else 1
    while True:
        batch = min(batch, most - done)
        for _ in range(batch):
            run()
        done += batch
        after = read_counters(device)
        if after is None:
            return None
        moved = after.since(before)
        certain = min(moved.data_tx, moved.data_rx) >= enough
        if certain or done >= most:
            return Measured(done, moved, certain)
        batch = done


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
    """How one GPU reaches another: by pointer at all, and over NVLink."""

    pointer: bool
    nvlink: bool


def p2p_matrix() -> list[list[Reach | None]] | None:
    """[n][n]: how each GPU that CUDA would show reaches each other; None on the diagonal.

    None as a whole without NVML.
    """
    from flashmoe.gpu import visible_handles

    try:
        with nvml_session() as nvml:
            handles = visible_handles(nvml)

            def status(a: Any, b: Any, index: Any) -> bool:
                # Some versions of pynvml hold this constant as a tuple of one.
                index = index[0] if isinstance(index, tuple) else index
                said = ask(nvml, nvml.nvmlDeviceGetP2PStatus, a, b, index)
                return bool(said == nvml.NVML_P2P_STATUS_OK)

            return [
                [
                    None
                    if i == j
                    else Reach(
                        status(a, b, nvml.NVML_P2P_CAPS_INDEX_READ)
                        and status(a, b, nvml.NVML_P2P_CAPS_INDEX_WRITE),
                        status(a, b, nvml.NVML_P2P_CAPS_INDEX_NVLINK),
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
    for i, row in enumerate((p2p_matrix() or [])[:gpus]):
        for j, reach in enumerate(row[:gpus]):
            if reach is not None and not reach.pointer:
                return i, j
    return None

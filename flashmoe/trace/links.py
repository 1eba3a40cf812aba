"""NVLink's bytes a launch, by the GPUs' counters, beside the payload that had to cross."""

from __future__ import annotations

from typing import Any

WAYS = ("tx", "rx")  # sent, received


def link_figures(said: dict[str, Any] | None) -> dict[str, Any] | None:
    """``nvlink`` of run.json as figures of one launch, a GPU an entry; None where nobody counted.

    ``gpus``: their ``ranks``, payload int bytes a launch to and from other GPUs of the node, and
    where there are counters ``data`` and ``raw``, mean bytes a launch, each also over the payload
    (``data_over_payload``, None without any).  ``total`` adds up what the GPUs with counters sent.
    ``why`` says why the others have none.
    """
    if said is None:
        return None
    by_gpu: dict[Any, list[dict[str, Any]]] = {}
    for entry in said["ranks"]:
        by_gpu.setdefault(entry["gpu"], []).append(entry)
    gpus = [_of_gpu(entries, said["launches"]) for entries in by_gpu.values()]
    counted = [gpu for gpu in gpus if gpu["data_tx"] is not None]
    total = None
    if counted:
        sums = {name: sum(gpu[f"{name}_tx"] for gpu in counted) for name in _NAMES}
        total = sums | _over(sums["payload"], sums["data"], sums["raw"], "")
    return {
        "launches": said["launches"],
        "certain": bool(counted) and all(gpu["certain"] for gpu in counted),
        "why": "; ".join(dict.fromkeys(e["why"] for e in said["ranks"] if e["why"])),
        "gpus": gpus,
        "total": total,
    }


_NAMES = ("payload", "data", "raw")


def _of_gpu(entries: list[dict[str, Any]], launches: int) -> dict[str, Any]:
    """The figures of one GPU, which each of its ranks has counted as a whole."""
    counted = [entry for entry in entries if entry.get("counters") is not None]
    entry = (counted or entries)[0]
    out: dict[str, Any] = {
        "gpu": entry["gpu"],
        "ranks": [e["rank"] for e in entries],
        "certain": entry["certain"],
    }
    for way in WAYS:
        payload = entry[f"payload_{way}"]
        data, raw = (
            entry["counters"][f"{name}_{way}"] / launches if counted else None
            for name in ("data", "raw")
        )
        out |= {f"payload_{way}": payload, f"data_{way}": data, f"raw_{way}": raw}
        out |= _over(payload, data, raw, f"_{way}")
    return out


def _over(payload: int, data: float | None, raw: float | None, way: str) -> dict[str, Any]:
    return {
        f"data_over_payload{way}": _ratio(data, payload),
        f"raw_over_payload{way}": _ratio(raw, payload),
    }


def _ratio(counted: float | None, payload: int) -> float | None:
    return None if counted is None or payload == 0 else counted / payload

"""A run's metadata as a person reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashmoe.trace.links import link_figures
from flashmoe.trace.schema import LANE_NAME, Lane
from flashmoe_cli.output import Terminal
from flashmoe_cli.render.figures import clock_lines
from flashmoe_cli.render.links import link_text
from flashmoe_cli.render.result import (
    check_text,
    device_text,
    processes_text,
    shape_text,
    time_text,
    where_text,
)
from flashmoe_cli.render.text import bytes_text, clip, count_text, fit, paint, plural, table

#: Where the values begin, in columns.
_INDENT = 13


def title(path: Path, meta: dict[str, Any]) -> str:
    """The run's name, what it ran, and where."""
    world, config = meta["world"], meta["config"]
    gpu = (meta.get("device") or {}).get("name")
    name = config.get("name") or config.get("preset") or "custom"
    return f"{path.name}: {name} on " + where_text(
        world["kind"], world["ranks"], world["sms_per_rank"], gpu, bool(world.get("processes"))
    )


def info_lines(
    path: Path, meta: dict[str, Any], where: Terminal, *, verbose: bool = False
) -> list[str]:
    """Every field of run.json that a person asks about, one line each."""
    world, tool, rings = meta["world"], meta.get("tool") or {}, meta["rings"]
    status = meta.get("status") or {"code": None, "message": "unknown"}
    fields = [
        ("created", meta.get("created")),
        ("command", meta.get("command")),
        ("flashmoe", _tool(tool)),
        ("shape", shape_text(meta["config"], world["tokens"])),
        ("seed", f"{meta['config'].get('seed')}, skew {meta['config'].get('skew')}"),
        ("checkpoint", _checkpoint(meta["config"])),
        ("no GPU", world.get("why")),
        ("experts", _experts(world["experts_of_rank"])),
        ("device", device_text(meta["device"]) if meta.get("device") else None),
        ("clock", _clock(meta.get("clock"), world["kind"])),
        ("clocks", " ".join(clock_lines(meta.get("clock") or {}, where))),
        ("ranks", _processes(world.get("processes"))),
        ("launches", f"{meta.get('iterations')} after {meta.get('warmup')} of warm-up"),
        ("NVLink", _links(meta.get("nvlink"))),
        ("time", _time(world["kind"], meta)),
        ("rings", _rings(rings)),
        ("files", _files(path)),
        ("check", check_text(meta.get("check"))),
        ("hang", (meta.get("hang") or {}).get("reason")),
        ("status", f"{status['message']} (exit code {status['code']})"),
    ]
    if meta.get("shared_expert") or meta["config"].get("shared_expert"):
        fields.append(("note", "the shared expert is added by torch, outside the kernel"))
    lines = [paint(clip(title(path, meta), where.width), "1", where.colour)]
    for name, value in fields:
        if value:
            lines += fit(f"  {name:<10} {value}", where.width, _INDENT)
    if verbose:
        lines += ["", *_ring_table(rings["per_ring"], where)]
    return lines


def _processes(said: dict[str, Any] | None) -> str | None:
    if said is None:
        return None
    lost = [f"rank {p['rank']} {p['message']}" for p in said["ranks"]
            if p["message"] not in ("ok", "stopped")]  # fmt: skip
    return "; ".join([processes_text(said), *lost])


def _tool(tool: dict[str, Any]) -> str:
    commit = (tool.get("commit") or "unknown")[:12]
    return f"{tool.get('version')} ({commit}{'+dirty' if tool.get('dirty') else ''})"


def _checkpoint(config: dict[str, Any]) -> str | None:
    if not config.get("checkpoint"):
        return None
    return f"{config['checkpoint']}, layer {config.get('layer')}"


def _experts(owned: list[list[int]]) -> str:
    shown = [f"{a}-{b - 1}" if b > a else "none" for a, b in owned[:8]]
    more = ", ..." if len(owned) > 8 else ""
    return f"{', '.join(shown)}{more} (by rank)"


def _clock(clock: dict[str, Any] | None, world: str) -> str | None:
    if clock is None:
        return None
    counter = "cycle counter" if world == "host" else "SM clock"
    sm = f", {counter} {clock['sm_mhz']:.0f} MHz" if clock.get("sm_mhz") else ""
    return (
        f"{clock['source']}, step {clock['step_ns']:.0f} ns, "
        f"a record costs {clock['record_cost_ns']:.0f} ns{sm}"
    )


def _time(world: str, meta: dict[str, Any]) -> str | None:
    times = (meta.get("timing") or {}).get("launch_ms")
    return time_text(world, times) if times else None


def _links(said: dict[str, Any] | None) -> str | None:
    figures = link_figures(said)
    return None if figures is None else link_text(figures)


def _rings(rings: dict[str, Any]) -> str:
    drops = f"{count_text(rings['dropped'])} dropped" if rings["dropped"] else "none dropped"
    return (
        f"{plural(rings['n'], 'ring')} of {count_text(rings['capacity'])} records "
        f"({rings.get('mode')}), {count_text(rings['records'])} records, {drops}"
    )


def _files(path: Path) -> str:
    return ", ".join(
        f"{p.name} {bytes_text(p.stat().st_size)}" for p in sorted(path.iterdir()) if p.is_file()
    )


def _ring_table(rings: list[dict[str, Any]], where: Terminal) -> list[str]:
    rows = []
    for ring in rings:
        name = LANE_NAME[Lane(ring["lane"])]
        numbers = (ring["rank"], ring["sm"], ring["cta"])
        state = "" if ring.get("began", True) else "never began"
        sizes = (count_text(ring["count"]), count_text(ring["dropped"]))
        rows.append((*map(str, numbers), name, *sizes, state))
    head = ("rank", "sm", "cta", "lane", "records", "dropped", "")
    return table(head, rows, (True, True, True, False, True, True, False), where.width, "  ")

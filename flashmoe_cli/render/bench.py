"""The tables of a bench."""

from __future__ import annotations

from textwrap import wrap
from typing import Any

from flashmoe_cli.output import Terminal
from flashmoe_cli.render.text import clip, paint, percent, table

_NONE = "-"


def bench_lines(report: dict[str, Any], where: Terminal, verbose: bool = False) -> list[str]:
    """The report of ``flashmoe bench``, of any mode; ``verbose``: also what took how long."""
    lines = [*_about(report), ""]
    if report["mode"] == "speed":
        lines += _speed(report, where)
    else:
        lines += _pairs(report, where)
    if "comparison" in report:
        lines += ["", *_comparison(report["comparison"], where)]
    if verbose:
        lines += ["", *_seconds(report["results"], where)]
    return [clip(line, where.width) for line in lines]


def _about(report: dict[str, Any]) -> list[str]:
    about = report["environment"]
    versions = [f"{name} {about[name]}" for name in ("driver", "torch", "triton") if about[name]]
    first = f"{about['gpu']}, {', '.join(versions)}, flashmoe {about['commit']}"
    rounds = f"median of {report['method']['rounds']} rounds in turn, L2 flushed before each"
    rates = [r["copy_gb_per_s"] for r in report["results"] if r.get("copy_gb_per_s")]
    if rates:
        low, high = f"{min(rates):.0f}", f"{max(rates):.0f}"
        rounds += f"; copies at {low if low == high else f'{low} to {high}'} GB/s"
    return [first, rounds]


def _speed(report: dict[str, Any], where: Terminal) -> list[str]:
    results = report["results"]
    bold = "1" if where.colour else ""
    lines = [paint("ms, our gate included", bold, bool(bold))]
    times = (
        "shape",
        "T",
        "ours",
        "spread",
        "layer",
        "dense",
        "floor",
        "gate",
        "best peer",
        "which",
    )
    right = (False, *[True] * 8, False)
    lines += table(times, [_times(result) for result in results], right, where.width, "  ")
    lines += ["", paint("above 1 is in our favour", bold, bool(bold))]
    head = ("shape", "T", "dense/ours", "floor/ours", "peer/ours", "over floor", "of bound")
    rows = [_ratios(result) for result in results]
    lines += table(head, rows, (False, *[True] * 6), where.width, "  ")
    lines += _peers(results, where)
    if reasons := sorted({r["gate_not_compiled"] for r in results if r["gate_not_compiled"]}):
        lines += wrap(f"the peers' gate is not compiled: {'; '.join(reasons)}", where.width)
    if reasons := sorted({why for r in results if (why := r.get("why_no_layer"))}):
        lines += wrap(f"the layer of a model is not timed: {'; '.join(reasons)}", where.width)
    lines += _clocks(results, where)
    return lines + _failures(results, where)


def _ms(value: float | None) -> str:
    if value is None:
        return _NONE
    return f"{value:.3f}" if value < 100 else f"{value:.1f}"


def _x(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3f}"


def _times(result: dict[str, Any]) -> tuple[str, ...]:
    spread = result["spread"].get("ours")
    width = percent((spread["q3_ms"] - spread["q1_ms"]) / result["ours_ms"]) if spread else _NONE
    best = result["best_peer"]
    return (
        result["preset"],
        str(result["T"]),
        _ms(result["ours_ms"]),
        width,
        _ms(result.get("layer_ms")),
        _ms(result["dense_ms"]),
        _ms(result["floor_ms"]),
        _ms(result["gate_ms"]),
        _ms(result["peers"][best] if best else None),
        best or _NONE,
    )


def _ratios(result: dict[str, Any]) -> tuple[str, ...]:
    over = result["over_floor_us"]
    return (
        result["preset"],
        str(result["T"]),
        _x(result["dense_over_ours"]),
        _x(result["floor_over_ours"]),
        _x(result["best_peer_over_ours"]),
        _NONE if over is None else f"{over:.1f} us",
        _x(result["of_bound"]),
    )


def _peers(results: list[dict[str, Any]], where: Terminal) -> list[str]:
    names = list(dict.fromkeys(name for result in results for name in result["peers"]))
    ran = [n for n in names if any(result["peers"][n] is not None for result in results)]
    lines: list[str] = []
    if ran:
        lines += ["", "peers, ms (e: eager, no graph; a: in a process of its own)"]
        rows = [
            (result["preset"], str(result["T"]), *(_peer(result, name) for name in ran))
            for result in results
        ]
        lines += table(
            ("shape", "T", *ran), rows, (False, *[True] * (len(ran) + 1)), where.width, "  "
        )
    return lines + _missing(results, names, where)


def _peer(result: dict[str, Any], name: str) -> str:
    details = result["peer_details"].get(name)
    if result["peers"][name] is None:
        return "failed" if details is None else details["state"]
    marks = "" if details and details["graph"] else " e"
    return _ms(result["peers"][name]) + marks + (" a" if details and details.get("apart") else "")


def _missing(results: list[dict[str, Any]], names: list[str], where: Terminal) -> list[str]:
    """A line for each reason why a peer did not run, and the shapes it holds for."""
    lines: list[str] = []
    for name in names:
        reasons: dict[str, list[str]] = {}
        for result in results:
            details = result["peer_details"].get(name)
            if details is not None and details["state"] != "ok":
                text = f"{details['state']}: {details['reason']}"
                reasons.setdefault(text, []).append(f"{result['preset']} {result['T']}")
        for reason, shapes in reasons.items():
            which = "" if len(shapes) == len(results) else f" ({', '.join(shapes)})"
            lines += wrap(f"{name}: {reason}{which}", max(where.width - 2, 20))
    return ["", *(f"  {line}" for line in lines)] if lines else []


def _clocks(results: list[dict[str, Any]], where: Terminal) -> list[str]:
    seen = [result["clocks"] for result in results if result["clocks"]]
    if not seen:
        return ["", "clocks: NVML does not answer"]

    def values(key: str) -> list[float]:
        return [c[key] for c in seen if c[key] is not None]

    parts = []
    if values("sm_clock_mhz"):
        parts.append(f"SM {min(values('sm_clock_mhz'))} to {max(values('sm_clock_mhz'))} MHz")
    if values("power_w"):
        parts.append(f"up to {max(values('power_w')):.0f} W")
    if values("temperature_c"):
        parts.append(f"{max(values('temperature_c'))} C")
    reasons = sorted({reason for c in seen for reason in c["throttle"]})
    parts.append(f"held down by {', '.join(reasons)}" if reasons else "not held down")
    return ["", *wrap(f"clocks while timing: {', '.join(parts)}", where.width)]


def _failures(results: list[dict[str, Any]], where: Terminal) -> list[str]:
    lines = []
    for result in results:
        if result["error"]:
            text = f"  FAILED {result['preset']} {result['T']}: {result['error']}"
            lines.append(paint(text, "31", where.colour))
    return ["", *lines] if lines else []


def _seconds(results: list[dict[str, Any]], where: Terminal) -> list[str]:
    """What the bench itself spent its time on, a line a phase: in all, and the slowest."""
    names = list(dict.fromkeys(name for result in results for name in result["seconds"]))
    names.sort(key=lambda name: name == "whole")
    totals = {n: sum(result["seconds"].get(n, 0.0) for result in results) for n in names}
    rows = [
        (name, f"{totals[name]:.1f}", f"{slowest:.1f}", f"{result['preset']} {result['T']}")
        for name in names
        for slowest, result in [_slowest(results, name)]
    ]
    head = ("what the bench took", "s in all", "at most", "for")
    return table(head, rows, (False, True, True, False), where.width, "  ")


def _slowest(results: list[dict[str, Any]], name: str) -> tuple[float, dict[str, Any]]:
    slowest = max(results, key=lambda result: result["seconds"].get(name, 0.0))
    return slowest["seconds"].get(name, 0.0), slowest


_WORDS = {
    "tracing": ("untraced", "traced", "traced / untraced"),
    "ranks": ("1 rank", "ranks", "ratio, scaled"),
    "skew": ("balanced", "skewed", "skewed / balanced"),
}


def _pairs(report: dict[str, Any], where: Terminal) -> list[str]:
    first, second, ratio = _WORDS[report["mode"]]
    head = ("shape", "T", f"{first} ms", f"{second} ms", ratio, "95 % interval")
    rows = []
    for result in report["results"]:
        interval = _NONE
        if result["low"] is not None:
            interval = f"{result['low']:.4f} to {result['high']:.4f}"
        which = result["preset"]
        if result.get("ranks"):
            which += f" x {result['ranks']}"
        ratio_text = _NONE if result["ratio"] is None else f"{result['ratio']:.4f}"
        times = (_ms(result["first_ms"]), _ms(result["second_ms"]))
        rows.append((which, str(result["T"]), *times, ratio_text, interval))
    lines = table(head, rows, (False, *[True] * 5), where.width, "  ")
    for result in report["results"]:
        if result.get("scale"):
            lines.append(
                f"  {result['preset']} {result['T']}: divided by {result['scale']:.4f} = "
                f"{result['sms']} SMs / {result['sms_used']} used x fullest rank "
                f"{result['fullest_over_mean']:.4f} of the mean"
            )
        if result.get("copying"):
            copying = result["copying"]
            lines.append(
                f"  {result['preset']} {result['T']}: {copying['ratio']:.4f} "
                f"({copying['low']:.4f} to {copying['high']:.4f}) beside one rank that copies its "
                f"rows too, {_ms(copying['ms'])} ms"
            )
    return lines + _failures(report["results"], where)


def _comparison(comparison: dict[str, Any], where: Terminal) -> list[str]:
    other = f", on another {comparison['gpu']}" if comparison["same_device"] is False else ""
    if not comparison["same_gpu"]:
        other = f", on another GPU ({comparison['gpu']})"
    lines = [f"beside {comparison['file']} (flashmoe {comparison['commit']}{other})"]
    head = ("shape", "T", "before ms", "now ms", "now/before", "spreads", "dense", "")
    rows = []
    for line in comparison["results"]:
        spreads = f"{percent(line['spread_before'])}, {percent(line['spread_now'])}"
        word = "beyond both spreads" if line["beyond_spread"] else "within"
        rows.append(
            (
                line["preset"],
                str(line["T"]),
                _ms(line["before_ms"]),
                _ms(line["now_ms"]),
                _x(line["ratio"]),
                spreads,
                _x(line["dense_ratio"]),
                word,
            )
        )
    right = (False, True, True, True, True, True, True, False)
    lines += table(head, rows, right, where.width, "  ")
    if comparison["limit"] is not None:
        slower = [f"{r['preset']} {r['T']}" for r in comparison["regressions"]]
        limit = percent(comparison["limit"])
        found = f"slower by more than {limit}: {', '.join(slower)}"
        lines.append(found if slower else f"nothing is slower by more than {limit}")
    return lines

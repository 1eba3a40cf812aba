"""The figures under a timeline: where each rank's time went, and what holds for the run."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from flashmoe_cli.output import Terminal
from flashmoe_cli.render.text import clip, count_text, paint, percent, table, time_text

if TYPE_CHECKING:
    from flashmoe.trace.rundir import Run

CLASSES = ("busy", "comm", "wait", "idle", "unrecorded")
MOST_LAUNCHES = 12


def lines_around(ranks: int, launches: int) -> int:
    """Lines that stand above and below a picture, for a terminal that should hold it all."""
    return 16 + 3 * ranks + (min(launches, MOST_LAUNCHES) + 3 if launches > 1 else 0)


def shares(values: Sequence[int], whole: int) -> list[str]:
    """``values`` as per cent of ``whole``, in tenths that add up to 100.0 where the values do.

    Each is rounded down; the tenths that lack go to the largest remainders.
    """
    if whole <= 0:
        return ["-"] * len(values)
    tenths = [v * 1000 // whole for v in values]
    lacking = round(sum(values) * 1000 / whole) - sum(tenths)
    by_rest = sorted(range(len(values)), key=lambda i: -(values[i] * 1000 % whole))
    for i in by_rest[: max(lacking, 0)]:
        tenths[i] += 1
    return [f"{t / 10:.1f}%" for t in tenths]


def figure_lines(summary: dict[str, Any], run: Run, iteration: int, where: Terminal) -> list[str]:
    """Every figure below the picture, for the launch that is drawn and, if several, for each."""
    of_launch = [e for e in summary["iterations"] if e["iter"] == iteration]
    lines = [_heading("where the time of each rank's actors went", where)]
    lines += _rank_table(of_launch, where)
    lines += ["", _heading("of that, waiting for", where), *_wait_table(of_launch, where)]
    launches = sorted({e["iter"] for e in summary["iterations"]})
    if len(launches) > 1:
        which = f"the {MOST_LAUNCHES} slowest of {len(launches)} launches"
        which = "every launch" if len(launches) <= MOST_LAUNCHES else which
        lines += ["", _heading(f"{which}, all ranks together", where)]
        lines += _launch_table(summary["iterations"], launches, where)
    hang, status = run.meta.get("hang"), run.meta.get("status") or {}
    if hang or status.get("code"):
        said = f"hung: {hang.get('reason')}" if hang else f"did not end well: {status['message']}"
        parts = wrap(f"this run {said}", where.width)
        lines += ["", *(paint(part, "1;31", where.colour) for part in parts)]
    return [*lines, "", *_remarks(summary, where)]


def _heading(text: str, where: Terminal) -> str:
    return paint(clip(text, where.width), "1", where.colour)


def _classes(entries: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """The classes to show: ``unrecorded`` only where there is some."""
    lost = any(e["unrecorded_ns"] for e in entries)
    return CLASSES if lost else CLASSES[:-1]


def _bound(entry: dict[str, Any], cells: list[str]) -> list[str]:
    """Shares of a launch with dropped records are lower bounds, but for what is unrecorded."""
    if not entry["bounds"]:
        return cells
    if len(cells) < len(CLASSES):
        return cells
    return [*(f">={c}" for c in cells[:-1]), f"<={cells[-1]}"]


def _about(entry: dict[str, Any], share: str) -> str:
    """A share of a launch with dropped records that may lie on either side of the truth."""
    return f"~{share}" if entry["bounds"] and share != "-" else share


def _rank_table(entries: Sequence[dict[str, Any]], where: Terminal) -> list[str]:
    classes = _classes(entries)
    rates = any(e["tensor"]["useful_share"] is not None for e in entries)
    head = ["rank", "wall", *classes, "comm hidden", "tile fill", "rows/expert"]
    if rates:
        head.insert(-2, "tensor use")
    body = []
    for e in entries:
        ns = [e[f"{name}_ns"] for name in classes]
        cells = [str(e["rank"]), time_text(e["wall_ns"])]
        cells += [*_bound(e, shares(ns, e["actor_ns"])), _about(e, percent(e["hidden"]["share"]))]
        if rates:
            cells.append(percent(e["tensor"]["useful_share"]))
        cells += [percent(e["tile_fill"]), _rows_per_expert(e["rows_per_expert"])]
        body.append(cells)
    return table(head, body, [True] * len(head), where.width, "  ")


def _rows_per_expert(known: dict[str, Any] | None) -> str:
    if known is None:  # nothing is known of a launch that did not end
        return "-"
    return f"{known['min']}-{known['max']}" if known["experts"] else "none"


def _wait_table(entries: Sequence[dict[str, Any]], where: Terminal) -> list[str]:
    reasons = [r for r in entries[0]["waits_ns"] if any(e["waits_ns"][r] for e in entries)]
    if not reasons:
        return ["  nothing"]
    head = ["rank", *reasons]
    body = []
    for e in entries:
        ns = [e["waits_ns"][r] for r in reasons]
        body.append([str(e["rank"]), *shares(ns, e["actor_ns"])])
    return table(head, body, [True] * len(head), where.width, "  ")


def _launch_table(
    entries: Sequence[dict[str, Any]], launches: Sequence[int], where: Terminal
) -> list[str]:
    classes = _classes(entries)
    head = ["launch", "slowest rank", *classes, "comm hidden"]
    body = []
    walls = {e["iter"]: 0 for e in entries}
    for e in entries:
        walls[e["iter"]] = max(walls[e["iter"]], e["wall_ns"])
    slowest_first = sorted(launches, key=lambda launch: -walls[launch])
    for launch in sorted(slowest_first[:MOST_LAUNCHES]):
        mine = [e for e in entries if e["iter"] == launch]
        slow = max(mine, key=lambda e: e["wall_ns"])
        ns = [sum(e[f"{name}_ns"] for e in mine) for name in classes]
        comm = sum(e["hidden"]["comm_ns"] for e in mine)
        hidden = sum(e["hidden"]["hidden_ns"] for e in mine)
        slowest = f"{time_text(slow['wall_ns'])} (rank {slow['rank']})"
        cells = shares(ns, sum(e["actor_ns"] for e in mine))
        body.append([str(launch), slowest, *cells, percent(hidden / comm if comm else None)])
    return table(head, body, [True] * len(head), where.width, "  ")


def _remarks(summary: dict[str, Any], where: Terminal) -> list[str]:
    rings, clock, tracer = summary["rings"], summary["clock"], summary["tracer"]
    lines = []
    if rings["dropped"]:
        text = (
            f"{count_text(rings['dropped'])} records dropped in {rings['with_drops']} of "
            f"{rings['n']} rings ({rings['mode']}): <= and >= mark bounds, ~ a guess; "
            f"a larger --ring-capacity keeps all"
        )
        lines += [paint(part, "33", where.colour) for part in wrap(text, where.width)]
    records = f"{count_text(tracer['records'])} records, "
    records += "none dropped" if not rings["dropped"] else f"{count_text(rings['records'])} kept"
    if rings["never_began"]:
        records += f"; {rings['never_began']} actors never began"
    if clock.get("source"):
        records += f"; clock {clock['source']}, step {clock['step_ns']:.0f} ns"
    if tracer["share"] is not None:
        records += f"; tracing took {percent(tracer['share'], 2)} of the actors' time"
    lines += wrap(records, where.width)
    lines += clock_lines(clock, where)
    if summary["overlap_ns"]:
        text = f"{time_text(summary['overlap_ns'])} claimed by two records, counted once"
        lines += wrap(text, where.width)
    if summary["topology"] == "shared-gpu":
        lines += wrap("topology: shared-gpu; no transfer rate here is a link rate", where.width)
    return lines


def _off_by(ends: dict[str, Any], applied: bool) -> float:
    """How far times of a clock between ``start`` and ``end`` may be off; as they were, where no
    offset was applied."""
    known = [ends[name] for name in ("start", "end") if ends.get(name) is not None]
    return max(e["bound_ns"] + (0 if applied else abs(e["offset_ns"])) for e in known)


def clock_lines(clock: dict[str, Any], where: Terminal) -> list[str]:
    """How ranks' clocks were put on one, and whether the order of events agrees."""
    known = [how for how in clock.get("ranks") or () if how is not None]
    if len(known) < 2:
        return []
    by_exchange = max(_off_by(h, h["applied"] or bool(h.get("tightened"))) for h in known)
    bound = max(_off_by(h.get("tightened") or h, h["applied"]) for h in known)
    moved = [h for h in known if h["applied"]]
    sign = "±" if where.unicode else "+-"
    if not moved:
        text = f"clocks of {len(known)} ranks agree to {sign}{time_text(bound)}"
        left = ", and are left as they are"
    else:
        text = f"clocks of {len(known)} ranks put on rank 0's, each to {sign}{time_text(bound)}"
        left = ""
    if any(h.get("tightened") for h in known):
        pairs = count_text(clock["tightening"]["pairs"])
        text += f" by the order of {pairs} waits ({sign}{time_text(by_exchange)} by exchanges)"
    text += left
    if moved:
        offset = max(abs(h["start"]["offset_ns"]) for h in moved)
        drifts = [abs(h["drift_ppm"]) for h in moved if h.get("drift_ppm") is not None]
        text += f"; offsets up to {time_text(offset)}"
        if drifts:
            text += f", drift up to {max(drifts):.1f} ppm"
    order = clock.get("order")
    if order and not order["violations"]:
        text += (
            f"; all {count_text(order['checked'])} waits on other ranks end after what they "
            "awaited began"
        )
    lines = wrap(text, where.width)
    if order and order.get("contradiction_ns"):
        text = (
            f"waits contradict each other: some end at least "
            f"{time_text(order['contradiction_ns'])} too early by any clocks that the exchanges "
            "allow, so nothing was tightened by their order, and times between ranks are not to "
            "be trusted"
        )
        lines += [paint(part, "33", where.colour) for part in wrap(text, where.width)]
    if order and order["violations"]:
        worst = order["worst"]
        text = (
            f"{count_text(order['violations'])} of {count_text(order['checked'])} waits end "
            f"before what they awaited began, by up to {time_text(order['worst_ns'])} more than "
            f"the clocks' bounds allow (worst: {worst['kind']} of rank {worst['rank']} on rank "
            f"{worst['peer']}, launch {worst['iter']}): times between ranks are not to be trusted"
        )
        lines += [paint(part, "33", where.colour) for part in wrap(text, where.width)]
    return lines

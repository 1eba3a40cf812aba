"""What a person reads after ``run`` and ``trace``: where it ran, verdict, time, traffic."""

from __future__ import annotations

import shlex
import statistics
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from flashmoe.trace.links import link_figures
from flashmoe_cli.output import Terminal
from flashmoe_cli.render.links import link_lines, link_text
from flashmoe_cli.render.text import bytes_text, command_lines, fit, paint, plural, table

if TYPE_CHECKING:
    from flashmoe.session import Result


#: Where the values begin, in columns.
_INDENT = 11


def where_text(
    world: str,
    ranks: int,
    sms_per_rank: int,
    gpu: str | None,
    processes: bool = False,
    topology: str | None = None,
) -> str:
    """The engine in words; a host-engine run is always called that, and ranks on one GPU too."""
    size = f"{plural(ranks, 'rank')} x {plural(sms_per_rank, 'SM')}"
    if world == "host":
        what = "CPU processes" if processes else "CPU threads"
        return f"the host engine ({what}; not GPU times), {size}"
    shared = ", topology: shared-gpu" if topology == "shared-gpu" else ""
    return f"{gpu or 'the GPU'}, {size}{shared}"


def processes_text(said: dict[str, Any]) -> str:
    """Who started the ranks' processes, and how they reach each other and why so."""
    nodes = f" on {said['nodes']} nodes" if said["nodes"] > 1 else ""
    how = "" if said["pointers"] else "; by put-with-signal alone"
    why = f" ({said['why_transport']})" if said.get("why_transport") else ""
    return (
        f"processes started by {said['launcher']}{nodes}, transport {said['transport']}{why}{how}"
    )


def shape_text(config: dict[str, Any], tokens: list[int]) -> str:
    """T, H, I, E, k and the arithmetic, on one line."""
    per_rank = str(tokens[0]) if len(set(tokens)) == 1 else ",".join(map(str, tokens))
    return (
        f"T {per_rank} per rank, H {config['hidden']}, I {config['intermediate']}, "
        f"E {config['experts']}, k {config['top_k']}, {config['activation']}, {config['dtype']}, "
        f"{config['routing']['kind']} routing"
    )


def check_text(check: dict[str, Any] | None) -> str:
    """The verdict with its figures."""
    if check is None:
        return "not checked"
    out, routing = check["output"], check.get("routing")
    verdict = "ok" if out["ok"] else f"WRONG: {plural(out['over'], 'element')} over the bound"
    text = f"{verdict}; max error {out['max_abs']:.2g}, {out['max_ratio']:.2f} of its bound"
    if out["not_finite"]:
        text += f"; {plural(out['not_finite'], 'element')} NaN or infinite"
    if out["unbounded"]:
        text += f"; {plural(out['unbounded'], 'element')} not judged (overflow)"
    if routing is not None:
        wrong = routing["wrong"] + routing["bad_ids"] + routing["wrong_weights"]
        text += "; routing ok" if routing["ok"] else f"; routing WRONG in {plural(wrong, 'token')}"
        text += f", {plural(routing['near_ties'], 'near-tie')}"
    return text


def time_text(world: str, launch_ms: list[float]) -> str:
    """Median and range of the launches, and by what clock."""
    by = "the host's wall clock" if world == "host" else "CUDA events"
    median = statistics.median(launch_ms)
    if len(launch_ms) == 1:
        return f"{median:.3f} ms, one launch, by {by}"
    return (
        f"{median:.3f} ms median of {len(launch_ms)} launches "
        f"({min(launch_ms):.3f} to {max(launch_ms):.3f}), by {by}"
    )


def result_lines(result: Result, where: Terminal, *, verbose: bool = False) -> list[str]:
    """The report of one run, without its timeline."""
    gpu = result.device["name"] if result.device else None
    ranks = len(result.tokens)
    in_processes = result.processes is not None
    head = where_text(result.world, ranks, result.sms_per_rank, gpu, in_processes, result.topology)
    head = f"{result.name} on {head}"
    lines = [paint(line, "1", where.colour) for line in fit(head, where.width, 2)]

    def say(label: str, value: object) -> None:
        lines.extend(fit(f"  {label:<8} {value}", where.width, _INDENT))

    if result.why_world:
        say("no GPU", result.why_world)
    say("shape", shape_text(result.config.to_dict(), list(result.tokens)))
    if result.processes is not None:
        say("ranks", processes_text(result.processes))
    if result.hang is not None:
        lines += ["", *hang_lines(result, where), ""]
    else:
        text = check_text(result.check)
        good = result.check is None or result.check["ok"]
        say("check", paint(text, "32" if good else "1;31", where.colour))
        say("time", time_text(result.world, result.launch_ms))
        say("payload", _payload(result))
        if verbose and ranks > 1:
            lines += _traffic(result, where)
        links = link_figures(result.nvlink)
        if links is not None:
            say("NVLink", link_text(links))
            lines += link_lines(links, where.width, "    ") if verbose else []
    for remark in result.remarks:
        say("note", remark)
    if verbose:
        for label, value in _verbose(result):
            say(label, value)
    if result.saved_output is not None:
        say("output", result.saved_output)
    if result.path is not None:
        say("saved", result.path)
    return lines


def _payload(result: Result) -> str:
    rows = result.rows
    spread = f"rows per expert {int(rows.min())} to {int(rows.max())}"
    if len(result.tokens) == 1:
        return f"none: one rank keeps every row; {spread}"
    return f"{bytes_text(int(result.traffic.sum()))} a launch between ranks; {spread}"


def _traffic(result: Result, where: Terminal) -> list[str]:
    """The payload from each rank to each."""
    head = ["", *(f"to {peer}" for peer in range(len(result.traffic)))]
    rows = [
        [f"rank {source}", *(bytes_text(int(n)) for n in row)]
        for source, row in enumerate(result.traffic)
    ]
    return table(head, rows, [False, *[True] * len(rows)], where.width, "    ")


def device_text(device: dict[str, Any]) -> str:
    """The GPU and its state, as far as NVML said."""
    parts = [device["name"]]
    for key, form in (
        ("cc", "compute capability {}"),
        ("sms", "{} SMs"),
        ("driver", "driver {}"),
        ("sm_clock_mhz", "SM {} MHz"),
        ("memory_clock_mhz", "memory {} MHz"),
        ("power_w", "{} W"),
        ("temperature_c", "{} C"),
    ):
        if device.get(key) is not None:
            parts.append(form.format(device[key]))
    if device.get("throttle"):
        parts.append(f"slowed by {', '.join(device['throttle'])}")
    return ", ".join(parts)


def _verbose(result: Result) -> list[tuple[str, str]]:
    """What is told with -v, by label."""
    said = []
    if result.device is not None:
        said.append(("device", device_text(result.device)))
    if result.clock is not None:
        c = result.clock
        text = (
            f"{c['source']}, step {c['step_ns']:.0f} ns, "
            f"a record costs {c['record_cost_ns']:.0f} ns"
        )
        said.append(("clock", text))
    return said


def hang_lines(result: Result, where: Terminal) -> list[str]:
    """The hang report as the diagnosis words it, long lines wrapped under their beginning."""
    assert result.hang is not None
    lines = []
    for i, text in enumerate(result.hang.text):
        indent = " " * (len(text) - len(text.lstrip()))
        parts = wrap(
            text.strip(), where.width, initial_indent=indent, subsequent_indent=indent + "  "
        )
        lines += [paint(part, "1;31" if i == 0 else "", where.colour and i == 0) for part in parts]
    return lines


def next_lines(result: Result, where: Terminal) -> list[str]:
    """The commands to type next, complete with this run's path where it is not the latest here."""
    from flashmoe.trace.place import runs_folder

    run = ""
    if result.path is not None and result.path.absolute().parent != runs_folder().absolute():
        run = " " + shlex.quote(str(result.path))
    exported = f"flashmoe export{run} --format perfetto -o trace.pftrace"
    rows = [(exported, "for https://ui.perfetto.dev")]
    if result.clock is not None:
        rows = [
            (f"flashmoe timeline{run} --sm 0 --lane all", "every lane of one SM"),
            (f"flashmoe traffic{run}", "who sent what to whom"),
            *rows,
        ]
    width = max(len(command) for command, _ in rows)
    if width + 4 + max(len(why) for _, why in rows) <= where.width:
        return ["next:", *(f"  {command:<{width}}  {why}" for command, why in rows)]
    lines = ["next:"]
    for command, why in rows:
        lines += [*command_lines(command, where.width, "  "), *fit(f"    {why}", where.width, 4)]
    return lines

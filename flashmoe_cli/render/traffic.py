"""The traffic between ranks: the matrix, what other ways would have sent, the rate over time."""

from __future__ import annotations

from textwrap import wrap
from typing import Any

from flashmoe_cli.output import Terminal
from flashmoe_cli.render.links import link_lines, link_text
from flashmoe_cli.render.text import (
    bytes_text,
    fit,
    paint,
    percent,
    plural,
    rate_text,
    table,
    time_text,
)

#: Where the figures begin, in columns.
_INDENT = 17
_SPARK = " ▁▂▃▄▅▆▇█"
_SPARK_ASCII = " .:-=+*#@"
_MOST_RANKS = 16


def traffic_lines(figures: dict[str, Any], where: Terminal) -> list[str]:
    """The report of ``flashmoe traffic``."""
    launches = plural(figures["iterations"], "launch", "launches")
    if figures["iteration"] is not None:
        launches = f"launch {figures['iteration']}"
    if figures["ranks"] == 1:
        rows = bytes_text(figures["local_bytes"])
        one = f"one rank: no row crosses ({rows} of rows moved within it, {launches})"
        return wrap(one, where.width)
    of_counts = bytes_text(figures["counts_bytes"])
    if figures["counts_bounds"]:
        of_counts = f"at least {of_counts}"
    head = wrap(f"payload bytes from (row) to (column), {launches}", where.width)
    matrix = [*(paint(line, "1", where.colour) for line in head), *_matrix(figures, where), ""]
    lines = [
        f"  crossed        {bytes_text(figures['payload_bytes'])} of real rows, none of padding; "
        f"{of_counts} of counts",
        f"  stayed         {bytes_text(figures['local_bytes'])}",
    ]
    if figures["mean_gb_per_s"] is not None:
        width = time_text(figures["rate"]["bin_ns"])
        lines.append(
            f"  rate           {rate_text(figures['mean_gb_per_s'])} GB/s over "
            f"{time_text(figures['span_ns'])}, at most "
            f"{rate_text(figures['rate']['peak_gb_per_s'])} in {width} ({_way(figures)})"
        )
        lines += _per_gpu(figures["per_gpu"], width)
        lines.append(f"  over time      {_spark(figures['rate']['bytes'], where)}")
    lines += _alternatives(figures)
    links = figures["nvlink"]
    if links is not None:
        lines.append(f"  NVLink         {link_text(links)}")
    lines = [part for line in lines for part in fit(line, where.width, _INDENT)]
    if figures["bounds"]:
        dropped = wrap("  records were dropped: these are lower bounds", where.width)
        lines += [paint(line, "33", where.colour) for line in dropped]
    if links is not None:
        lines += link_lines(links, where.width, "    ")
    return [*matrix, *lines]


def _way(figures: dict[str, Any]) -> str:
    several = f"{figures['ranks']} GPUs together, " if figures["per_gpu"] else ""
    return several + str(figures["way"])


def _per_gpu(rates: dict[str, Any] | None, width: str) -> list[str]:
    """What one GPU sends: it is this that is held against a link's rate."""
    if rates is None:
        return []
    means = [rate_text(f(rates["mean_gb_per_s"])) for f in (min, max)]
    mean = means[0] if means[0] == means[1] else " to ".join(means)
    return [
        f"  per GPU        {mean} GB/s sent, at most {rate_text(rates['peak_gb_per_s'])} in "
        f"{width} (rank {rates['peak_rank']}); as nccl-tests' busbw"
    ]


def _matrix(figures: dict[str, Any], where: Terminal) -> list[str]:
    matrix, ranks = figures["matrix_bytes"], figures["ranks"]
    shown = min(ranks, _MOST_RANKS)
    head = ["", *(f"to {c}" for c in range(shown)), "sent"]
    rows = []
    for source in range(shown):
        cells = ["." if c == source else bytes_text(matrix[source][c]) for c in range(shown)]
        sent = sum(n for c, n in enumerate(matrix[source]) if c != source)
        rows.append([f"from {source}", *cells, bytes_text(sent)])
    received = [bytes_text(sum(matrix[s][c] for s in range(ranks) if s != c)) for c in range(shown)]
    rows.append(["received", *received, bytes_text(figures["payload_bytes"])])
    return table(head, rows, [False, *[True] * (shown + 1)], where.width, "  ")


def _spark(values: list[int], where: Terminal) -> str:
    """The values as a row of bars between two edges; neighbours share one where room is scarce."""
    together = -(-len(values) // max(where.width - _INDENT - 2, 1)) if values else 1
    values = [sum(values[i : i + together]) for i in range(0, len(values), together)]
    signs = _SPARK if where.unicode else _SPARK_ASCII
    top = max(values, default=0) or 1
    return f"|{''.join(signs[-(-v * (len(signs) - 1) // top)] for v in values)}|"


def _alternatives(figures: dict[str, Any]) -> list[str]:
    other = figures["alternatives"]
    if other is None:
        return []
    sent = figures["payload_bytes"]

    def beside(n: int) -> str:
        more = percent(n / sent - 1, 0) if sent else "-"
        return f"{bytes_text(n)} ({'+' if not more.startswith('-') else ''}{more})"

    least, most = other["padded"]["tile_rows"]
    tiles = f"{least}-{most}" if least < most else str(most)
    capacity, lossless = other["capacity"], other["capacity_lossless"]
    return [
        f"  if padded      {beside(other['padded']['bytes'])} with each (source, expert) filled "
        f"to tiles of {tiles} rows",
        f"  if capacity    {beside(capacity['bytes'])} with a capacity factor of "
        f"{capacity['factor']}, and {plural(capacity['rows_dropped'], 'row')} dropped",
        f"  if lossless    {beside(lossless['bytes'])} with a capacity of "
        f"{plural(lossless['rows_per_expert'], 'row')}, which drops none",
    ]

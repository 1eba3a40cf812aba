"""timeline, traffic, info and export on saved runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from flashmoe_cli.render.text import visible

CHECK = {
    "ok": False,
    "output": {"ok": False, "over": 9, "not_finite": 0, "unbounded": 0, "max_abs": 1.0,
               "max_ratio": 9.0},
}  # fmt: skip


def test_the_timeline_as_a_person_reads_it(made_up: Any, cli: Any, golden: Any) -> None:
    made_up()
    done = cli("timeline")
    assert done.exit_code == 0, done.output
    golden("timeline.txt", done.stdout)


def test_one_sm_lane_by_lane_zoomed_in(made_up: Any, cli: Any, golden: Any) -> None:
    made_up(iterations=3)
    zoom = ("--sm", "1", "--lane", "all", "--window", "20..120us", "--iteration", "1")
    done = cli("timeline", *zoom)
    assert done.exit_code == 0, done.output
    golden("timeline-zoom.txt", done.stdout)


def test_the_traffic_as_a_person_reads_it(made_up: Any, cli: Any, golden: Any) -> None:
    made_up(ranks=3)
    done = cli("traffic")
    assert done.exit_code == 0, done.output
    golden("traffic.txt", done.stdout)


def test_counts_that_were_not_all_recorded_are_a_bound(made_up: Any, cli: Any) -> None:
    made_up("all.fmoe")
    assert "padding; 192 B of counts" in cli("traffic", "all.fmoe").stdout
    made_up("part.fmoe", experts=16)
    assert "padding; at least 480 B of counts" in cli("traffic", "part.fmoe").stdout


def test_dropped_records_are_said_and_strict_ends_with_4(made_up: Any, cli: Any) -> None:
    made_up(iterations=4, capacity=60)
    done = cli("timeline", "--strict")
    assert done.exit_code == 4
    assert "records dropped" in done.stdout
    assert "unrecorded" in done.stdout
    assert cli("timeline").exit_code == 0
    assert cli("traffic", "--strict").exit_code == 4


def test_a_whole_run_passes_strict(made_up: Any, cli: Any) -> None:
    made_up()
    assert cli("timeline", "--strict").exit_code == 0
    assert cli("traffic", "--strict").exit_code == 0


@pytest.mark.parametrize("verb", ["timeline", "traffic", "info"])
def test_json_is_one_versioned_object(made_up: Any, cli: Any, verb: str) -> None:
    path = made_up()
    done = cli(verb, str(path), "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["schema"] == 1
    assert done.stderr == ""


def test_classes_add_up_to_the_wall_in_json(made_up: Any, cli: Any) -> None:
    made_up(iterations=2)
    figures = json.loads(cli("timeline", "--json").stdout)
    for entry in [*figures["ranks"], *figures["actors"], *figures["iterations"]]:
        classes = ("busy", "comm", "wait", "idle", "unrecorded")
        assert sum(entry[f"{c}_ns"] for c in classes) == entry["actor_ns"]


def test_printed_shares_add_up_to_the_whole(made_up: Any, cli: Any) -> None:
    made_up(ranks=4, iterations=5)
    tables = cli("timeline").stdout.split("where the time")[1].split("of that")[0]
    rows = [line for line in tables.splitlines() if re.match(r"\s+\d", line)]
    assert len(rows) == 4
    for row in rows:
        shares = [float(s) for s in re.findall(r"([\d.]+)%", row)[:4]]
        assert sum(shares) == pytest.approx(100.0, abs=1e-9)


def test_a_zoom_in_json_holds_the_grid(made_up: Any, cli: Any) -> None:
    made_up()
    done = cli("timeline", "--json", "--sm", "0-1", "--lane", "math0")
    picture = json.loads(done.stdout)["picture"]
    assert [(r["sm"], r["lane"]) for r in picture["rows"]] == [(0, "math0"), (1, "math0")]
    assert all(len(r["states"]) == 100 for r in picture["rows"])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--sm", "99"), "no such SM"),
        (("--iteration", "7"), "no launch 7"),
        (("--rank", "9"), "no such"),
        (("--window", "5s..6s"), ""),
        (("--lane", "mat0"), "mat0"),
        (("--sm", "x"), "--sm x"),
    ],
)
def test_a_part_that_is_not_there_is_a_usage_error(
    made_up: Any, cli: Any, args: tuple[str, ...], says: str
) -> None:
    made_up()
    done = cli("timeline", *args)
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_run_is_found_by_name_and_a_near_one_suggested(made_up: Any, cli: Any) -> None:
    made_up("mixtral-one.fmoe")
    assert cli("info", "mixtral-one").exit_code == 0
    done = cli("info", "mixtral-on")
    assert done.exit_code == 2
    assert "mixtral-one.fmoe" in done.stderr


def test_without_any_run_the_remedy_is_to_make_one(runs: Path, cli: Any) -> None:
    done = cli("timeline", "--json")
    assert done.exit_code == 2
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == 2
    assert "flashmoe trace" in error["hint"]


def test_a_newer_run_is_refused_with_a_sentence(made_up: Any, cli: Any) -> None:
    path = made_up()
    meta = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(meta | {"schema": 99}))
    done = cli("timeline")
    assert done.exit_code == 1
    assert "schema 99" in done.stderr


def test_a_truncated_run_is_refused_with_a_sentence(made_up: Any, cli: Any) -> None:
    path = made_up()
    events = path / "events.parquet"
    events.write_bytes(events.read_bytes()[:-100])
    done = cli("timeline")
    assert done.exit_code == 1
    assert "damaged or truncated" in done.stderr


@pytest.mark.parametrize("name", ["rings.bin", "events.parquet", "plan.parquet", "counts.parquet"])
@pytest.mark.parametrize("lost", [1, 100])
def test_info_notices_a_file_that_was_cut_short(
    made_up: Any, cli: Any, name: str, lost: int
) -> None:
    file = made_up() / name
    file.write_bytes(file.read_bytes()[:-lost])
    done = cli("info")
    assert done.exit_code == 1
    assert f"{name} is " in done.stderr
    assert "truncated" in done.stderr


@pytest.mark.parametrize("verb", ["info", "timeline", "traffic"])
def test_a_run_that_does_not_say_what_ran_is_refused_with_a_sentence(
    made_up: Any, cli: Any, verb: str
) -> None:
    path = made_up()
    meta = json.loads((path / "run.json").read_text())
    del meta["world"]
    (path / "run.json").write_text(json.dumps(meta))
    done = cli(verb)
    assert done.exit_code == 1
    assert "does not say what ran: its run.json has no world" in done.stderr


def test_info_says_what_the_run_is(made_up: Any, cli: Any) -> None:
    made_up(iterations=2)
    done = cli("info", "-v")
    assert done.exit_code == 0
    for text in ("2 ranks x 3 SMs", "E 6, k 2", "none dropped", "math1", "keep-first"):
        assert text in done.stdout


def test_export_writes_beside_us_and_refuses_to_overwrite(made_up: Any, cli: Any) -> None:
    made_up("one.fmoe")
    done = cli("export", "--format", "chrome")
    assert done.exit_code == 0, done.output
    assert json.loads(Path("one.json").read_text())["traceEvents"]
    assert cli("export", "--format", "chrome").exit_code == 2
    assert cli("export", "--format", "chrome", "-f").exit_code == 0
    figures = json.loads(cli("export", "--json", "-o", "x.pftrace").stdout)
    assert figures["bytes"] == Path("x.pftrace").stat().st_size


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("width", [40, 60, 72, 200])
@pytest.mark.parametrize(
    "args",
    [
        ("timeline",),
        ("timeline", "--lane", "all"),
        ("timeline", "--lane", "math0"),
        ("traffic",),
        ("info", "-v"),
        ("export", "-f"),
        ("presets",),
        ("doctor",),
        ("--version", "-v"),
    ],
)
def test_no_line_is_wider_than_the_terminal(
    made_up: Any,
    cli: Any,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    width: int,
    colour: bool,
) -> None:
    made_up(iterations=2, sms=12)
    monkeypatch.setenv("COLUMNS", str(width))
    if colour:
        monkeypatch.setenv("FORCE_COLOR", "1")
    lines = cli(*args).stdout.splitlines()
    # A word that is wider, a path, stays whole.
    assert max(visible(line) for line in lines if len(line.split()) > 1) <= width


def test_a_narrow_terminal_loses_no_figure(
    made_up: Any, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up()
    monkeypatch.setenv("COLUMNS", "40")
    text = cli("timeline").stdout
    for title in ("busy", "idle", "comm hidden", "tile fill", "rows/expert", "operands"):
        assert title in text


def test_colour_only_where_it_is_wanted(
    made_up: Any, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up()
    assert "\x1b" not in cli("timeline").stdout
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[38;5;" in cli("timeline").stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in cli("timeline").stdout


def among_gpus(run: Path, **nvlink: Any) -> None:
    """Makes a made-up run of two ranks one of two GPUs, whose links carried what ``nvlink`` says
    over three launches."""
    meta = json.loads((run / "run.json").read_text())
    meta["world"] |= {
        "topology": "several-gpus", "kind": "ipc",
        "processes": {"launcher": "flashmoe", "nodes": 1, "transport": "ipc", "why_transport": "",
                      "pointers": True, "ranks": [{"rank": r, "pid": r, "message": "ok",
                                                   "gpu": f"GPU-{r}"} for r in (0, 1)]},
    }  # fmt: skip
    if nvlink:
        entry = {"counters": None, "certain": True, "why": "", "payload_tx": 20480,
                 "payload_rx": 20480} | nvlink  # fmt: skip
        ranks = [{"rank": r, "gpu": f"GPU-{r}"} | entry for r in (0, 1)]
        meta["nvlink"] = {"launches": 3, "ranks": ranks}
    (run / "run.json").write_text(json.dumps(meta))


COUNTED = {"data_tx": 64512, "data_rx": 64512, "raw_tx": 73728, "raw_rx": 73728}


def test_the_traffic_of_several_gpus_names_their_link(made_up: Any, cli: Any) -> None:
    path = made_up()

    def said() -> str:
        done = cli("traffic")
        assert done.exit_code == 0, done.output
        return " ".join(done.stdout.split())

    among_gpus(path)
    assert "(2 GPUs together, between GPUs of one node, by pointer)" in said()
    assert "NVLink" not in said()
    among_gpus(path, counters=COUNTED)
    assert "(2 GPUs together, over NVLink, by pointer)" in said()
    assert "NVLink 43.0 kB of data a launch, 1.050 times the payload; 49.2 kB with headers, " \
        "1.200 times (the GPUs' counters, 3 launches)" in said()  # fmt: skip
    among_gpus(path, counters=COUNTED, certain=False)
    assert "3 launches; uncertain: few bytes, or others' among them)" in said()
    among_gpus(path, counters=dict.fromkeys(COUNTED, 3072))
    assert "between GPUs, not over NVLink, by pointer)" in said()
    among_gpus(path, why="Not Supported")
    assert "NVLink this driver gives no NVLink counters: Not Supported" in said()


def test_what_a_gpu_sends_is_what_its_link_is_held_to(made_up: Any, cli: Any) -> None:
    among_gpus(made_up(), counters=COUNTED)
    figures = json.loads(cli("traffic", "--json").stdout)
    matrix, span = figures["matrix_bytes"], figures["span_ns"]
    rates = figures["per_gpu"]
    assert rates["mean_gb_per_s"] == pytest.approx([matrix[0][1] / span, matrix[1][0] / span])
    assert sum(rates["mean_gb_per_s"]) == pytest.approx(figures["mean_gb_per_s"])
    whole = figures["rate"]["peak_gb_per_s"]
    assert whole / 2 <= rates["peak_gb_per_s"] <= whole and rates["peak_rank"] in (0, 1)
    (first, second) = figures["nvlink"]["gpus"]
    assert (first["ranks"], second["ranks"]) == ([0], [1])
    assert first["data_tx"] == 21504 and first["data_over_payload_tx"] == pytest.approx(1.05)
    text = cli("traffic").stdout
    assert "per GPU" in text and "busbw" in text
    (line,) = [line for line in text.splitlines() if line.split()[:1] == ["1"]]
    data, raw = ["21.5", "kB", "x1.050"], ["24.6", "kB", "x1.200"]
    assert line.split()[1:] == ["20.5", "kB", *data, *data, *raw, *raw]


def test_one_gpu_has_no_link_to_be_held_to(made_up: Any, cli: Any) -> None:
    made_up()
    figures = json.loads(cli("traffic", "--json").stdout)
    assert figures["per_gpu"] is None and figures["nvlink"] is None


def test_a_narrow_terminal_shows_all_of_the_traffic(
    made_up: Any, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up()
    wide = cli("traffic").stdout
    monkeypatch.setenv("COLUMNS", "36")
    narrow = cli("traffic").stdout
    assert ".." not in narrow.partition("\n")[2]  # the title alone gives way
    for text in (narrow, wide):
        said = " ".join(text.split())
        for words in ("192 B of counts", "within one GPU)", "which drops none"):
            assert words in said
    # The bars are of all the run, not of its begin.
    bars = [line.partition("over time")[2].strip() for line in narrow.splitlines()]
    (bars,) = [line for line in bars if line]
    assert bars[0] == bars[-1] == "|" and bars.strip("| ")[-1] == "\u2588"


@pytest.mark.parametrize("name", ["/", ".", "..", "", "one.fmoe/", "one", "nothing/one"])
def test_any_name_of_a_run_is_found_or_refused(made_up: Any, cli: Any, name: str) -> None:
    made_up("one.fmoe")
    done = cli("timeline", name)
    if name in ("one", "one.fmoe/"):
        assert done.exit_code == 0
    else:
        assert done.exit_code in (1, 2)
        assert "internal error" not in done.stderr and len(done.stderr.splitlines()) == 2


def test_a_run_is_found_from_inside(
    made_up: Any, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made_up())
    assert cli("timeline", ".").exit_code == 0


@pytest.mark.parametrize(
    ("args", "format"),
    [
        (("-o", "a.json"), "chrome"),
        (("-o", "a.json.gz"), "chrome"),
        (("-o", "a"), "perfetto"),
        ((), "perfetto"),
        (("-o", "a.json", "--format", "perfetto"), "perfetto"),
    ],
)
def test_a_file_holds_what_its_name_says(
    made_up: Any, cli: Any, args: tuple[str, ...], format: str
) -> None:
    made_up()
    assert json.loads(cli("export", *args, "--json").stdout)["format"] == format


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"status": {"code": 130, "message": "interrupted"}}, 4, "did not end well: interrupted"),
        (
            {
                "status": {"code": 124, "message": "a wait passed its deadline"},
                "hang": {"reason": "rank 1 never started"},
            },
            4,
            "this run hung: rank 1 never started",
        ),
        ({"status": {"code": 1, "message": "wrong result"}, "check": CHECK}, 0, "wrong result"),
        ({}, 0, ""),
    ],
)
def test_a_run_that_ended_early_is_said_to_and_incomplete(
    made_up: Any, cli: Any, change: dict[str, Any], code: int, says: str
) -> None:
    path = made_up()
    meta = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(meta | change))
    for verb in ("timeline", "traffic"):
        assert cli(verb, "--strict").exit_code == code
        assert cli(verb).exit_code == 0
    text = cli("timeline").stdout
    assert says in text and ("this run" in text) == bool(says)


@pytest.mark.parametrize("verb", ["timeline", "traffic", "info", "presets", "doctor"])
def test_every_object_names_its_verb(made_up: Any, cli: Any, verb: str) -> None:
    made_up()
    assert json.loads(cli(verb, "--json").stdout)["verb"] == verb

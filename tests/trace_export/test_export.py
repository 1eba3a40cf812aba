"""Exports, read back by the viewers' own code."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from flashmoe.errors import FlashmoeError
from flashmoe.trace.columns import Events
from flashmoe.trace.export import FORMATS, export
from flashmoe.trace.export import writer as export_writer
from flashmoe.trace.export.layout import lay_out
from flashmoe.trace.schema import KIND_NAME, EventKind, Lane, RecordFlag

from .synthetic import START_NS, Run, Table, run_of
from .trace_processor import Loaded


def matrix(events: Events) -> dict[tuple[int, int], int]:
    """Payload by (source, destination), event by event."""
    out: dict[tuple[int, int], int] = {}
    for i in range(len(events)):
        if (
            events.kind[i] in (EventKind.DISPATCH, EventKind.PUT)
            and events.peer[i] != events.rank[i]
        ):
            pair = (int(events.rank[i]), int(events.peer[i]))
            out[pair] = out.get(pair, 0) + int(events.bytes[i])
    return out


@pytest.fixture(scope="module", params=sorted(FORMATS))
def exported(request: pytest.FixtureRequest, run: Run, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("export") / f"run{FORMATS[request.param]}"
    done = export(run, request.param, path)
    assert done.size == path.stat().st_size
    return request.param, done, Loaded(path)


def test_trace_processor_has_no_complaint_and_lost_no_slice(exported, run: Run) -> None:
    _, done, trace = exported
    assert trace.complaints() == []
    assert trace.sql("select count(*) from slice") == [(run.events.num_rows,)]
    assert done.slices == run.events.num_rows


def test_every_slice_has_its_exact_time_name_and_category(exported, run: Run) -> None:
    _, _, trace = exported
    e = Events.of(run.events)
    names = [KIND_NAME[EventKind(k)] for k in e.kind.tolist()]
    wanted = sorted(zip((e.t0_ns - START_NS).tolist(), e.dur_ns.tolist(), names, strict=True))
    assert sorted(trace.sql("select ts, dur, name from slice")) == wanted
    classes = dict(trace.sql("select distinct name, category from slice"))
    assert classes["launch"] == "launch" and classes["gemm1"] == "busy"
    assert classes["dispatch"] == "comm" and classes["wait_rows"] == "wait"


def test_everything_lies_inside_the_launch_of_its_actor(exported, run: Run) -> None:
    _, _, trace = exported
    outside = "depth = 0 and name != 'launch' and dur > 0"
    assert trace.sql(f"select count(*) from slice where {outside}") == [(0,)]
    assert trace.sql("select count(*) from slice where name = 'launch' and depth > 0") == [(0,)]
    # Spans lie side by side: nothing but instants is deeper than one.
    deep = trace.sql("select count(*) from slice where depth > 1 and dur > 0")
    assert deep == [(0,)]
    actors = len({(r["rank"], r["sm"], r["lane"]) for r in run.events.to_pylist()})
    assert trace.sql("select count(distinct track_id) from slice") == [(actors,)]


def test_values_of_an_event_can_be_asked_for(exported, run: Run) -> None:
    _, _, trace = exported
    prefix = "debug" if exported[0] == "perfetto" else "args"
    e = Events.of(run.events)
    columns = ("iter", "expert", "tile", "stall_ns")
    select = ", ".join(f"extract_arg(arg_set_id, '{prefix}.{name}')" for name in columns)
    got = trace.sql(f"select {select} from slice where name = 'gemm1'")
    mine = np.flatnonzero(e.kind == EventKind.GEMM1)
    assert sorted(got) == sorted(zip(*(getattr(e, c)[mine].tolist() for c in columns), strict=True))
    none = trace.sql(
        f"select count(*) from slice where extract_arg(arg_set_id, '{prefix}.peer') is not null"
        " and name in ('gemm1', 'gemm2', 'combine', 'launch')"
    )
    assert none == [(0,)]


def test_sql_over_the_export_gives_the_payload_matrix(exported, run: Run) -> None:
    kind, _, trace = exported
    prefix = "debug" if kind == "perfetto" else "args"
    rows = trace.sql(f"""
      with owner as (
        select id, upid from process_track
        union all select thread_track.id, upid from thread_track join thread using (utid))
      select pid - 1 as source, extract_arg(slice.arg_set_id, '{prefix}.peer') as peer,
             sum(extract_arg(slice.arg_set_id, '{prefix}.bytes')) as bytes
      from slice join owner on slice.track_id = owner.id join process using (upid)
      where slice.name in ('dispatch', 'put') and source != peer group by source, peer""")
    wanted = matrix(Events.of(run.events))
    assert {(s, d): n for s, d, n in rows} == wanted
    counters = trace.sql(
        "select name, max(value), min(value), min(ts) from counter join counter_track on"
        " counter.track_id = counter_track.id group by counter_track.id"
    )
    found = {}
    for name, total, least, first in counters:
        words = name.split()
        found[int(words[2]), int(words[5])] = int(total)
        assert (least, first) == (0, 0)
    assert found == wanted


def test_flows_lead_from_dispatch_to_tile_and_from_tile_to_combine(exported, run: Run) -> None:
    _, done, trace = exported
    rows = trace.sql(
        "select a.name as source, b.name as target, count(*), min(b.ts - a.ts) from flow"
        " join slice a on flow.slice_out = a.id join slice b on flow.slice_in = b.id"
        " group by a.name, b.name order by a.name"
    )
    assert [row[:2] for row in rows] == [("dispatch", "gemm1"), ("gemm2", "combine")]
    assert sum(row[2] for row in rows) == done.flows > 0
    assert all(row[3] > 0 for row in rows)
    dispatches = trace.sql("select count(*) from slice where name = 'dispatch'")[0][0]
    assert rows[0][2] == dispatches


def test_processes_say_what_the_ranks_were(exported) -> None:
    names = [
        row[0] for row in exported[2].sql("select name from process where pid > 0 order by pid")
    ]
    assert names == [f"rank {r} (host engine, not a GPU)" for r in range(3)]


def test_tracks_are_named_by_sm_and_lane(exported) -> None:
    kind, _, trace = exported
    sql = "select distinct thread.name from thread_track join thread using (utid)"
    if kind == "perfetto":
        sql = "select distinct name from track where id in (select track_id from slice)"
    names = {row[0] for row in trace.sql(sql)}
    assert names >= {"SM 17 comm0", "SM 18 math1"}


def test_protobuf_classes_read_what_was_packed(run: Run, tmp_path: Path) -> None:
    pb = pytest.importorskip("perfetto.protos.perfetto.trace.perfetto_trace_pb2")
    path = tmp_path / "run.pftrace"
    export(run, "perfetto", path)
    trace = pb.Trace.FromString(path.read_bytes())
    packets = [p.track_event for p in trace.packet if p.HasField("track_event")]
    event = pb.TrackEvent
    kinds = {t: sum(p.type == t for p in packets) for t in range(5)}
    e = Events.of(run.events)
    puts = int((e.kind == EventKind.PUT).sum())
    assert kinds[event.TYPE_INSTANT] == puts
    assert kinds[event.TYPE_SLICE_BEGIN] == kinds[event.TYPE_SLICE_END] == len(e) - puts
    # Parsed and written again, the padding is gone and nothing else.
    again = pb.Trace.FromString(trace.SerializeToString())
    assert again == trace
    names = {n.iid: n.name for n in trace.packet[0].interned_data.debug_annotation_names}
    dispatch = next(p for p in packets if p.name_iid == EventKind.DISPATCH)
    values = {names[a.name_iid]: a.uint_value for a in dispatch.debug_annotations}
    assert set(values) == {"iter", "expert", "tile", "peer", "bytes"}
    assert len(dispatch.flow_ids) == 1


def test_chrome_file_is_json_with_microseconds_to_three_decimals(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    export(run, "chrome", path)
    text = path.read_text()
    told = json.loads(text, parse_float=str)
    slices = [x for x in told["traceEvents"] if x["ph"] in "Xi"]
    assert len(slices) == run.events.num_rows
    assert all(len(x["ts"].split(".")[1]) == 3 for x in slices)
    assert "host engine" in told["otherData"]["world"]


def overlapping() -> Run:
    """Spans that touch, overlap, lie at one time, and one that outlives its launch."""
    run = run_of(np.ones((1, 2, 2, 2), int))
    t = Table()
    where = {"rank": 0, "cta": 0, "sm": 5, "lane": int(Lane.MATH0)}
    for begin, duration in [(0, 100), (100, 50), (120, 40), (150, 0), (150, 10), (160, 500)]:
        t.add(EventKind.GEMM1, begin, duration, **where)
    t.add(EventKind.PUT, 0, 0, peer=1, aux=5, **where)
    t.add(EventKind.LAUNCH, 0, 300, **where)
    t.add(EventKind.LAUNCH, 300, 100, iter=1, **where)
    t.add(EventKind.WAIT_RETURN, 390, 10, flags=int(RecordFlag.OPEN), iter=1, peer=1, **where)
    return Run(t.table(), run.plan, run.counts, {})


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_slices_that_would_not_nest_are_kept_on_a_track_of_their_own(
    format: str, tmp_path: Path
) -> None:
    run = overlapping()
    path = tmp_path / "out"
    export(run, format, path)
    trace = Loaded(path)
    assert trace.complaints() == []
    e = Events.of(run.events)
    wanted = sorted(zip((e.t0_ns - START_NS).tolist(), e.dur_ns.tolist(), strict=True))
    assert sorted(trace.sql("select ts, dur from slice")) == wanted
    assert trace.sql("select count(distinct track_id) > 1 from slice") == [(1,)]


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize(("begin", "duration"), [(200, 101), (-50, 51)])
def test_slice_that_crosses_the_edge_of_its_launch_keeps_its_length(
    format: str, begin: int, duration: int, tmp_path: Path
) -> None:
    t = Table()
    where = {"rank": 0, "cta": 0, "sm": 5, "lane": int(Lane.SCHED)}
    t.add(EventKind.SCHEDULE, begin + 50, duration, **where)
    t.add(EventKind.LAUNCH, 50, 300, **where)
    small = run_of(np.ones((1, 1, 1, 1), int))
    export(Run(t.table(), small.plan, small.counts, {}), format, tmp_path / "out")
    trace = Loaded(tmp_path / "out")
    assert trace.complaints() == []
    assert trace.sql("select name, dur, depth from slice order by name") == [
        ("launch", 300, 0),
        ("schedule", duration, 0),
    ]


def test_instant_at_the_begin_of_a_span_written_earlier_shares_its_track() -> None:
    t = Table()
    where = {"rank": 0, "cta": 0, "sm": 5, "lane": int(Lane.MATH0)}
    t.add(EventKind.GEMM2, 0, 100, **where)
    t.add(EventKind.GEMM2, 100, 50, **where)
    t.add(EventKind.PUT, 100, 0, peer=1, aux=5, **where)
    t.add(EventKind.LAUNCH, 0, 300, **where)
    plan = lay_out(Events.of(t.table()))
    assert [track.name for track in plan.tracks] == ["SM 5 math0"]
    assert plan.event[~plan.is_end].tolist() == [3, 0, 2, 1]
    assert np.flatnonzero(plan.is_end).tolist() == [4]


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_large_values_survive(format: str, tmp_path: Path) -> None:
    t = Table()
    where = {"rank": 65_000, "cta": 0, "sm": 65_535, "lane": int(Lane.COMM0), "iter": 65_535}
    t.add(EventKind.LAUNCH, 0, 1 << 45, aux=0xFFFFFFFF, **where)
    t.add(EventKind.DISPATCH, 1 << 44, (1 << 32) - 1, peer=65_534, expert=65_534, tile=0xFFFFFFFE,
          aux=0xFFFFFFFF, flags=2, **where)  # fmt: skip
    small = run_of(np.ones((1, 1, 1, 1), int))
    path = tmp_path / "out"
    export(Run(t.table(), small.plan, small.counts, {}), format, path)
    trace = Loaded(path)
    assert trace.complaints() == []
    prefix = "debug" if format == "perfetto" else "args"
    names = ("peer", "expert", "tile", "bytes", "iter", "flags")
    select = ", ".join(f"extract_arg(arg_set_id, '{prefix}.{name}')" for name in names)
    assert trace.sql(f"select ts, dur, {select} from slice where name = 'dispatch'") == [
        (1 << 44, (1 << 32) - 1, 65_534, 65_534, 0xFFFFFFFE, 0xFFFFFFFF, 65_535, 2)
    ]


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_run_without_events_gives_a_file_that_loads(format: str, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "out"
    empty = Run(run.events.slice(0, 0), run.plan.slice(0, 0), run.counts.slice(0, 0), {})
    assert export(empty, format, path).slices == 0
    assert Loaded(path).complaints() == []


def test_gzip_by_name(run: Run, tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.pftrace", tmp_path / "a.pftrace.gz"
    export(run, "perfetto", plain)
    export(run, "perfetto", packed)
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()
    assert Loaded(packed).sql("select count(*) from slice") == [(run.events.num_rows,)]


def test_existing_output_is_refused_without_force_and_then_whole(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("mine")
    with pytest.raises(FlashmoeError, match="exists") as raised:
        export(run, "chrome", path)
    assert "-f" in raised.value.hint and path.read_text() == "mine"
    export(run, "chrome", path, force=True)
    assert json.loads(path.read_text())["traceEvents"]
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_full_disk_leaves_what_was_there(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.json"
    path.write_text("mine")

    def pieces(*_: object):
        yield b"begun"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_writer.chrome, "pieces", pieces)
    with pytest.raises(FlashmoeError, match="No space left"):
        export(run, "chrome", path, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"] and path.read_text() == "mine"


def test_unknown_format_and_folder_are_usage_errors(run: Run, tmp_path: Path) -> None:
    for format, path in (("nsys", tmp_path / "x"), ("chrome", tmp_path)):
        with pytest.raises(FlashmoeError) as raised:
            export(run, format, path)
        assert raised.value.exit_code == 2


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="no /dev/null here")
def test_a_device_is_never_replaced_by_a_file(run: Run, tmp_path: Path) -> None:
    device = tmp_path / "null"
    device.symlink_to("/dev/null")
    for path in (Path("/dev/null"), device):
        with pytest.raises(FlashmoeError, match="is no file") as raised:
            export(run, "chrome", path, force=True)
        assert raised.value.exit_code == 2 and not path.is_file()


def test_a_missing_folder_is_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(FlashmoeError, match=f"no directory {tmp_path / 'none'}") as raised:
        export(run, "chrome", tmp_path / "none" / "x.json")
    assert raised.value.exit_code == 2


def test_blocks_join_without_a_seam(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashmoe.trace.export import chrome, perfetto

    whole = {}
    for format in FORMATS:
        export(run, format, tmp_path / f"whole-{format}")
        whole[format] = (tmp_path / f"whole-{format}").read_bytes()
    monkeypatch.setattr(perfetto, "_UNITS_A_BLOCK", 7)
    monkeypatch.setattr(chrome, "_EVENTS_A_BLOCK", 7)
    export(run, "perfetto", tmp_path / "p")
    assert (tmp_path / "p").read_bytes() == whole["perfetto"]
    export(run, "chrome", tmp_path / "c")
    lines = sorted((tmp_path / "c").read_bytes().splitlines())
    assert lines == sorted(whole["chrome"].splitlines())


def test_columns_take_nulls_and_plain_integers(run: Run) -> None:
    e = Events.of(run.events)
    table = run.events
    for name, values in (("kind", e.kind), ("lane", e.lane)):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, pa.array(values))
    at = table.schema.get_field_index("peer")
    nulls = pa.array(e.peer.astype(object), mask=e.peer == 0xFFFF, type=pa.uint16())
    table = table.set_column(at, "peer", nulls)
    for name in Events.__dataclass_fields__:
        assert np.array_equal(getattr(Events.of(table), name), getattr(e, name)), name

"""``flashmoe trace``."""

from __future__ import annotations

from flashmoe_cli import options as o
from flashmoe_cli.output import emit, terminal


def trace(
    preset: o.PresetName = None,
    tokens_per_rank: o.TokensPerRank = None,
    hidden: o.Hidden = None,
    intermediate: o.Intermediate = None,
    experts: o.Experts = None,
    top_k: o.TopK = None,
    activation: o.ActivationName = None,
    dtype: o.DTypeName = None,
    checkpoint: o.Checkpoint = None,
    layer: o.Layer = None,
    tokens_file: o.TokensFile = None,
    seed: o.Seed = 0,
    skew: o.Skew = 0.0,
    ranks: o.Ranks = None,
    world: o.WorldName = o.World.auto,
    processes: o.Processes = False,
    gpus: o.Gpus = None,
    ranks_per_gpu: o.RanksPerGpu = None,
    transport: o.TransportName = o.Transport.auto,
    no_pointers: o.NoPointers = False,
    dry_run: o.DryRun = False,
    sms_per_rank: o.Sms = None,
    device: o.AskedDevice = None,
    iterations: o.Iterations = None,
    warmup: o.Warmup = None,
    deadline: o.Deadline = None,
    no_check: o.NoCheck = False,
    fault: o.FaultSpec = None,
    output: o.Output = None,
    save_output: o.SaveOutput = None,
    ring_capacity: o.RingCapacity = None,
    ring_mode: o.RingModeName = o.RingMode.keep_first,
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Runs a layer traced, saves the run and shows its timeline.

    The run directory holds every event of every SM; timeline, traffic and export read it.  Runs on
    the GPU if there is one, else on the host engine, and says which.
    """
    given = dict(locals())
    from flashmoe_cli.reading import open_traced, timeline_json, timeline_text
    from flashmoe_cli.recording import end, record, result_json
    from flashmoe_cli.render.result import next_lines, result_lines

    result = record(given, traced=True)
    where = terminal()
    drawn = result.hang is None and result.path is not None
    if as_json:
        whole = result_json("trace", result)
        if drawn:
            whole["timeline"] = timeline_json(open_traced(result.path))
        emit(whole)
    else:
        lines = result_lines(result, where, verbose=verbose)
        if drawn:
            lines += ["", *timeline_text(open_traced(result.path), where)]
        if not quiet and result.path is not None:
            lines += ["", *next_lines(result, where)]
        emit(lines)
    end(result, as_json)

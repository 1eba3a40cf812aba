"""``flashmoe run``."""

from __future__ import annotations

from flashmoe_cli import options as o
from flashmoe_cli.output import emit, terminal


def run(
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
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Runs a layer and holds the result against the float32 reference.

    Prints the errors, the time and the traffic between ranks.  Runs on the GPU if there is one,
    else on the host engine, and says which.
    """
    given = dict(locals())
    from flashmoe_cli.recording import end, record, result_json
    from flashmoe_cli.render.result import result_lines

    result = record(given, traced=False)
    if as_json:
        emit(result_json("run", result))
    else:
        emit(result_lines(result, terminal(), verbose=verbose))
    end(result, as_json)

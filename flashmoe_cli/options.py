"""The options that several verbs share: one name, one help text, one meaning."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from flashmoe_cli.completion import complete_presets, complete_runs

#: The longest deadline: the engines keep it as 64 bits of ns, four times over in the first launch.
MOST_SECONDS = 1e6

SHAPE = "Shape"
INPUT = "Input"
WHERE = "Where and how"
SAVED = "What is saved"


class World(StrEnum):
    """Where ranks live."""

    auto = "auto"
    host = "host"
    local = "local"


class Transport(StrEnum):
    """How ranks that are processes on GPUs reach each other."""

    auto = "auto"
    ipc = "ipc"
    nvshmem = "nvshmem"


class DType(StrEnum):
    """Element types of tokens and weights."""

    bf16 = "bf16"
    fp16 = "fp16"


class Activation(StrEnum):
    """What stands between an expert's two matrices."""

    swiglu = "swiglu"
    geglu = "geglu"
    relu = "relu"
    gelu = "gelu"
    silu = "silu"


class RingMode(StrEnum):
    """Which records a full ring keeps."""

    keep_first = "keep-first"
    keep_last = "keep-last"


PresetName = Annotated[
    str | None,
    typer.Argument(
        metavar="PRESET",
        rich_help_panel="What",
        show_default=False,
        autocompletion=complete_presets,
        help="A shape by name (flashmoe presets lists them); without one, tiny.",
    ),
]
RunPath = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN",
        rich_help_panel="What",
        show_default=False,
        autocompletion=complete_runs,
        help="A run directory, or its name in $FLASHMOE_RUNS; without one, the latest run.",
    ),
]


def _option(*flags: str, help: str, panel: str = "Options", **more: Any) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel=panel, show_default=False, **more)


TokensPerRank = Annotated[
    str | None,
    _option(
        "-T",
        "--tokens-per-rank",
        metavar="N",
        help="Tokens of each rank; a list with commas gives each rank its own.",
        panel=SHAPE,
    ),
]
Hidden = Annotated[int | None, _option("--hidden", metavar="N", help="Model width H.", panel=SHAPE)]
Intermediate = Annotated[
    int | None,
    _option("--intermediate", metavar="N", help="Hidden width I of an expert.", panel=SHAPE),
]
Experts = Annotated[
    int | None, _option("--experts", metavar="N", help="Experts E in all.", panel=SHAPE)
]
TopK = Annotated[
    int | None, _option("--top-k", metavar="N", help="Experts k of a token.", panel=SHAPE)
]
ActivationName = Annotated[
    Activation | None, _option("--activation", help="The experts' activation.", panel=SHAPE)
]
DTypeName = Annotated[
    DType | None, _option("--dtype", help="Type of tokens and weights.", panel=SHAPE)
]

Checkpoint = Annotated[
    Path | None,
    _option(
        "--checkpoint",
        metavar="DIR",
        help="A Hugging Face checkpoint folder: run one of its MoE layers.",
        panel=INPUT,
    ),
]
Layer = Annotated[
    int | None,
    _option("--layer", metavar="N", help="With --checkpoint: the layer's number.", panel=INPUT),
]
TokensFile = Annotated[
    Path | None,
    _option(
        "--tokens",
        metavar="FILE",
        help="Hidden states [T, H] from .safetensors or .npy, shared out over the ranks.",
        panel=INPUT,
    ),
]
Seed = Annotated[
    int,
    _option(
        "--seed",
        metavar="N",
        help="Seed of random weights and tokens (0).",
        panel=INPUT,
        min=-(2**63),
        max=2**63 - 1,
    ),
]
Skew = Annotated[
    float,
    _option(
        "--skew",
        metavar="S",
        help="Zipf exponent of the routing of random tokens; 0 is even (0).",
        panel=INPUT,
        min=0.0,
        max=100.0,  # above it logits overflow, and nothing is left to check
    ),
]

Ranks = Annotated[
    int | None, _option("--ranks", metavar="N", help="Ranks W (1).", panel=WHERE, min=1)
]
Processes = Annotated[
    bool,
    _option("--processes", help="Each rank a process of its own (host engine).", panel=WHERE),
]
Gpus = Annotated[
    int | None,
    _option(
        "--gpus", metavar="N", help="A process a GPU, on so many GPUs of this node.", panel=WHERE,
        min=1,
    ),
]  # fmt: skip
RanksPerGpu = Annotated[
    int | None,
    _option(
        "--ranks-per-gpu",
        metavar="R",
        help="With --gpus: so many processes on each, which share its SMs (1).",
        panel=WHERE,
        min=1,
    ),
]
TransportName = Annotated[
    Transport,
    _option(
        "--transport",
        help="How processes on GPUs reach each other (auto: what there is, and says why).",
        panel=WHERE,
    ),
]
NoPointers = Annotated[
    bool,
    _option(
        "--no-pointers",
        help="Use put-with-signal even where pointers reach the other ranks.",
        panel=WHERE,
    ),
]
DryRun = Annotated[
    bool,
    _option(
        "--dry-run",
        help="Print the commands that start this on several nodes (srun, torchrun), and end.",
        panel=WHERE,
    ),
]
WorldName = Annotated[
    World,
    _option(
        "--world",
        help="Where ranks live: on one GPU (local), as threads (host), or what there is (auto).",
        panel=WHERE,
    ),
]
Sms = Annotated[
    int | None,
    _option(
        "--sms-per-rank",
        metavar="N",
        help="SMs of each rank; by default the GPU's shared evenly, 2 on the host engine.",
        panel=WHERE,
        min=1,
    ),
]
Device = Annotated[
    int, _option("--device", metavar="N", help="The GPU, by number (0).", panel=WHERE, min=0)
]
AskedDevice = Annotated[
    int | None,
    _option(
        "--device",
        metavar="N",
        help="The GPU, by number (0). To name one is to ask for a GPU.",
        panel=WHERE,
        min=0,
    ),
]
Iterations = Annotated[
    int | None,
    _option("-n", "--iterations", metavar="N", help="Measured launches.", panel=WHERE, min=1),
]
Warmup = Annotated[
    int | None,
    _option("--warmup", metavar="N", help="Launches before the measured ones.", panel=WHERE, min=0),
]
Deadline = Annotated[
    float | None,
    _option(
        "--deadline",
        metavar="SECONDS",
        help="Longest that any wait may take before the run counts as hung (10; more for "
        "much arithmetic on the host engine); four times that in the first launch.",
        panel=WHERE,
        min=0.001,
        max=MOST_SECONDS,
    ),
]
NoCheck = Annotated[
    bool,
    _option("--no-check", help="Leave out the comparison with the float32 reference.", panel=WHERE),
]
FaultSpec = Annotated[
    list[str] | None,
    _option(
        "--fault",
        metavar="KIND:RANK[:...]",
        help="Break something on purpose: never-starts:RANK, lost-signal:RANK:EXPERT, "
        "wrong-count:RANK:PEER:EXPERT, slow:RANK:SECONDS; of processes killed:RANK:POINT or "
        "raises:RANK:POINT, where POINT is start, joined or kernel[:SECONDS].",
        panel=WHERE,
    ),
]

Output = Annotated[
    Path | None,
    _option(
        "-o",
        "--output",
        metavar="NAME.fmoe",
        help="The run directory, with or without .fmoe; by default PRESET-DATE-TIME.fmoe in "
        "$FLASHMOE_RUNS or here.",
        panel=SAVED,
    ),
]
Force = Annotated[bool, _option("-f", "--force", help="Replace what is there.", panel=SAVED)]
SaveOutput = Annotated[
    Path | None,
    _option(
        "--save-output",
        metavar="FILE",
        help="Write y, and the chosen ids and weights, as safetensors.",
        panel=SAVED,
    ),
]
RingCapacity = Annotated[
    int | None,
    _option(
        "--ring-capacity",
        metavar="RECORDS",
        help="Records that each actor's ring holds; by default enough for the whole run.",
        panel=SAVED,
        min=1,
        max=2**32 - 1,
    ),
]
RingModeName = Annotated[
    RingMode,
    _option(
        "--ring-mode",
        help="Which records a full ring keeps (keep-first).",
        panel=SAVED,
    ),
]

Json = Annotated[bool, _option("--json", help="Print one JSON object, and nothing else.")]
Quiet = Annotated[bool, _option("-q", "--quiet", help="No progress, and only the result.")]
Verbose = Annotated[bool, _option("-v", "--verbose", help="Say more.")]

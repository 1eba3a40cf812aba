"""A hang of the GPU kernel: its flight recorder as it was read from an H200.

Eight virtual ranks of 16 SMs (H 512, I 512, E 16, k 4, 257 tokens and 13 more with each rank), a
deadline of 0.3 s, and rank 3's signal for expert 7 withheld.  ``data/h200_lost_signal.npz`` holds
the slots' bytes, the counts by chunk and as seen, and the first column of GEMM1 tiles.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flashmoe.trace.diagnosis import diagnose
from flashmoe.trace.schema import FLIGHT_SLOT

DATA = Path(__file__).parent / "data" / "h200_lost_signal.npz"


def test_the_rank_whose_signal_was_withheld_is_named() -> None:
    held = np.load(DATA)
    slots = held["slots"].reshape(-1).view(FLIGHT_SLOT)
    given = {
        "ranks": 8,
        "deadline_s": 0.3,
        "now_ns": int(slots["since_ns"].max()),
        "counts_seen": held["seen"],
        "chunk_counts": held["counts"],
    }
    report = diagnose(slots, tiles=held["tiles"], **given)
    assert (report.cause, report.culprit) == ("lost-signal", 3), report.text
    assert report.chain[-1].kind == "wait_rows" and report.chain[-1].expert == 7
    # Without the plan the number that lacks cannot be matched: nobody is accused.
    assert diagnose(slots, **given).culprit is None

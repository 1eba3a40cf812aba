"""Runs with random faults, one after the other: none may hang, or leave anything behind.

    python tests/procs/random_faults.py --runs 200 [--seed 0]

Each run has 2 to 4 ranks as processes, by pointers or by puts, and one to two faults out of: a
rank killed or raising before the rendezvous, after it or inside a launch; killed, stopped, or
stopped and continued from outside at a random moment; a lost signal, a wrong count, a rank that
never starts or is slow; Ctrl-C; the launcher killed.  The exit code must be one that the faults
explain, and come within the time that they allow.  Prints a line a run, and exits 1 at the first
that is wrong.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))
    from harness import Done, Job  # type: ignore[import-not-found]
else:
    from .harness import Done, Job

DEADLINE_S = 1.0
#: Loading, rendezvous and writing on a crowded machine; a hang would take for ever.
LIMIT_S = 60.0

OUTSIDE = ("kill", "stop", "pause", "interrupt", "kill-launcher")
INSIDE = ("killed", "raises", "lost-signal", "wrong-count", "never-starts", "slow")


def draw(rng: random.Random) -> tuple[list[str], list[str], str]:
    """(arguments, what shall happen from outside, a name for it all)."""
    ranks = rng.randint(2, 4)
    args = ["trace", "tiny", "--world", "host", "--processes", "--ranks", str(ranks), "-T", "16"]
    args += ["-n", str(rng.choice([1, 3, 40])), "--deadline", str(DEADLINE_S), "-o", "run.fmoe"]
    if rng.random() < 0.4:
        args.append("--no-pointers")
    faults, outside = [], []
    for _ in range(rng.randint(1, 2)):
        kind = rng.choice(OUTSIDE + INSIDE)
        rank = rng.randrange(ranks)
        if kind in OUTSIDE:
            outside.append(f"{kind}:{rank}")
        elif kind in ("killed", "raises"):
            point = rng.choice(["start", "joined", f"kernel:{rng.uniform(0, 0.05):.3f}"])
            faults.append(f"{kind}:{rank}:{point}")
        elif kind == "lost-signal":
            faults.append(f"{kind}:{rank}:{rng.randrange(8)}")
        elif kind == "wrong-count":
            faults.append(f"{kind}:{rank}:{rng.randrange(ranks)}:{rng.randrange(8)}")
        elif kind == "slow":
            faults.append(f"{kind}:{rank}:{rng.uniform(0.001, 0.02):.3f}")
        else:
            faults.append(f"{kind}:{rank}")
    for fault in faults:
        args += ["--fault", fault]
    return args, outside, " ".join([f"W={ranks}", *args[13:], *outside])


def act(job: Job, what: str, rng: random.Random) -> None:
    """One thing from outside, at a random moment of the run's first seconds."""
    kind, _, rank = what.partition(":")
    time.sleep(rng.uniform(0.0, 4.0))
    if job.process.poll() is not None:
        return
    if kind == "interrupt":
        job.process.send_signal(signal.SIGINT)
    elif kind == "kill-launcher":
        job.process.kill()
    else:
        pids = [pid for pid, line in job.pids().items() if f"rank={rank}\0" in line]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
                if kind == "pause":
                    time.sleep(DEADLINE_S / 4)
                    os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                pass


def allowed(args: list[str], outside: list[str]) -> set[int]:
    """Exit codes that these faults can lead to; 0 too, since each may come too late."""
    codes = {0}
    for what in outside:
        kind = what.partition(":")[0]
        codes |= {
            "kill": {1}, "stop": {1, 124}, "pause": {124}, "interrupt": {130, -signal.SIGINT},
            "kill-launcher": {-signal.SIGKILL},
        }[kind]  # fmt: skip
    for fault in (a for a in args if ":" in a):
        kind = fault.partition(":")[0]
        # A wrong count may hang nothing and only spoil the result.
        codes |= {"killed": {1}, "raises": {1}, "wrong-count": {1, 124}}.get(kind, {124})
    return codes


def one(number: int, seed: int) -> str:
    """One run; how it ended.  Raises AssertionError where it did so wrongly."""
    rng = random.Random(seed * 1_000_003 + number)
    args, outside, name = draw(rng)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        job = Job(Path(folder), tuple(args), {"FLASHMOE_RENDEZVOUS_S": "12"})
        for what in outside:
            act(job, what, rng)
        try:
            done = job.end(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name}: hung") from None
        took = time.monotonic() - began
        assert done.code in allowed(args, outside), f"{name}: {done}"
        assert "Traceback" not in _own(done), f"{name}: {done}"
        left = job.left(within=5.0)
        assert left == [], f"{name}: left {left}"
    print(f"{number:4} {took:5.1f} s  exit {done.code:4}  {name}", flush=True)
    return str(done.code)


def _own(done: Done) -> str:
    """What the launcher itself said, without the lines of the ranks."""
    return "\n".join(line for line in done.err.splitlines() if not line.startswith("[rank "))


def main() -> None:
    """Runs them all, and counts exit codes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    ended = collections.Counter(
        one(number, given.seed) for number in range(given.first, given.first + given.runs)
    )
    print(f"{given.runs} runs, none left hanging; exit codes: {dict(sorted(ended.items()))}")


if __name__ == "__main__":
    main()

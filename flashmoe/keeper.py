"""Tidies up after a launcher that was killed: a process of its own that outlives it by seconds.

Run as a script, with nothing of flashmoe imported.  It reads one JSON object a line from stdin:
what to do should stdin end before a line says ``{"done": true}``.

    {"watch": PID}              end this process, if it has not ended by itself in GRACE_S
    {"remove": PATH}            a file or a directory
    {"restore": [OLD, PATH]}    rename OLD back to PATH, or remove it where PATH is there
    {"run": [ARGV...], "env": {...}}    a command, such as one that stops a daemon
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

GRACE_S = 2.5


def main() -> None:
    """Reads orders until stdin ends, then carries them out, unless told that all is done."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    orders = []
    watched = {}
    for line in sys.stdin:
        order = json.loads(line)
        if order.get("done"):
            return
        if "watch" in order:
            # Held from now on, so that the number of a process that ended is never taken for it.
            with contextlib.suppress(OSError):
                watched[order["watch"]] = os.pidfd_open(order["watch"])
        else:
            orders.append(order)
    _end(list(watched.values()))
    for order in orders:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            _carry_out(order)


def _end(watched: list[int]) -> None:
    until = time.monotonic() + GRACE_S
    while watched and time.monotonic() < until:
        watched = [fd for fd in watched if _alive(fd)]
        time.sleep(0.05)
    for fd in watched:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)


def _alive(fd: int) -> bool:
    try:
        signal.pidfd_send_signal(fd, 0)
    except OSError:
        return False
    return True


def _carry_out(order: dict) -> None:  # type: ignore[type-arg]
    if "remove" in order:
        path = order["remove"]
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)
    elif "restore" in order:
        old, path = order["restore"]
        if os.path.exists(path):
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, path)
    elif "run" in order:
        subprocess.run(
            order["run"],
            env=os.environ | order.get("env", {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=5,
            check=False,
        )


class Keeper:
    """The launcher's side: give orders, and say ``done()`` when nothing is left to tidy up."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def order(self, **what: object) -> None:
        """One order, such as ``remove="/some/path"``; see the top of this file."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()

    def done(self) -> None:
        """All is tidy: the keeper ends and does nothing."""
        self.order(done=True)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()


if __name__ == "__main__":
    main()

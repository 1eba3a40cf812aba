"""What a run's launches move over NVLink by the GPUs' own counters, beside the payload they carry.

The counters are of the whole GPU and of whoever uses its links, so all ranks stand still while they
are read, before the first launch and after the last.  Every launch routes the same tokens, hence
carries the same payload.
"""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmoe.nvlink import ENOUGH_BYTES, Counters, NoCountersError, read_counters
from flashmoe.verdict import traffic_of
from flashmoe.world.base import Routing

if TYPE_CHECKING:
    from flashmoe.config import MoEConfig
    from flashmoe.world.rendezvous import Job

MOST_LAUNCHES = 64
MOST_S = 1.0
"""Launches beyond the run's own are added up to so many, and for about so long."""


class LinkBytes:
    """One rank's part in counting; collective: ``begin``, then ``more`` and ``end`` on all ranks.

    ``gpus`` names the GPU of each rank by its 16 bytes.  Where all are one, and where there is
    none, nothing is asked and ``report`` stays None.
    """

    def __init__(self, job: Job, device: int, gpus: Sequence[bytes]) -> None:
        self._job, self._device, self._gpus = job, device, list(gpus)
        self._before: Counters | None = None
        self._counted_by_any = False
        self._settled = True
        self._nodes: list[bytes] = []
        self._launches = 0
        self._payload = np.zeros((job.world, job.world), np.int64)
        self._why = ""
        self.report: dict[str, Any] | None = None

    @property
    def _active(self) -> bool:
        return len(set(self._gpus)) > 1

    def begin(self) -> None:
        """Reads the counters before the first launch of all."""
        if not self._active:
            return
        self._nodes = self._job.gather("links", _node())  # nothing of an earlier phase moves now
        self._before = self._read()
        # No rank begins before all have read: its first bytes would count as an earlier phase's.
        said = self._job.gather("links", b"1" if self._before else b"")
        self._counted_by_any = any(said)

    def more(
        self, launches: int, config: MoEConfig, rows: np.ndarray, ms: float, *, may_run: bool
    ) -> int:
        """How many launches more all ranks run, so that the counters rise well above their step.

        ``launches`` have been run, each of ``ms``, in which this rank sent ``rows`` [E] to each
        expert.  0 unless ``may_run``.
        """
        if not self._active:
            return 0
        own = json.dumps({"rows": rows.tolist(), "ms": ms}).encode()
        said = [json.loads(word) for word in self._job.gather("links", own)]
        counts = np.array([word["rows"] for word in said], np.uint32)[:, None, :]
        _, payload = traffic_of([Routing(counts, np.zeros(0))], config, self._job.world)
        self._payload = payload.astype(np.int64)
        self._launches = launches
        if not may_run or not self._counted_by_any:
            return 0
        sent = [self._crossing(rank)[0] for rank in range(self._job.world)]
        least = min((n for n in sent if n), default=0)
        slowest = max(word["ms"] for word in said)
        if not least or launches * least >= ENOUGH_BYTES:
            return 0
        lacking = -(-ENOUGH_BYTES // least) - launches
        within = int(MOST_S * 1000 / slowest) if slowest > 0 else MOST_LAUNCHES
        added = min(lacking, MOST_LAUNCHES, within)
        self._launches += added
        return added

    def end(self) -> None:
        """Reads the counters after the last launch of all, and fills ``report``."""
        if not self._active:
            return
        self._job.barrier("links")  # all of the others' bytes have come
        after = self._read() if self._before is not None else None
        moved = None
        if self._before is not None and after is not None:
            moved = after.since(self._before)
            if min(asdict(moved).values()) < 0:
                moved, self._why = None, "they were set back meanwhile"
        sent, received = self._crossing(self._job.rank)
        self.report = {
            "launches": self._launches,
            "gpu": f"GPU-{uuid.UUID(bytes=self._gpus[self._job.rank])}",  # as NVML names it
            "why": self._why if moved is None else "",
            "counters": None if moved is None else asdict(moved),
            "certain": moved is not None
            and self._settled
            and min(moved.data_tx, moved.data_rx) >= ENOUGH_BYTES,
            "payload_tx": sent,
            "payload_rx": received,
        }

    def _read(self) -> Counters | None:
        try:
            found, settled = read_counters(self._device)
        except NoCountersError as exc:
            self._why = str(exc)
            return None
        self._settled = self._settled and settled
        return found

    def _crossing(self, rank: int) -> tuple[int, int]:
        """Payload that leaves and reaches a rank's GPU a launch, to and from others of its node."""
        gpus, nodes = self._gpus, self._nodes
        ranks = range(len(gpus))
        here = [r for r in ranks if gpus[r] == gpus[rank]]
        there = [r for r in ranks if gpus[r] != gpus[rank] and nodes[r] == nodes[rank]]
        payload = self._payload
        return int(payload[np.ix_(here, there)].sum()), int(payload[np.ix_(there, here)].sum())


def _node() -> bytes:
    """A name that all processes of one machine give, and no other's."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return socket.gethostname().encode()

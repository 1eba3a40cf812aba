"""How ranks that are processes find each other: who am I, how many are we, and a store for all.

One function for every launcher: ``rendezvous()`` takes the variables of torchrun, srun or mpirun,
or what our own launcher says, and gives a :class:`Job`.  Its store is torch's ``TCPStore``.  Every
wait in it has a deadline and ends at once when some rank is known to have failed; either way the
error names who was missing.
"""

from __future__ import annotations

import os
import re
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from flashmoe.digits import whole_number
from flashmoe.errors import FlashmoeError

if TYPE_CHECKING:
    from torch.distributed import Store

TIMEOUT_S = 120.0
"""How long a rank waits for the others to start: loading torch from a cold disk takes a while.
``FLASHMOE_RENDEZVOUS_S`` in the environment is taken instead."""

_FAILED = "failed"
_FIRST_PORT, _PORTS = 20000, 20000


@dataclass(frozen=True)
class Place:
    """One process among those of a job.

    ``rank`` of ``world``; ``local_rank`` of ``local_world`` on its node; ``nodes`` in all.  ``by``
    names the launcher.  The store is at ``address:port``; ``owns_store``: this process makes it.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    nodes: int
    by: str
    address: str
    port: int
    owns_store: bool = False


def find_place(env: Mapping[str, str]) -> Place | None:
    """What a launcher's variables say; None where no launcher started this process as one of many.

    torchrun: ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``, ``MASTER_PORT``.  mpirun:
    ``OMPI_COMM_WORLD_*`` or ``PMI_*``.  srun: ``SLURM_PROCID`` of a step.  Raises FlashmoeError
    (exit code 2) where they name no place to meet.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        found = _torchrun(env)
    elif "OMPI_COMM_WORLD_RANK" in env or "PMI_RANK" in env:
        found = _mpirun(env)
    elif "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        found = _srun(env)
    else:
        return None
    return found if found.world > 1 else None


def _number(env: Mapping[str, str], *names: str, default: int | None = None) -> int:
    for name in names:
        if name in env:
            number = whole_number(env[name])
            if number is None:
                raise FlashmoeError(
                    f"{name} is {env[name]!r}, which is no number", "unset it, or set it right", 2
                )
            return number
    if default is None:
        raise FlashmoeError(
            f"{names[0]} is not set, though the variables beside it are",
            "start through torchrun, srun or mpirun, or with --processes",
            2,
        )
    return default


def _torchrun(env: Mapping[str, str]) -> Place:
    world = _number(env, "WORLD_SIZE")
    local_world = _number(env, "LOCAL_WORLD_SIZE", default=world)
    rank = _number(env, "RANK")
    agent = env.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true"
    return Place(
        rank=rank,
        world=world,
        local_rank=_number(env, "LOCAL_RANK", default=rank % max(local_world, 1)),
        local_world=local_world,
        nodes=-(-world // max(local_world, 1)),
        by="torchrun",
        address=env.get("MASTER_ADDR", "127.0.0.1"),
        port=_number(env, "MASTER_PORT"),
        owns_store=rank == 0 and not agent,
    )


def _mpirun(env: Mapping[str, str]) -> Place:
    world = _number(env, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    rank = _number(env, "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    local_world = _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", default=world)
    address = env.get("MASTER_ADDR", "127.0.0.1" if local_world == world else "")
    if not address:
        raise FlashmoeError(
            "mpirun over several nodes does not say where rank 0 is",
            "pass it on: mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500",
            2,
        )
    job = next((env[n] for n in ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid") if n in env), "mpi")
    return Place(
        rank=rank,
        world=world,
        local_rank=_number(
            env, "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", default=rank % local_world
        ),
        local_world=local_world,
        nodes=-(-world // local_world),
        by="mpirun",
        address=address,
        port=_number(env, "MASTER_PORT", default=_port_of(job)),
        owns_store=rank == 0,
    )


def _srun(env: Mapping[str, str]) -> Place:
    world = _number(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    nodes = _number(env, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", default=1)
    rank = _number(env, "SLURM_PROCID")
    listed = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    hosts = expand_hosts(listed)
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if nodes == 1 or not hosts else hosts[0])
    job = f"{env.get('SLURM_JOB_ID', '')}.{env['SLURM_STEP_ID']}"
    return Place(
        rank=rank,
        world=world,
        local_rank=_number(env, "SLURM_LOCALID", default=0),
        local_world=-(-world // nodes),
        nodes=nodes,
        by="srun",
        address=address,
        port=_number(env, "MASTER_PORT", default=_port_of(job)),
        owns_store=rank == 0,
    )


def _port_of(job: str) -> int:
    """A port that all ranks of a job derive alike, and other jobs on the node differently."""
    return _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS


def expand_hosts(text: str) -> list[str]:
    """Slurm's list of hosts written out: ``n[1-2,07],m`` is n1, n2, n07, m."""
    hosts = []
    for part in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)?", text):
        match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", part)
        if match is None:
            hosts.append(part)
            continue
        head, ranges, tail = match.groups()
        for each in ranges.split(","):
            first, _, last = each.partition("-")
            for number in range(int(first), int(last or first) + 1):
                hosts.append(f"{head}{number:0{len(first)}d}{tail}")
    return hosts


def timeout_from(env: Mapping[str, str]) -> float:
    """``FLASHMOE_RENDEZVOUS_S``, or ``TIMEOUT_S``."""
    text = env.get("FLASHMOE_RENDEZVOUS_S", "")
    try:
        seconds = float(text or TIMEOUT_S)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise FlashmoeError(
            f"FLASHMOE_RENDEZVOUS_S is {text!r}, which is no number of seconds", "unset it", 2
        )
    return seconds


def rendezvous(place: Place, timeout_s: float | None = None) -> Job:
    """Meets the other ranks' store; all are there once a ``gather`` or ``barrier`` returns.

    Raises FlashmoeError where nobody answers at ``place.address`` in ``timeout_s`` (None: what
    ``timeout_from`` says).
    """
    from torch.distributed import PrefixStore, TCPStore

    if timeout_s is None:
        timeout_s = timeout_from(os.environ)
    try:
        store = TCPStore(
            place.address,
            place.port,
            is_master=place.owns_store,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
    except (RuntimeError, OSError) as exc:
        what = str(exc).partition("\n")[0]
        raise FlashmoeError(
            f"rank {place.rank} finds no store at {place.address}:{place.port}: {what}",
            "is rank 0 alive, and the port free? MASTER_ADDR and MASTER_PORT choose another",
        ) from exc
    return Job(place, PrefixStore("flashmoe", store), timeout_s)


class JobFailed(FlashmoeError):
    """What ends a wait in the store because another rank failed: that rank has more to say."""


class Job:
    """This process's view of the job: its place, and the store that all share.

    Values are bytes.  Waits last ``timeout_s`` at most, and end with JobFailed at once where
    ``fail()`` was called by anyone.
    """

    def __init__(self, place: Place, store: Store, timeout_s: float = TIMEOUT_S) -> None:
        self.place = place
        self._store = store
        self.timeout_s = timeout_s
        self._turns: dict[str, int] = {}

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def world(self) -> int:
        return self.place.world

    def set(self, key: str, value: bytes) -> None:
        """Says something to all, under a key of its own."""
        self._ask(lambda: self._store.set(key, value.decode("latin-1")))

    def get(self, key: str, from_rank: int, despite_failure: bool = False) -> bytes:
        """What was said under ``key``, waited for; ``from_rank`` is who is named if it never is."""
        return self._await([key], [from_rank], despite_failure=despite_failure)[0]

    def has(self, key: str) -> bool:
        """Whether anyone has said something under ``key``."""
        return bool(self._ask(lambda: self._store.check([key])))

    def gather(self, name: str, value: bytes) -> list[bytes]:
        """What every rank gives under this name, by rank; collective, any number of times."""
        turn = self.turn(name)
        keys = [f"{name}.{turn}/{rank}" for rank in range(self.world)]
        self.set(keys[self.rank], value)
        return self._await(keys, list(range(self.world)), name)

    def turn(self, name: str) -> int:
        """How many times this rank has asked for this name: the same on all, if all ask alike."""
        turn = self._turns[name] = self._turns.get(name, -1) + 1
        return turn

    def barrier(self, name: str) -> None:
        """Returns when every rank has come here."""
        self.gather(name, b"")

    def fail(self, reason: str) -> str:
        """Ends every wait of every rank with this reason, or with that of who failed before: it is
        given back."""
        kept: bytes = self._ask(lambda: self._store.compare_set(_FAILED, "", reason))
        return kept.decode()

    def failure(self) -> str | None:
        """Why the job failed, where it is known that it did."""
        if not self._ask(lambda: self._store.check([_FAILED])):
            return None
        reason: str = self._ask(lambda: self._store.get(_FAILED)).decode()
        return reason

    def _await(
        self,
        keys: list[str],
        ranks: Sequence[int],
        name: str = "",
        despite_failure: bool = False,
    ) -> list[bytes]:
        until = time.monotonic() + self.timeout_s
        pause = 0.0005
        while not self._ask(lambda: self._store.check(keys)):
            reason = None if despite_failure else self.failure()
            if reason is not None:
                raise JobFailed(reason, "see that rank's own lines above", 1)
            if time.monotonic() > until:
                late = [str(r) for key, r in zip(keys, ranks, strict=True) if not self.has(key)]
                what = f"'{name}'" if name else "its word"
                raise FlashmoeError(
                    f"rank {', '.join(late)} did not come to {what} in {self.timeout_s:g} s",
                    "it may have died, or never been started: see its own output",
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        return [self._value(key) for key in keys]

    def _value(self, key: str) -> bytes:
        said: bytes = self._ask(lambda: self._store.get(key))
        return said.decode().encode("latin-1")

    def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (RuntimeError, OSError) as exc:  # torch's DistError is a RuntimeError
            raise FlashmoeError(
                f"rank {self.rank} lost the job's store: {str(exc).partition(chr(10))[0]}",
                "the process that owned it, the launcher or rank 0, is gone",
            ) from exc

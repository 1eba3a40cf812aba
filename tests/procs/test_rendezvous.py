"""Who am I, by every launcher's variables; and a store whose waits end, with a name."""

from __future__ import annotations

import socket
import threading
import time

import pytest

pytest.importorskip("torch")

from flashmoe.errors import FlashmoeError
from flashmoe.world.rendezvous import Job, Place, expand_hosts, find_place, rendezvous

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "77",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def test_torchrun() -> None:
    place = find_place(TORCHRUN)
    assert place == Place(5, 8, 1, 4, 2, "torchrun", "n1", 29500, owns_store=False)
    zero = find_place(TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"})
    assert zero is not None and zero.owns_store
    agent = find_place(TORCHRUN | {"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert agent is not None and not agent.owns_store


def test_srun() -> None:
    place = find_place(SRUN)
    assert place is not None
    assert (place.rank, place.world, place.local_rank, place.nodes) == (3, 4, 1, 2)
    assert (place.address, place.by, place.local_world) == ("gpu07", "srun", 2)
    other = find_place(SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert other is not None and other.owns_store and other.port == place.port
    assert find_place(SRUN | {"SLURM_JOB_ID": "78"}) != place  # another job, another port


def test_a_batch_script_is_no_step() -> None:
    """In a script that sbatch runs, SLURM_PROCID is set, but nobody started it as one of many."""
    assert find_place({k: v for k, v in SRUN.items() if k != "SLURM_STEP_ID"}) is None


def test_mpirun() -> None:
    place = find_place(MPIRUN)
    assert place is not None and place.owns_store and place.by == "mpirun"
    assert (place.address, place.world) == ("127.0.0.1", 2)
    hydra = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    found = find_place(hydra)
    assert found is not None and (found.rank, found.local_rank) == (1, 1)
    with pytest.raises(FlashmoeError, match="several nodes"):
        find_place(MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})


def test_one_process_is_no_job() -> None:
    assert find_place({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1"}) is None
    assert find_place({"HOME": "/"}) is None


def test_nonsense_is_refused() -> None:
    with pytest.raises(FlashmoeError, match="no number"):
        find_place(TORCHRUN | {"WORLD_SIZE": "many"})
    with pytest.raises(FlashmoeError, match="MASTER_PORT is not set"):
        find_place({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"})


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", []),
        ("one", ["one"]),
        ("a,b", ["a", "b"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,12],m7", ["n08", "n09", "n10", "n12", "m7"]),
        ("r1n[1,3]-ib,x", ["r1n1-ib", "r1n3-ib", "x"]),
    ],
)
def test_hosts(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


def jobs(count: int, timeout_s: float) -> list[Job]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    made = []
    for rank in range(count):
        place = Place(rank, count, rank, count, 1, "test", "127.0.0.1", port, rank == 0)
        made.append(rendezvous(place, timeout_s))
    return made


def everywhere(made: list[Job], act: object) -> list[object]:
    out: list[object] = [None] * len(made)

    def one(i: int) -> None:
        try:
            out[i] = act(made[i])  # type: ignore[operator]
        except FlashmoeError as exc:
            out[i] = exc

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(made))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return out


def test_all_give_and_all_get_also_bytes_that_are_no_text() -> None:
    made = jobs(3, 10)
    for turn in range(2):  # the same name again is another gathering
        said = everywhere(
            made, lambda job, turn=turn: job.gather("x", bytes([job.rank, 255, turn]))
        )
        assert said == [[bytes([r, 255, turn]) for r in range(3)]] * 3


def test_who_does_not_come_is_named() -> None:
    made = jobs(3, 0.4)
    found = made[1].rank, everywhere(made[:2], lambda job: job.barrier("heaps"))
    for error in found[1]:
        assert isinstance(error, FlashmoeError)
        assert error.message == "rank 2 did not come to 'heaps' in 0.4 s"


def test_a_failure_ends_all_waits_at_once() -> None:
    made = jobs(2, 60)
    threading.Timer(0.2, lambda: made[1].fail("rank 1 failed: no memory")).start()
    began = time.monotonic()
    with pytest.raises(FlashmoeError, match="rank 1 failed: no memory"):
        made[0].barrier("ready")
    assert time.monotonic() - began < 10
    made[0].fail("another reason")
    assert made[1].failure() == "rank 1 failed: no memory"


def test_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = Place(1, 2, 1, 2, 1, "test", "127.0.0.1", port)
    with pytest.raises(FlashmoeError, match=f"finds no store at 127.0.0.1:{port}"):
        rendezvous(place, 1.0)


@pytest.mark.parametrize("text", ["²", "x", "-1", ""])
def test_a_rank_that_is_no_number_is_said_to_be_none(text: str) -> None:
    with pytest.raises(FlashmoeError, match=r"LOCAL_RANK is .* no number"):
        find_place(TORCHRUN | {"LOCAL_RANK": text})

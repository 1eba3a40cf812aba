"""What ranks that are processes say to each other while an engine is built, and where their
flight-recorder slots lie."""

from __future__ import annotations

import numpy as np

from flashmoe.errors import FlashmoeError
from flashmoe.trace import schema
from flashmoe.world.board import MAX_CTAS, Board
from flashmoe.world.rendezvous import Job


class Peers:
    """One rank's view of the others: the job's store, and the board of slots."""

    def __init__(self, job: Job, board: Board) -> None:
        self.job = job
        self.rank = job.rank
        self.board = board

    def slots_array(self, actors: int) -> np.ndarray:
        """This rank's flight-recorder slots on the board, ``FLIGHT_SLOT`` [actors], in place."""
        slots = self.board.slots(self.rank)
        if actors > len(slots):
            raise FlashmoeError(
                f"{actors // schema.N_LANES} SMs a rank",
                f"processes have {MAX_CTAS} at most",
                exit_code=2,
            )
        self.board.header(self.rank)["actors"] = actors
        return slots[:actors]

    def slots(self, actors: int) -> int:
        """Their address."""
        return int(self.slots_array(actors).ctypes.data)

    def least(self, value: int) -> int:
        """The least of what the ranks say; collective."""
        return min(int(said) for said in self.job.gather("least", str(value).encode()))

    def ready(self) -> None:
        """Returns when every rank has come here."""
        self.job.barrier("ready")

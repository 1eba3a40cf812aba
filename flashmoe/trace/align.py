"""Ranks' clocks put on rank 0's: offset and drift from two-way exchanges, with their error bounds.

An exchange is a question and its answer: sent at ``sent`` and back at ``back`` by the own clock,
and answered at ``there`` by the reference's.  The answer was given somewhere between the two, so

    there - back <= offset <= there - sent        (reference = own + offset)

Exchanges close to each other in time are all true, so their intervals are intersected.  Between one
offset at the start of a run and one at its end the clock is taken to drift evenly.  What the trace
says of the order of events may tighten the result: ``flashmoe.trace.tighten``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

MAX_DRIFT = 1e-4
"""How far a clock may be off its rate where nothing was measured: crystals keep within 100 ppm."""


@dataclass(frozen=True)
class Exchange:
    """The offset to the reference clock at ``at_ns`` of the own clock, certain to ``bound_ns``."""

    at_ns: int
    offset_ns: int
    bound_ns: int

    @classmethod
    def same(cls, at_ns: int) -> Exchange:
        """Of the reference clock itself."""
        return cls(at_ns, 0, 0)

    @classmethod
    def from_dict(cls, said: dict[str, Any]) -> Exchange:
        """The inverse of ``asdict``; keys that a newer version added are left."""
        return cls(said["at_ns"], said["offset_ns"], said["bound_ns"])


def tightest(sent: Sequence[int], there: Sequence[int], back: Sequence[int]) -> Exchange:
    """What exchanges within a short time say together; ns, one entry an exchange.

    Where no offset fits all of them (the clocks drift while they last, or one stepped), the
    quickest exchange alone is believed.
    """
    s, t, b = (np.asarray(v, np.int64) for v in (sent, there, back))
    low, high = t - b, t - s
    least, most = int(low.max()), int(high.min())
    if least > most:
        best = int((b - s).argmin())
        least, most = int(low[best]), int(high[best])
    at = int(s[0]) + (int(b[-1]) - int(s[0])) // 2
    # Rounded outwards: half a nanosecond of the middle belongs to the bound.
    return Exchange(at, (least + most) // 2, (most - least + 1) // 2)


@dataclass(frozen=True)
class Alignment:
    """How one rank's clock becomes rank 0's.

    ``applied`` is false where the exchanges are consistent with one and the same clock: then times
    stay as they are, since a correction within its own error only adds noise.  ``tightened``, by
    the order of events, is used in place of the exchanges where there is one; ``start``, ``end``
    and what follows from them stay the exchanges' own.
    """

    start: Exchange
    end: Exchange | None
    applied: bool
    tightened: Alignment | None = None

    @classmethod
    def of(cls, start: Exchange, end: Exchange | None) -> Alignment:
        """From what was measured."""
        known = [e for e in (start, end) if e is not None]
        return cls(start, end, any(abs(e.offset_ns) > e.bound_ns for e in known))

    @property
    def used(self) -> Alignment:
        """What times are mapped by."""
        return self if self.tightened is None else self.tightened

    def offset(self, times: np.ndarray) -> np.ndarray:
        """int64 [n]: the offset between ``start`` and ``end`` at times of the own clock, applied or
        not."""
        since = times.astype(np.int64) - self.start.at_ns
        return self.start.offset_ns + np.rint(since * (self.drift or 0.0)).astype(np.int64)

    @property
    def drift(self) -> float | None:
        """Gain of the reference clock over the own one, ns per ns; None where not measured."""
        if self.end is None or self.end.at_ns == self.start.at_ns:
            return None
        return (self.end.offset_ns - self.start.offset_ns) / (self.end.at_ns - self.start.at_ns)

    @property
    def drift_bound(self) -> float:
        """How far ``drift`` may be off."""
        if self.end is None or self.end.at_ns == self.start.at_ns:
            return MAX_DRIFT
        return (self.start.bound_ns + self.end.bound_ns) / (self.end.at_ns - self.start.at_ns)

    def mapped(self, times: np.ndarray) -> np.ndarray:
        """int64 [n]: times of the own clock with that offset."""
        return times.astype(np.int64) + self.offset(times)

    def to_reference(self, times: np.ndarray) -> np.ndarray:
        """Times of the own clock (int64 or uint64 ns) as times of the reference."""
        how = self.used
        if not how.applied:
            return times
        return how.mapped(times).astype(times.dtype)

    def from_reference(self, times: np.ndarray) -> np.ndarray:
        """int64 [n]: what ``mapped`` made of times of the own clock, undone.

        What the clock drifts while it drifts, which this leaves out, is below a nanosecond.
        """
        own = times.astype(np.int64)
        return own - self.offset(own - self.start.offset_ns)

    def as_exchanged(self, times: np.ndarray) -> np.ndarray:
        """int64 [n]: times that ``to_reference`` gave as the exchanges alone would give them."""
        if self.tightened is None:
            return times.astype(np.int64)
        how, own = self.tightened, times.astype(np.int64)
        own = how.from_reference(own) if how.applied else own
        return Alignment.of(self.start, self.end).to_reference(own)

    def bound_ns(self, times: np.ndarray) -> np.ndarray:
        """float64 [n]: how far the exchanges alone may be off at each time of the own clock."""
        own = times.astype(np.int64)
        if self.end is None:
            return self.start.bound_ns + np.abs(own - self.start.at_ns) * MAX_DRIFT
        inside = max(self.start.bound_ns, self.end.bound_ns)
        outside = np.maximum(self.start.at_ns - own, own - self.end.at_ns)
        return inside + np.maximum(outside, 0) * self.drift_bound

    def as_dict(self) -> dict[str, Any]:
        """For run.json; ``from_dict`` takes it back."""
        return {
            **self.ends(),
            "drift_ppm": None if self.drift is None else self.drift * 1e6,
            "drift_bound_ppm": self.drift_bound * 1e6,
            "applied": self.used.applied,
            "tightened": None if self.tightened is None else self.tightened.ends(),
        }

    def ends(self) -> dict[str, Any]:
        """``start`` and ``end`` for run.json."""
        return {
            "start": asdict(self.start),
            "end": None if self.end is None else asdict(self.end),
        }

    @classmethod
    def from_dict(cls, said: dict[str, Any]) -> Alignment:
        """The inverse of ``as_dict``."""
        start = Exchange.from_dict(said["start"])
        end = None if said.get("end") is None else Exchange.from_dict(said["end"])
        closer = said.get("tightened")
        if closer is None:
            return cls(start, end, said["applied"])
        ends = (Exchange.from_dict(closer[name]) for name in ("start", "end"))
        how = cls.of(start, end)
        return replace(how, tightened=replace(cls.of(*ends), applied=said["applied"]))


def align_rings(headers: np.ndarray, stored: list[np.ndarray], how: Alignment) -> None:
    """Puts a rank's rings on the reference clock, in place: ``RING_HEADER`` [n] and their records.

    Begins and ends are mapped, and durations follow: spans that touched still do.
    """
    if not how.used.applied:
        return
    for name in ("begin_ns", "end_ns"):
        known = headers[name] != 0
        headers[name][known] = how.to_reference(headers[name][known])
    for records in stored:
        begin = records["t0_ns"]
        mapped = how.to_reference(begin)
        length = how.to_reference(begin + records["dur_ns"]) - mapped
        # A saturated duration stays one: the reader works out how long it was.
        records["dur_ns"] = np.where(records["dur_ns"] == 0xFFFFFFFF, 0xFFFFFFFF,
                                     np.minimum(length, 0xFFFFFFFF))  # fmt: skip
        records["t0_ns"] = mapped

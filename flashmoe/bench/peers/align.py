"""Sorting rows by expert, padded to blocks, for the Triton peer: our own kernels.

The peer's own is CUDA code of a package beside its wheel.  These take one launch for few rows and
three for many, count inside the peer's time, and wait for nothing on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

ONE_LAUNCH = 256
"""So many rows at most are sorted by one program."""

_CHUNK = 128
_BLOCKS = 256


@triton.jit
def _one_hot(ids_ptr, at, numel, experts):  # type: ignore[no-untyped-def]
    ids = tl.load(ids_ptr + at, mask=at < numel, other=-1)
    return (ids[:, None] == experts[None, :]).to(tl.int32)


@triton.jit
def _whole(  # type: ignore[no-untyped-def]
    ids_ptr,
    sorted_ptr,
    expert_of_ptr,
    total_ptr,
    numel,
    capacity,
    blocks,
    BLOCK: tl.constexpr,
    E_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    FILL: tl.constexpr,
):
    """All of it for at most ONE_LAUNCH rows, in one program."""
    experts = tl.arange(0, E_PAD)
    counts = tl.zeros((E_PAD,), tl.int32)
    for begin in range(0, numel, CHUNK):
        counts += tl.sum(_one_hot(ids_ptr, begin + tl.arange(0, CHUNK), numel, experts), 0)
    padded = (counts + BLOCK - 1) // BLOCK * BLOCK
    ends = tl.cumsum(padded, 0)
    starts = ends - padded
    tl.store(total_ptr, tl.sum(padded, 0))
    for begin in range(0, capacity, FILL):
        at = begin + tl.arange(0, FILL)
        tl.store(sorted_ptr + at, tl.zeros((FILL,), tl.int32) + numel, mask=at < capacity)
    for begin in range(0, blocks, CHUNK):
        block = begin + tl.arange(0, CHUNK)
        expert = tl.sum((ends[None, :] <= (block * BLOCK)[:, None]).to(tl.int32), 1)
        tl.store(expert_of_ptr + block, expert, mask=block < blocks)
    tl.debug_barrier()  # rows overwrite what the fill wrote
    next_ = starts
    for begin in range(0, numel, CHUNK):
        at = begin + tl.arange(0, CHUNK)
        hot = _one_hot(ids_ptr, at, numel, experts)
        place = tl.sum(hot * (next_[None, :] + tl.cumsum(hot, 0) - hot), 1)
        tl.store(sorted_ptr + place, at, mask=at < numel)
        next_ += tl.sum(hot, 0)


@triton.jit
def _count(  # type: ignore[no-untyped-def]
    ids_ptr, counts_ptr, sorted_ptr, numel, capacity, E_PAD: tl.constexpr, CHUNK: tl.constexpr
):
    """Rows of each expert, a chunk a program, and the padding's mark everywhere in ``sorted``."""
    experts = tl.arange(0, E_PAD)
    begin = tl.program_id(0) * CHUNK
    counts = tl.sum(_one_hot(ids_ptr, begin + tl.arange(0, CHUNK), numel, experts), 0)
    tl.atomic_add(counts_ptr + experts, counts, mask=counts > 0, sem="relaxed")
    share = tl.cdiv(capacity, tl.num_programs(0))
    for offset in range(0, share, CHUNK):
        inside = offset + tl.arange(0, CHUNK)
        at = tl.program_id(0) * share + inside
        mark = tl.zeros((CHUNK,), tl.int32) + numel
        tl.store(sorted_ptr + at, mark, mask=(inside < share) & (at < capacity))


@triton.jit
def _place_experts(  # type: ignore[no-untyped-def]
    counts_ptr,
    next_ptr,
    expert_of_ptr,
    total_ptr,
    blocks,
    BLOCK: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Where each expert begins, and the expert of each block."""
    experts = tl.arange(0, E_PAD)
    counts = tl.load(counts_ptr + experts)
    padded = (counts + BLOCK - 1) // BLOCK * BLOCK
    ends = tl.cumsum(padded, 0)
    if tl.program_id(0) == 0:
        tl.store(next_ptr + experts, ends - padded)
        tl.store(total_ptr, tl.sum(padded, 0))
    for begin in range(0, BLOCKS, 32):
        block = tl.program_id(0) * BLOCKS + begin + tl.arange(0, 32)
        expert = tl.sum((ends[None, :] <= (block * BLOCK)[:, None]).to(tl.int32), 1)
        tl.store(expert_of_ptr + block, expert, mask=block < blocks)


@triton.jit
def _place_rows(  # type: ignore[no-untyped-def]
    ids_ptr, counts_ptr, next_ptr, sorted_ptr, numel, E_PAD: tl.constexpr, CHUNK: tl.constexpr
):
    """Each row to its place; counts go back to zero for the next call."""
    experts = tl.arange(0, E_PAD)
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    hot = _one_hot(ids_ptr, at, numel, experts)
    mine = tl.sum(hot, 0)
    base = tl.atomic_add(next_ptr + experts, mine, mask=mine > 0, sem="relaxed")
    base = tl.where(mine > 0, base, 0)
    place = tl.sum(hot * (base[None, :] + tl.cumsum(hot, 0) - hot), 1)
    tl.store(sorted_ptr + place, at, mask=at < numel)
    if tl.program_id(0) == 0:
        tl.store(counts_ptr + experts, tl.zeros((E_PAD,), tl.int32))


@dataclass
class Aligned:
    """Rows by expert: ``sorted_rows`` int32, the rows' numbers (T k marks padding), each expert's
    filled up to whole blocks; ``expert_of`` int32, a block's expert; ``total`` int32 [1], the
    length that is used.
    """

    sorted_rows: torch.Tensor
    expert_of: torch.Tensor
    total: torch.Tensor


class Aligner:
    """Buffers and launches for ``numel`` rows of ``experts`` experts, in blocks of ``block``."""

    def __init__(self, numel: int, experts: int, block: int, device: torch.device) -> None:
        self._numel, self._block = numel, block
        self._e_pad = max(16, triton.next_power_of_2(experts))
        # An expert adds at most block - 1 rows of padding; with few rows, few experts have any.
        self._capacity = numel + min(numel, experts) * (block - 1)
        self._capacity = -(-self._capacity // block) * block
        self._blocks = self._capacity // block

        def empty(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        self._counts, self._next = empty(self._e_pad), empty(self._e_pad)
        self.aligned = Aligned(empty(self._capacity), empty(self._blocks), empty(1))

    def __call__(self, ids: torch.Tensor) -> Aligned:
        """Sorts the rows of ``ids`` int32 [T, k], contiguous, on the current stream."""
        out = self.aligned
        if self._numel <= ONE_LAUNCH:
            _whole[(1,)](
                ids, out.sorted_rows, out.expert_of, out.total, self._numel, self._capacity,
                self._blocks, BLOCK=self._block, E_PAD=self._e_pad, CHUNK=32, FILL=1024,
                num_warps=8,
            )  # fmt: skip
            return out
        chunks = triton.cdiv(self._numel, _CHUNK)
        sizes = {"E_PAD": self._e_pad, "num_warps": 8}
        _count[(chunks,)](
            ids, self._counts, out.sorted_rows, self._numel, self._capacity, CHUNK=_CHUNK, **sizes
        )
        _place_experts[(triton.cdiv(self._blocks, _BLOCKS),)](
            self._counts, self._next, out.expert_of, out.total, self._blocks,
            BLOCK=self._block, BLOCKS=_BLOCKS, **sizes,
        )  # fmt: skip
        _place_rows[(chunks,)](
            ids, self._counts, self._next, out.sorted_rows, self._numel, CHUNK=_CHUNK, **sizes
        )
        return out

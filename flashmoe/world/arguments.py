"""The arguments of a launch: its ranks' tensor maps, addresses and sizes, packed for the kernel."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flashmoe.errors import FlashmoeError
from flashmoe.world.base import FIRST_DEADLINE
from flashmoe.world.tensor_maps import TENSOR_MAP_BYTES, encode_tensor_map
from flashmoe.world.tiles import extension

if TYPE_CHECKING:
    import torch

    from flashmoe.config import MoEConfig, MoEWeights
    from flashmoe.world.base import Fault

NONE = 0xFFFFFFFF
NO_FAULT = (NONE, NONE, NONE)


def fault_args(faults: Sequence[Fault]) -> tuple[int, int, int]:
    """FaultArgs' fields; raises FlashmoeError for a fault that the GPU does not know."""
    lost_rank, lost_expert, never = NO_FAULT
    for fault in faults:
        if fault.kind == "lost-signal":
            lost_rank, lost_expert = fault.rank, fault.expert
        elif fault.kind == "never-starts":
            never = fault.rank
        else:
            raise FlashmoeError(
                f"the fault '{fault.kind}' exists on the host engine only",
                "use --world host",
                2,
            )
    return lost_rank, lost_expert, never


# The maps are functions of addresses and sizes alone: those of a layer's weights, and of an x that
# comes again, are made once.
@functools.lru_cache(maxsize=256)
def row_maps(config: MoEConfig, pool: int, h: int, rows: int) -> Mapping[str, bytes]:
    """The maps of a pool of ``rows`` rows at address ``pool`` and of its h at ``h``."""

    depth: int = extension().TILE_DEPTH

    def boxes(address: int, width: int) -> bytes:
        return b"".join(
            encode_tensor_map(address, [width, rows], [depth, box], [width * 2], config.dtype)
            for box in extension().ROW_BOXES
        )

    return {"map_pool": boxes(pool, config.hidden), "map_h": boxes(h, config.intermediate)}


@functools.lru_cache(maxsize=256)
def weight_maps(
    config: MoEConfig, up: int, down: int, rank: int = 0, ranks: int = 1
) -> Mapping[str, bytes]:
    """The maps of the matrices of the experts that ``rank`` of ``ranks`` owns.

    ``up`` and ``down`` are the addresses of all experts' matrices.
    """
    host = extension()
    depth, box, atom = host.TILE_DEPTH, host.UNIT_BOX_ROWS, host.UNIT_BOX_ATOM
    hidden, inter = config.hidden, config.intermediate
    first = rank * config.experts // ranks
    owned = (rank + 1) * config.experts // ranks - first
    if owned == 0:  # such a rank gets no tiles; the maps only have to be valid
        first, owned = 0, 1
    up += first * config.up_rows * hidden * 2
    down += first * hidden * inter * 2

    def encode(address: int, dims: list[int], box: list[int], strides: list[int]) -> bytes:
        # Larger pieces bring what the next block of K reads, which L2 may have dropped by then.
        return encode_tensor_map(address, dims, box, strides, config.dtype, l2_bytes=64)

    def matrices(address: int, matrix_rows: int, width: int, box_rows: int) -> bytes:
        """Of experts' matrices; five dimensions, so that one load serves all."""
        size = matrix_rows * width * 2
        return encode(
            address,
            [width, matrix_rows, owned, 1, 1],
            [depth, box_rows, 1, 1, 1],
            [width * 2, size, owned * size, owned * size],
        )

    tile = host.TILE_WEIGHT_ROWS // 2
    if config.gated:
        size = inter * hidden * 2
        map_up = encode(
            up,
            [hidden, inter, 2, owned, 1],
            [depth, tile, 1, 1, 1],
            [hidden * 2, size, 2 * size, 2 * size * owned],
        )
        map_up_unit = encode(
            up,
            [hidden, atom, 2, inter // atom, owned],
            [depth, atom, 2, box // (2 * atom), 1],
            [hidden * 2, size, atom * hidden * 2, 2 * size],
        )
    else:
        map_up = matrices(up, inter, hidden, tile)
        map_up_unit = matrices(up, inter, hidden, box)
    return {
        "map_up": map_up,
        "map_down": matrices(down, hidden, inter, tile),
        "map_up_unit": map_up_unit,
        "map_down_unit": matrices(down, hidden, inter, box),
    }


@functools.lru_cache(maxsize=256)
def gate_maps(config: MoEConfig, gate: int, x: int, tokens: int, chunks: int) -> Mapping[str, Any]:
    """The maps of ``tokens`` rows at ``x`` and of the gate's weights, and the tokens of x's box."""
    hidden, experts = config.hidden, config.experts
    if tokens == 0 or config.routing.kind == "external":
        none = bytes(TENSOR_MAP_BYTES)
        names = ("map_x", "map_gate", "map_x_slice", "map_gate_slice")
        return {**dict.fromkeys(names, none), "gate_box_tokens": 8}
    box = 8 if -(-tokens // chunks) <= 8 else 32
    host = extension()
    depth, columns = host.TILE_DEPTH, host.gate_columns(experts)

    def encode(address: int, rows: int, box_rows: int) -> bytes:
        dims, strides = [hidden, rows], [hidden * 2]
        return encode_tensor_map(address, dims, [depth, box_rows], strides, config.dtype)

    def encode_slice(address: int, rows: int) -> bytes:
        blocks = hidden // depth
        if hidden % depth != 0:  # the last block would go on in the next row
            return bytes(TENSOR_MAP_BYTES)
        return encode_tensor_map(
            address,
            [depth, rows, blocks],
            [depth, host.SLICE_ROWS, min(blocks, host.SLICE_BLOCKS)],
            [hidden * 2, depth * 2],
            config.dtype,
        )

    return {
        "map_x": encode(x, tokens, box),
        "map_gate": encode(gate, experts, columns // 2),  # of a pair, each CTA fetches a half
        "map_x_slice": encode_slice(x, tokens),
        "map_gate_slice": encode_slice(gate, experts),
        "gate_box_tokens": box,
    }


def rank_args(
    maps: Mapping[str, Any],
    weights: MoEWeights,
    x: torch.Tensor,
    y: torch.Tensor,
    ids: torch.Tensor | None = None,
    routing_weights: torch.Tensor | None = None,
    rank: int = 0,
) -> dict[str, Any]:
    """One RankArgs by field name.  x and y [tokens, H]; ids int32, routing_weights float32 [tokens,
    k], or None where the kernel routes.
    """

    def address(tensor: torch.Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    return {
        **maps,
        "x": address(x),
        "bias": address(weights.bias),
        "y": address(y),
        "ids": address(ids),
        "weights": address(routing_weights),
        "rank": rank,
        "tokens": x.shape[0],
    }


def units(
    shape: dict[str, Any], tokens: int, flavour: str = "p2p", faults: Sequence[Fault] = ()
) -> dict[str, Any] | None:
    """Of a rank alone with few tokens, what launches by units change of the shape; else None.

    :func:`pack` is to be told so.  NVSHMEM's flavour has no such way, and where a signal
    is to be lost there is to be one.
    """
    if flavour != "p2p" or fault_args(faults)[0] != NONE:
        return None
    changes: dict[str, Any] | None = extension().units(shape, tokens)
    return changes


def pack(
    shape: dict[str, Any],
    heaps: list[int],
    ranks: list[dict[str, Any]],
    *,
    deadline_s: float,
    first_deadline_s: float | None,
    slots: int,
    fault: tuple[int, int, int] = NO_FAULT,
    rings: int = 0,
    records: int = 0,
    ring_capacity: int = 0,
    images: int = 0,
    images_written: int = 0,
    steps: int = 0,
    image_capacity: int = 0,
    step_capacity: int = 0,
    keep_last: bool = False,
    iteration_base: int = 0,
    signals_at: int = 0,
    rows_at: int | None = None,
    by_units: bool = False,
    in_place: bool = True,
) -> ctypes.Array[ctypes.c_char]:
    """A LaunchArgs.  Addresses: 0 for none.  ``first_deadline_s`` None: FIRST_DEADLINE times
    ``deadline_s``.

    ``signals_at`` and ``rows_at`` say where a heap's signals and its rows begin, from its address;
    ``rows_at`` None: behind the signals.  ``by_units``: few tokens go by units where they may
    (:func:`units`).  ``in_place``: a rank alone reads its rows where they are, where it may.
    """
    first = first_deadline_s or FIRST_DEADLINE * deadline_s
    args = extension().launch_args(
        shape,
        heaps,
        ranks,
        len(ranks),
        ring_capacity,
        keep_last,
        iteration_base,
        int(deadline_s * 1e9),
        int(first * 1e9),
        slots,
        rings,
        records,
        images,
        images_written,
        steps,
        image_capacity,
        step_capacity,
        fault,
        signals_at,
        rows_at,
        by_units,
        in_place,
    )
    return ctypes.create_string_buffer(args, len(args))

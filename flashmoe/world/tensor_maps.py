"""Descriptors for the GPU's tensor copies (CUtensorMap), through the driver."""

from __future__ import annotations

import ctypes

from flashmoe.errors import FlashmoeError

TENSOR_MAP_BYTES = 128


def encode_tensor_map(
    address: int,
    dims: list[int],
    box: list[int],
    strides: list[int],
    dtype: str,
    l2_bytes: int = 256,
) -> bytes:
    """The 128 bytes of a tensor map, 128-byte swizzle, zeros outside.

    ``dims`` and ``box`` in elements, the contiguous dimension first; ``strides`` in bytes, of all
    dimensions but the first.  ``dtype``: "bf16" or "fp16".  A copy that misses L2 brings aligned
    pieces of ``l2_bytes`` (64, 128, 256) there.  Raises FlashmoeError where the driver refuses it.
    """
    from cuda.bindings import driver

    types = driver.CUtensorMapDataType
    kind = {
        "bf16": types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        "fp16": types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    }[dtype]
    promotion = driver.CUtensorMapL2promotion
    promotions = {
        64: promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_64B,
        128: promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        256: promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
    }
    error, tensor_map = driver.cuTensorMapEncodeTiled(
        kind,
        len(dims),
        address,
        [driver.cuuint64_t(d) for d in dims],
        [driver.cuuint64_t(s) for s in strides],
        [driver.cuuint32_t(b) for b in box],
        [driver.cuuint32_t(1)] * len(dims),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        promotions[l2_bytes],
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if int(error) != 0:
        raise FlashmoeError(
            f"the driver refused a tensor map of {dims} in boxes of {box}: {error.name}",
            "this is a defect of flashmoe: please report the shape",
        )
    return ctypes.string_at(tensor_map.getPtr(), TENSOR_MAP_BYTES)

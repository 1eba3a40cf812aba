"""How floating-point arithmetic rounds: the model that the bounds on a kernel's results rest on.

Errors that add up over many terms are bounded by Azuma-Hoeffding for mean-independent roundings
(Higham and Mary 2019): lambda * sqrt(sum of squares) instead of the sum of absolute values.  A
"width" is the half-width c of one rounding's interval in that sum of squares, or the root of the
sum over several.
"""

from __future__ import annotations

import math

import torch

MISS_PROBABILITY = 1e-9
"""Chance that a correct kernel breaks some bound of one check, under the rounding model."""

UNIT = {"bf16": 2.0**-8, "fp16": 2.0**-11}
"""Unit roundoff of rounding to the dtype, to nearest."""

SPACING_BELOW_NORMAL = {"bf16": 2.0**-133, "fp16": 2.0**-24}
"""Distance of neighbours below the smallest normal number."""

FLOAT32_UNIT = 2.0**-24
"""Unit roundoff of one float32 operation, to nearest: the reference's."""

KERNEL_UNIT = 2.0**-23
"""The same of a tensor core's sum, which cuts off instead."""

_BOTH_SUMS = math.hypot(KERNEL_UNIT, FLOAT32_UNIT)  # the kernel's and the reference's own error

ACTIVATION_UNIT = 2.0**-16
"""Error of an activation function, relative to its argument, that a kernel may add."""


def confidence(elements: int) -> float:
    """Lambda for which all of ``elements`` sums stay within lambda * width but for 1e-9.

    Hoeffding: each fails with at most 2 exp(-lambda^2 / 2); the union of all with elements times
    that.
    """
    return math.sqrt(2 * math.log(2 * max(elements, 1) / MISS_PROBABILITY))


def sum_width(magnitude: torch.Tensor, terms: int) -> torch.Tensor:
    """Width of the error of a float32 sum of ``terms`` products, kernel's and reference's.

    No partial sum exceeds ``magnitude``, the sum of the absolute products; ``terms`` additions and
    one product a term are rounded.
    """
    return magnitude * (_BOTH_SUMS * math.sqrt(terms + 1))

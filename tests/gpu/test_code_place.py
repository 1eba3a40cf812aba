"""A launch knows where its own code lies."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from flashmoe.presets import PRESETS
from flashmoe.world.kernel import LINE, Kernel

CONFIG = PRESETS["qwen3-30b"].config


def test_each_entry_point_has_its_own_place() -> None:
    device = torch.device("cuda", 0)
    places = []
    for config in (CONFIG, replace(CONFIG, activation="relu")):
        for traced in (False, True):
            address, size = Kernel.moe(device, config, traced).code
            assert address != 0 and address % LINE == 0 and size % LINE == 0 and size > 64 << 10
            places.append((address, address + size))
    places.sort()
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))

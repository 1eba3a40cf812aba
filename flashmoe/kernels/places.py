"""Where an entry point's code lies in a GPU's memory.

A launch that knows it brings its code into L2 first (csrc/device/kernel.h).  No call of the
driver's tells, and a kernel whose address is taken in CUDA is compiled worse.  So
``flashmoe_code_place`` takes its own address, and before the cubin is loaded the relocation behind
that, which the driver would leave empty, is made one of the wanted entry point's address.
"""

from __future__ import annotations

import struct

PLACE = "flashmoe_code_place"
"""The kernel that stores the address (csrc/device/moe_p2p_sm90a.cu)."""

# Of ELF, 64 bits, little endian; relocations as CUDA's binaries number them.
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_SYMBOLS, _RELOCATIONS = 2, 4  # sections' kinds
_FUNC_DESC_64, _ADDRESS_64 = 0x23, 2


def telling(cubin: bytes, entry: str) -> tuple[bytes, int]:
    """``cubin`` with a :data:`PLACE` that tells where ``entry`` lies; the bytes of its code.

    Returns ``cubin`` as it is, and 0, where it does not hold what that needs.
    """
    (sections_at,) = struct.unpack_from("<Q", cubin, 40)
    (count,) = struct.unpack_from("<H", cubin, 60)
    sections = [_SECTION.unpack_from(cubin, sections_at + i * _SECTION.size) for i in range(count)]
    symbols: dict[str, tuple[int, int]] = {}  # name -> index, bytes
    for _, kind, _, _, at, size, link, *_ in sections:
        if kind != _SYMBOLS:
            continue
        names = sections[link][4]
        for index in range(size // _SYMBOL.size):
            name_at, _, _, _, _, length = _SYMBOL.unpack_from(cubin, at + index * _SYMBOL.size)
            begin = names + name_at
            name = cubin[begin : cubin.index(b"\0", begin)].decode()
            symbols[name] = index, length
    if entry not in symbols or PLACE not in symbols:
        return cubin, 0
    own, (wanted, length) = symbols[PLACE][0], symbols[entry]
    told = bytearray(cubin)
    for _, kind, _, _, at, size, *_ in sections:
        if kind != _RELOCATIONS:
            continue
        for place in range(at, at + size, _RELOCATION.size):
            offset, info, addend = _RELOCATION.unpack_from(cubin, place)
            if info == own << 32 | _FUNC_DESC_64:
                _RELOCATION.pack_into(told, place, offset, wanted << 32 | _ADDRESS_64, addend)
    return (bytes(told), length) if told != cubin else (cubin, 0)

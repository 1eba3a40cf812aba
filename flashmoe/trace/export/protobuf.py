"""Many protobuf messages of one shape at once: every varint padded to a fixed width.

A varint may carry more bytes than its value needs, so messages that differ only in their values can
all have one length, and are then rows of a NumPy array: the bytes that do not change are copied,
each value is one strided store.  Widths are 1, 2, 4 or 8 bytes (7 bits each), the sizes of NumPy's
integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

WORD = 8
_CONTINUE = {1: 0x00, 2: 0x0080, 4: 0x00808080, 8: 0x0080808080808080}


def varint(value: int, width: int = 1) -> bytes:
    """`value` as a varint of at least ``width`` bytes; at most 10 make a valid one."""
    out = bytearray()
    while value > 0x7F or len(out) + 1 < width:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(field: int, value: int, width: int = 1) -> bytes:
    """A varint field whose value does not change."""
    return varint(field << 3) + varint(value, width)


def text(field: int, value: str | bytes) -> bytes:
    """A field of text, or of an encoded message."""
    data = value.encode() if isinstance(value, str) else value
    return varint(field << 3 | 2) + varint(len(data)) + data


def width_of(largest: int) -> int:
    """Bytes of the padded varint that holds ``largest``; raises OverflowError from 2^56 on."""
    for width in (1, 2, 4, 8):
        if largest < 1 << 7 * width:
            return width
    raise OverflowError(f"{largest} does not fit a varint of 8 bytes")


def spread(values: np.ndarray, width: int) -> np.ndarray:
    """Padded varints of ``width`` bytes, as integers of that many bytes [n], little-endian."""
    if width == 1:
        return values.astype(np.uint8)
    if width == 2:
        v = values.astype(np.uint16)
        return (v & 0x7F) | ((v & 0x3F80) << 1) | np.uint16(_CONTINUE[2])
    if width == 4:
        v4: np.ndarray = values.astype(np.uint32)
        v4 = (v4 & 0x3FFF) | ((v4 & 0x0FFFC000) << 2)
        return (v4 & 0x007F007F) | ((v4 & 0x3F803F80) << 1) | np.uint32(_CONTINUE[4])
    v8: np.ndarray = values.astype(np.uint64)
    low, high = np.uint64(0x0FFFFFFF), np.uint64(4)
    v8 = (v8 & low) | ((v8 & ~low) << high)
    v8 = (v8 & np.uint64(0x00003FFF00003FFF)) | (
        (v8 & np.uint64(0x0FFFC0000FFFC000)) << np.uint64(2)
    )
    return (
        (v8 & np.uint64(0x007F007F007F007F))
        | ((v8 & np.uint64(0x3F803F803F803F80)) << np.uint64(1))
        | np.uint64(_CONTINUE[8])
    )


class Slot:
    """A varint field whose value differs from message to message."""

    def __init__(self, field: int, name: str, width: int) -> None:
        self.tag, self.name, self.width = varint(field << 3), name, width


class Fixed:
    """A repeated fixed64 field: ``count`` values a message."""

    def __init__(self, field: int, name: str, count: int) -> None:
        self.tag, self.name, self.count = varint(field << 3 | 1), name, count


class Message:
    """A length-delimited field around other parts."""

    def __init__(self, field: int, parts: Sequence[Part]) -> None:
        self.tag, self.parts = varint(field << 3 | 2), parts


Part = bytes | Slot | Fixed | Message


def _size(part: Part) -> int:
    if isinstance(part, bytes):
        return len(part)
    if isinstance(part, Slot):
        return len(part.tag) + part.width
    if isinstance(part, Fixed):
        return part.count * (len(part.tag) + 8)
    inner = sum(map(_size, part.parts))
    return len(part.tag) + len(varint(inner)) + inner


class Template:
    """Messages of one shape, laid out once and filled for many values.

    ``size`` is their length in bytes; a row is padded by the caller to whole words by making a
    constant varint longer, since a message has no room for bytes that mean nothing.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._bytes = bytearray()
        self._slots: list[tuple[str, int, int]] = []  # name, offset, width
        self._fixed: list[tuple[str, int, int, int]] = []  # name, offset, count, tag bytes
        for part in parts:
            self._add(part)
        self.size = len(self._bytes)
        names = [f"{name}@{at}" for name, at, _ in self._slots]
        formats: list[object] = [f"<u{width}" for *_, width in self._slots]
        offsets = [at for _, at, _ in self._slots]
        for name, at, count, tag in self._fixed:
            entry = np.dtype(
                {"names": ["id"], "formats": ["<u8"], "offsets": [tag], "itemsize": tag + 8}
            )
            names.append(name)
            formats.append((entry, (count,)))
            offsets.append(at)
        self._dtype = np.dtype(
            {"names": names, "formats": formats, "offsets": offsets, "itemsize": self.size}
        )

    def _add(self, part: Part) -> None:
        if isinstance(part, bytes):
            self._bytes += part
        elif isinstance(part, Slot):
            self._bytes += part.tag
            self._slots.append((part.name, len(self._bytes), part.width))
            self._bytes += bytes(part.width)
        elif isinstance(part, Fixed):
            if part.count:
                self._fixed.append((part.name, len(self._bytes), part.count, len(part.tag)))
                self._bytes += (part.tag + bytes(8)) * part.count
        else:
            self._bytes += part.tag + varint(sum(map(_size, part.parts)))
            for inner in part.parts:
                self._add(inner)

    def fill(self, values: dict[str, np.ndarray], count: int) -> np.ndarray:
        """``count`` messages as uint8 [count, size]; a slot's values are integers [count], those of
        a repeated fixed64 [count, its number]."""
        out = np.empty((count, self.size), np.uint8)
        out[:] = np.frombuffer(bytes(self._bytes), np.uint8)
        rows = out.reshape(-1).view(self._dtype)
        for name, at, width in self._slots:
            rows[f"{name}@{at}"] = spread(values[name], width)
        for name, *_ in self._fixed:
            rows[name]["id"] = values[name]
        return out


def words(parts_of: Callable[..., Sequence[Part]], *args: object) -> Template:
    """A template whose size is whole words; ``parts_of(pad, *args)`` lays it out with ``pad`` bytes
    more than it needs."""
    short = Template(parts_of(0, *args)).size
    pad = -short % WORD
    template = Template(parts_of(pad, *args))
    # A pad may lengthen a message's own length varint by a byte: then one pad less or more fits.
    while template.size % WORD:
        pad += 1
        template = Template(parts_of(pad, *args))
    return template

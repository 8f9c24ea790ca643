"""Moves that change no bit: stretches of files end to end, copied inside the kernel, where the bytes need not pass through this
process, or gathered in memory where they are short; and columns, side by side. Knows no torch."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

MIN_EXTENT_BYTES = 16 * 2**10
"""Shorter stretches, on average, are quicker to gather in memory."""

_COPY_BYTES = 16 * 2**20  # between two looks of the interpreter at signals
_BLOCK_BYTES = 2**20  # fits the processor's cache
_SHORT_BYTES = 64 * 2**10
_MAX_WASTE = 4  # how many times the bytes of columns may be read
_NOT_HERE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


@dataclass(frozen=True, slots=True)
class Extent:
    """``length`` bytes of an open file from ``position``."""

    descriptor: int
    position: int
    length: int


@dataclass(frozen=True, slots=True)
class Columns:
    """Of each of ``count`` rows of an open file, ``step`` bytes apart, the same ``length`` bytes; the first ones from
    ``position``."""

    descriptor: int
    position: int
    length: int
    step: int
    count: int


def cut(extents: Iterable[Extent], start: int, length: int) -> Iterator[Extent]:
    """The bytes [start, start + length) of the extents laid end to end."""
    for extent in extents:
        begin, stop = max(start, 0), min(start + length, extent.length)
        if begin < stop:
            yield Extent(extent.descriptor, extent.position + begin, stop - begin)
        start -= extent.length


def put(extents: Sequence[Extent], descriptor: int, position: int) -> int:
    """Write them end to end from ``position`` on; their bytes. ValueError when a file ends before its extent does."""
    is_long = sum(extent.length for extent in extents) >= MIN_EXTENT_BYTES * len(extents)
    return (copy if is_long else gather)(extents, descriptor, position)


def copy(extents: Iterable[Extent], descriptor: int, position: int) -> int:
    """``put`` inside the kernel."""
    begin = position
    for extent in extents:
        done = 0
        while done < extent.length:
            count = min(_COPY_BYTES, extent.length - done)
            moved = _move(extent.descriptor, extent.position + done, descriptor, position, count)
            if not moved:
                raise _cut_short(extent.descriptor, extent.position + done)
            done += moved
            position += moved
    return position - begin


def gather(extents: Sequence[Extent], descriptor: int, position: int) -> int:
    """``put`` through memory."""
    begin, filled = position, 0
    buffer = memoryview(bytearray(min(_BLOCK_BYTES, sum(extent.length for extent in extents))))
    for extent in extents:
        done = 0
        while done < extent.length:
            count = min(len(buffer) - filled, extent.length - done)
            _fill(extent.descriptor, buffer[filled : filled + count], extent.position + done)
            done, filled = done + count, filled + count
            if filled == len(buffer):
                position += write_all(descriptor, buffer, position)
                filled = 0
    return position + write_all(descriptor, buffer[:filled], position) - begin


def put_columns(sides: Sequence[Columns], descriptor: int, position: int) -> int:
    """Write rows that consist of the same row of every side, one beside the other, from ``position`` on; their bytes."""
    begin, count, width = position, sides[0].count, sum(side.length for side in sides)
    rows = max(1, _BLOCK_BYTES // max(width, *(side.step for side in sides)))
    for first in range(0, count, rows):
        block = np.empty((min(rows, count - first), width), np.uint8)
        left = 0
        for side in sides:
            _read_columns(side, first, block[:, left : left + side.length])
            left += side.length
        position += write_all(descriptor, memoryview(block).cast("B"), position)
    return position - begin


def _read_columns(side: Columns, first: int, target: np.ndarray[tuple[int, int], np.dtype[np.uint8]]) -> None:
    """The rows from ``first`` on. Short pieces of rows are cut out of whole rows: a call each takes longer."""
    begin, rows = side.position + first * side.step, len(target)
    if side.length < _SHORT_BYTES and side.step <= side.length * _MAX_WASTE:
        raw = np.empty(rows * side.step, np.uint8)
        _fill(side.descriptor, memoryview(raw)[: (rows - 1) * side.step + side.length], begin)
        target[:] = raw.reshape(rows, side.step)[:, : side.length]
        return
    for row in range(rows):
        _fill(side.descriptor, memoryview(target[row]), begin + row * side.step)


def write_all(descriptor: int, data: memoryview, position: int) -> int:
    """Write everything; its bytes."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], position + done)
    return done


def _move(source: int, start: int, target: int, position: int, count: int) -> int:
    try:
        moved = os.copy_file_range(source, target, count, start, position)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
        moved = 0
    if moved:
        return moved
    # Across file systems, or where the file system does not offer it.
    return write_all(target, memoryview(os.pread(source, min(count, _BLOCK_BYTES), start)), position)


def _fill(descriptor: int, buffer: memoryview, position: int) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], position + done)
        if not count:
            raise _cut_short(descriptor, position + done)
        done += count


def _cut_short(descriptor: int, position: int) -> ValueError:
    name = os.readlink(f"/proc/self/fd/{descriptor}")
    return ValueError(f"{name} ended at byte {position} while it was read")

"""Moves that change no bit: which stretches of which files make up a block, found out by giving the tables row numbers for
weights; and copying them inside the kernel, where the bytes need not pass through this process."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from converters.plan import Parameter
from rlx.models.architecture import Architecture
from rlx.models.weights import Shard

MIN_EXTENT_BYTES = 16 * 2**10
"""Shorter stretches, on average, are quicker to gather in memory."""

_COPY_BYTES = 16 * 2**20  # between two looks of the interpreter at signals
_BLOCK_BYTES = 2**20
_NOT_HERE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


@dataclass(frozen=True, slots=True)
class Extent:
    """``length`` bytes of an open file from ``position``."""

    descriptor: int
    position: int
    length: int


class _NotRows(Exception):
    """A slice that is not made of whole rows."""


class RowNumbers:
    """What a row of a table does to the rows of its tensors. Numbers count from 0 through all tensors of one side, with one
    left out after each tensor, so that neighbours in number are neighbours in a file."""

    def __init__(self, arch: Architecture) -> None:
        self._arch = arch
        self._known: dict[tuple[object, Shard], Tensor | None] = {}

    def loaded(self, parameter: Parameter, shard: Shard) -> Tensor | None:
        """For each row of the Megatron slice [rows, 1, ...] the number of its Hugging Face row; None if it is not made of
        whole rows. Padding rows, which come last, have number 0."""
        key = (parameter.row, shard)
        if key not in self._known:
            self._known[key] = self._load(parameter, shard)
        return self._known[key]

    def exported(self, parameter: Parameter, num_rows: int) -> Sequence[Tensor]:
        """For each row of each Hugging Face tensor the number of its Megatron row, of ``num_rows``."""
        ones = [1] * (len(parameter.hf_shapes[0]) - 1)
        return parameter.row.export([torch.arange(num_rows).view(-1, *ones)], self._arch)

    def _load(self, parameter: Parameter, shard: Shard) -> Tensor | None:
        firsts = dict(zip(parameter.hf_names, accumulate((s[0] + 1 for s in parameter.hf_shapes), initial=0), strict=False))
        shapes = dict(zip(parameter.hf_names, parameter.hf_shapes, strict=True))

        def read(name: str, dim: int, start: int, stop: int) -> Tensor:
            shape = shapes[name]
            if dim:
                if (start, stop) != (0, shape[dim]):
                    raise _NotRows
                start, stop = 0, shape[0]
            return torch.arange(firsts[name] + start, firsts[name] + stop).view(-1, *[1] * (len(shape) - 1))

        try:
            return parameter.row.load(read, parameter.hf_names, shard, self._arch)
        except _NotRows:
            return None


def stretches(numbers: Tensor) -> Iterator[tuple[int, int]]:
    """(first, count) of the runs of consecutive numbers, in order."""
    flat = numbers.reshape(-1)
    borders = (torch.nonzero(flat[1:] - flat[:-1] != 1).reshape(-1) + 1).tolist()
    for start, stop in zip([0, *borders], [*borders, flat.numel()], strict=True):
        yield int(flat[start]), stop - start


def cut(extents: Iterable[Extent], start: int, length: int) -> Iterator[Extent]:
    """The bytes [start, start + length) of the extents laid end to end."""
    for extent in extents:
        begin, stop = max(start, 0), min(start + length, extent.length)
        if begin < stop:
            yield Extent(extent.descriptor, extent.position + begin, stop - begin)
        start -= extent.length


def worth_copying(extents: Sequence[Extent]) -> bool:
    """Whether copying in the kernel is quicker than gathering in memory."""
    return sum(extent.length for extent in extents) >= MIN_EXTENT_BYTES * len(extents)


def copy(extents: Iterable[Extent], descriptor: int, position: int) -> int:
    """Write them end to end from ``position`` on; their bytes. ValueError when a file ends before its extent does."""
    begin = position
    for extent in extents:
        done = 0
        while done < extent.length:
            count = min(_COPY_BYTES, extent.length - done)
            moved = _move(extent.descriptor, extent.position + done, descriptor, position, count)
            if not moved:
                name = os.readlink(f"/proc/self/fd/{extent.descriptor}")
                raise ValueError(f"{name} ended at byte {extent.position + done} while it was read")
            done += moved
            position += moved
    return position - begin


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


def write_all(descriptor: int, data: memoryview, position: int) -> int:
    """Write everything; its bytes."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], position + done)
    return done

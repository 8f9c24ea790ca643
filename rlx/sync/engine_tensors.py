"""A stream of trainers' tensors as engines want them: matrices that engines hold in FP8 become blocks of 8 bits and their scales.

A block's scale is its largest magnitude / 448, the largest number of the type, so its numbers use all of the range; a block of
zeros has the scale 1. A matrix is converted alone, in stretches of rows, so little exists beside it and its result.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlx.arch.engine_format import BLOCK, EngineFormat, scale_name, scale_shape

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
# Of a matrix in fp32 at a time; a row of blocks at least.
_STRETCH = 2**24


@torch.no_grad()
def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, columns] of any type as numbers of 8 bits in the same shape, and the fp32 scales of its blocks, by which
    they are multiplied."""
    rows, columns = weight.shape
    blocks = torch.empty(rows, columns, dtype=FP8, device=weight.device)
    scales = torch.empty(scale_shape((rows, columns)), dtype=torch.float32, device=weight.device)
    for start, stop in _stretches(rows, columns):
        part = _by_block(weight[start:stop].float())
        scale = part.abs().amax((1, 3)) / LARGEST
        scale.masked_fill_(scale == 0, 1.0)
        part = (part / scale[:, None, :, None]).clamp_(-LARGEST, LARGEST)
        blocks[start:stop] = part.flatten(2).flatten(0, 1)[: stop - start, :columns].to(FP8)
        scales[start // BLOCK : -(-stop // BLOCK)] = scale
    return blocks, scales


@torch.no_grad()
def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that an engine computes with, multiplied in fp32."""
    rows, columns = blocks.shape
    found = torch.empty(rows, columns, dtype=dtype, device=blocks.device)
    for start, stop in _stretches(rows, columns):
        scale = scales[start // BLOCK : -(-stop // BLOCK)].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        found[start:stop] = blocks[start:stop].float() * scale[: stop - start, :columns]
    return found


class EngineTensors:
    """``tensors`` (Hugging Face name, tensor) in an engine's format: a converted one as two, one after the other.

    An iterator that an exception does not end, as it does a generator: gathers are collective, and whoever fails drives the rest
    to its end.
    """

    def __init__(self, tensors: Iterator[tuple[str, Tensor]], format: EngineFormat) -> None:
        self._tensors, self._format = tensors, format
        self._scales: tuple[str, Tensor] | None = None

    def __iter__(self) -> EngineTensors:
        return self

    def __next__(self) -> tuple[str, Tensor]:
        if self._scales is not None:
            named, self._scales = self._scales, None
            return named
        name, tensor = next(self._tensors)
        if name not in self._format.converted:
            return name, tensor
        blocks, scales = quantize(tensor.detach())
        self._scales = scale_name(name), scales
        return name, blocks


def _stretches(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, _STRETCH // max(1, columns) // BLOCK) * BLOCK
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _by_block(part: Tensor) -> Tensor:
    """[rows, columns] as [block, row in it, block, column in it]; zeros fill the last ones up."""
    rows, columns = part.shape
    if rows % BLOCK or columns % BLOCK:
        part = torch.nn.functional.pad(part, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return part.view(-1, BLOCK, part.shape[1] // BLOCK, BLOCK)

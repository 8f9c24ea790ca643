"""Weights that change their type on the way, by torch. Imported when the first of them comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from converters.items import Position
from converters.plan import Part
from rlx.arch.architecture import Architecture
from rlx.models.hf.folder import HfFolder, torch_dtype
from rlx.models.hf.row_tensors import load

torch.set_num_threads(1)  # the workers are the parallelism


class Casts:
    """Reads a Hugging Face folder."""

    def __init__(self, source: Path, arch: Architecture) -> None:
        self._source, self._arch = HfFolder(source), arch

    def blocks(self, part: Part, stored: Sequence[tuple[Position, str]]) -> Iterator[memoryview]:
        """The bytes of the blocks, of these shapes and types, that make up the part. Padding, which comes last, is left out."""
        value = load(part.parameter.row, self._source.read, part.parameter.hf_names, part.shard, self._arch)
        slices = value.chunk(len(stored)) if len(stored) > 1 else (value,)
        for (shape, dtype), slice_ in zip(stored, slices, strict=True):
            kept = slice_.narrow(part.axis, 0, shape[len(shape) - slice_.dim() + part.axis])
            yield memoryview(kept.to(torch_dtype(dtype)).contiguous().view(-1).view(torch.uint8).numpy())

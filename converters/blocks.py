"""Blocks of a torch_dist checkpoint as tensors, and the Hugging Face tensors that they make up."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from converters.export import Exporter
from converters.items import Position
from converters.plan import Parameter
from converters.storage import Chunk, StoredCheckpoint
from rlx.arch.weights import Vocab
from rlx.models.hf.files import row_blocks
from rlx.models.hf.folder import torch_dtype
from rlx.models.hf.row_tensors import export

torch.set_num_threads(1)  # the workers are the parallelism


class Blocks:
    """What ``exporter`` exports, by way of memory."""

    def __init__(self, exporter: Exporter) -> None:
        self._exporter, self._stored = exporter, exporter.stored

    def of(self, parameter: Parameter) -> Iterator[tuple[str, int, Tensor]]:
        """(name, first row, rows) of the parameter's tensors: large vocabularies block by block, the others whole."""
        pieces = self._exporter.places[parameter.hf_names]
        if isinstance(parameter.row, Vocab):
            name, shape = parameter.hf_names[0], parameter.hf_shapes[0]
            for start, stop in row_blocks(shape, parameter.num_elements * 4):
                block = read(self._stored, pieces[0].key, (start, 0), (stop - start, shape[1]))
                yield name, start, block.to(torch_dtype(self._exporter.dtype(name, parameter)))
            return
        halves = [read(self._stored, piece.key, piece.offset, piece.shape) for piece in pieces]
        plain = [half.reshape(half.shape[piece.num_prepended :]) for half, piece in zip(halves, pieces, strict=True)]
        whole = plain[0] if len(plain) == 1 else torch.cat(plain)
        for name, tensor in zip(parameter.hf_names, export(parameter.row, [whole], self._exporter.arch), strict=True):
            yield name, 0, tensor.to(torch_dtype(self._exporter.dtype(name, parameter))).contiguous()

    def bytes_of(self, parameter: Parameter) -> Iterator[tuple[str, int, memoryview]]:
        """The same as (name, first byte, bytes)."""
        for name, row, block in self.of(parameter):
            content = memoryview(block.view(-1).view(torch.uint8).numpy())
            yield name, row * (len(content) // max(1, block.shape[0])), content


def read(stored: StoredCheckpoint, key: str, offset: Position, shape: Position) -> Tensor:
    """The block of ``shape`` at ``offset``. ValueError when it is not all there."""
    result = torch.empty(shape, dtype=torch_dtype(stored.tensors[key].dtype))
    filled = sum(_copy(stored, chunk, offset, result) for chunk in stored.chunks(key, offset, shape))
    if filled != math.prod(shape):
        raise ValueError(f"{stored.folder}: {key} is not whole at {list(offset)}: {filled} of {math.prod(shape)} elements")
    return result


def _copy(stored: StoredCheckpoint, chunk: Chunk, offset: Position, result: Tensor) -> int:
    begins = [max(a, b) for a, b in zip(offset, chunk.offset, strict=True)]
    ends = [min(a + n, b + m) for a, n, b, m in zip(offset, result.shape, chunk.offset, chunk.shape, strict=True)]
    source = tuple(slice(b - o, e - o) for b, e, o in zip(begins, ends, chunk.offset, strict=True))
    target = tuple(slice(b - o, e - o) for b, e, o in zip(begins, ends, offset, strict=True))
    result[target] = _load(stored, chunk)[source]
    return math.prod(end - begin for begin, end in zip(begins, ends, strict=True))


def _load(stored: StoredCheckpoint, chunk: Chunk) -> Tensor:
    path, window = stored.folder / chunk.file, stored.window(chunk)
    stream: Any = window
    try:
        tensor: Tensor = torch.load(stream, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is broken at byte {chunk.position}, in {chunk.key}: {error}") from error
    if tensor.shape != chunk.shape:
        raise ValueError(f"{path}: a part of {chunk.key} has shape {tuple(tensor.shape)}, expected {chunk.shape}")
    return tensor

"""Hugging Face tensors out of a Megatron checkpoint: of which type, where their bytes lie, and those that only come about in
memory."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from converters.extents import cut, put, put_columns
from converters.items import Write
from converters.plan import Parameter, Piece, Places, Position, exported_rows
from converters.storage import Chunk, StoredCheckpoint
from rlx.arch.architecture import Architecture
from rlx.arch.weights import Vocab
from rlx.models.hf.files import row_blocks
from rlx.models.hf.folder import torch_dtype
from rlx.models.hf.row_tensors import export


class Exporter:
    """Finds parameters by their pieces; ``dtypes`` are the tensors' own types where they differ from what is stored."""

    def __init__(self, stored: StoredCheckpoint, arch: Architecture, places: Places, dtypes: Mapping[str, str]) -> None:
        self.stored, self.arch, self.places, self._dtypes = stored, arch, places, dtypes

    def problems(self) -> Iterator[str]:
        """What the checkpoint lacks of the model."""
        seen = set()
        for pieces in self.places.values():
            for piece in pieces:
                if piece.key in seen:
                    continue
                seen.add(piece.key)
                found = self.stored.tensors.get(piece.key)
                if found is None:
                    yield f"{self.stored.folder} has no tensor {piece.key}, which config.json implies"
                elif found.shape != piece.global_shape and not self._is_padded(found.shape, piece):
                    yield (
                        f"{self.stored.folder}: {piece.key} has shape {list(found.shape)},"
                        f" config.json implies {list(piece.global_shape)}"
                    )

    def dtype(self, name: str, parameter: Parameter) -> str:
        """The type of an exported tensor: what was noted, or else what is stored."""
        return self._dtypes.get(name) or self.stored.tensors[self.places[parameter.hf_names][0].key].dtype

    def writes(self, parameter: Parameter) -> dict[str, Write] | None:
        """What writes each of the parameter's tensors; None when they only come about in memory."""
        pieces = self.places[parameter.hf_names]
        stored = self.stored.tensors[pieces[0].key].dtype
        if any(self.dtype(name, parameter) != stored for name in parameter.hf_names):
            return None
        num_rows = sum(piece.shape[piece.num_prepended] for piece in pieces)
        rows = exported_rows(parameter, self.arch)
        parts = [self.stored.extents(piece) for piece in pieces]
        if None in parts:
            is_one = len(pieces) == 1 and rows == [[(0, num_rows)]]
            sides = self.stored.columns(pieces[0]) if is_one else None
            return None if sides is None else {parameter.hf_names[0]: partial(put_columns, sides)}
        whole = [extent for part in parts for extent in part or ()]
        row_bytes = sum(extent.length for extent in whole) // num_rows
        found: dict[str, Write] = {}
        for name, spans in zip(parameter.hf_names, rows, strict=True):
            own = [extent for first, count in spans for extent in cut(whole, first * row_bytes, count * row_bytes)]
            found[name] = partial(put, own)
        return found

    def blocks(self, parameter: Parameter) -> Iterator[tuple[str, int, Tensor]]:
        """(name, first row, rows) of the parameter's tensors: large vocabularies block by block, the others whole."""
        pieces = self.places[parameter.hf_names]
        if isinstance(parameter.row, Vocab):
            name, shape = parameter.hf_names[0], parameter.hf_shapes[0]
            for start, stop in row_blocks(shape, parameter.num_elements * 4):
                block = _read(self.stored, pieces[0].key, (start, 0), (stop - start, shape[1]))
                yield name, start, block.to(torch_dtype(self.dtype(name, parameter)))
            return
        halves = [_read(self.stored, piece.key, piece.offset, piece.shape) for piece in pieces]
        plain = [half.reshape(half.shape[piece.num_prepended :]) for half, piece in zip(halves, pieces, strict=True)]
        whole = plain[0] if len(plain) == 1 else torch.cat(plain)
        for name, tensor in zip(parameter.hf_names, export(parameter.row, [whole], self.arch), strict=True):
            yield name, 0, tensor.to(torch_dtype(self.dtype(name, parameter))).contiguous()

    def block_bytes(self, parameter: Parameter) -> Iterator[tuple[str, int, memoryview]]:
        """The same as (name, first byte, bytes)."""
        for name, row, block in self.blocks(parameter):
            content = memoryview(block.view(-1).view(torch.uint8).numpy())
            yield name, row * (len(content) // max(1, block.shape[0])), content

    def _is_padded(self, shape: tuple[int, ...], piece: Piece) -> bool:
        """A vocabulary as a training run leaves it, padded for its layout."""
        is_vocabulary = piece.key.endswith(("word_embeddings.weight", "output_layer.weight"))
        return is_vocabulary and shape[0] >= piece.global_shape[0] and shape[1:] == piece.global_shape[1:]


def _read(stored: StoredCheckpoint, key: str, offset: Position, shape: Position) -> Tensor:
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

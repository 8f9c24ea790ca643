"""Hugging Face tensors out of a Megatron checkpoint, one parameter at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from converters.extents import Extent, cut
from converters.places import Piece, Places
from converters.plan import Parameter, exported_rows
from converters.source import row_blocks
from converters.storage import StoredCheckpoint
from rlx.models.architecture import Architecture
from rlx.models.hf_folder import torch_dtype
from rlx.models.row_tensors import export
from rlx.models.weights import Vocab


class Exporter:
    """Reads parameters by their pieces and turns them into Hugging Face tensors of the types in ``dtypes``."""

    def __init__(self, stored: StoredCheckpoint, arch: Architecture, places: Places, dtypes: Mapping[str, str]) -> None:
        self._stored, self._arch, self._places, self._dtypes = stored, arch, places, dtypes

    def problems(self) -> Iterator[str]:
        """What the checkpoint lacks of the model."""
        seen = set()
        for pieces in self._places.values():
            for piece in pieces:
                if piece.key in seen:
                    continue
                seen.add(piece.key)
                found = self._stored.tensors.get(piece.key)
                if found is None:
                    yield f"{self._stored.folder} has no tensor {piece.key}, which config.json implies"
                elif found.shape != piece.global_shape and not self._is_padded(found.shape, piece):
                    yield (
                        f"{self._stored.folder}: {piece.key} has shape {list(found.shape)},"
                        f" config.json implies {list(piece.global_shape)}"
                    )

    def dtype(self, name: str, parameter: Parameter) -> str:
        """The type of an exported tensor: what was noted, or else what is stored."""
        return self._dtypes.get(name) or self._stored.tensors[self._places[parameter.hf_names][0].key].dtype

    def extents(self, parameter: Parameter) -> dict[str, list[Extent]] | None:
        """Where the bytes of the parameter's tensors lie, by name; None when they only come about in memory."""
        pieces, parts = self._places[parameter.hf_names], []
        stored = self._stored.tensors[pieces[0].key].dtype
        if any(self.dtype(name, parameter) != stored for name in parameter.hf_names):
            return None
        for piece in pieces:
            part = self._stored.extents(piece)
            if part is None:
                return None
            parts += part
        num_rows = sum(piece.shape[piece.num_prepended] for piece in pieces)
        row_bytes = sum(extent.length for extent in parts) // num_rows
        found = {}
        for name, rows in zip(parameter.hf_names, exported_rows(parameter, self._arch), strict=True):
            found[name] = [extent for first, count in rows for extent in cut(parts, first * row_bytes, count * row_bytes)]
        return found

    def blocks(self, parameter: Parameter) -> Iterator[tuple[str, int, Tensor]]:
        """(name, first row, rows) of the parameter's tensors: large vocabularies block by block, the others whole."""
        pieces = self._places[parameter.hf_names]
        if isinstance(parameter.row, Vocab):
            name, shape = parameter.hf_names[0], parameter.hf_shapes[0]
            for start, stop in row_blocks(shape, parameter.num_elements * 4):
                block = self._stored.read(pieces[0].key, (start, 0), (stop - start, shape[1]))
                yield name, start, block.to(torch_dtype(self.dtype(name, parameter)))
            return
        halves = [self._stored.read(piece.key, piece.offset, piece.shape) for piece in pieces]
        plain = [half.reshape(half.shape[piece.num_prepended :]) for half, piece in zip(halves, pieces, strict=True)]
        whole = plain[0] if len(plain) == 1 else torch.cat(plain)
        for name, tensor in zip(parameter.hf_names, export(parameter.row, [whole], self._arch), strict=True):
            yield name, 0, tensor.to(torch_dtype(self.dtype(name, parameter))).contiguous()

    def _is_padded(self, shape: tuple[int, ...], piece: Piece) -> bool:
        """A vocabulary as a training run leaves it, padded for its layout."""
        is_vocabulary = piece.key.endswith(("word_embeddings.weight", "output_layer.weight"))
        return is_vocabulary and shape[0] >= piece.global_shape[0] and shape[1:] == piece.global_shape[1:]

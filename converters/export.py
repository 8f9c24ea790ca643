"""Hugging Face tensors out of a Megatron checkpoint: of which type, and where their bytes lie. Knows no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from converters.extents import cut, put, put_columns
from converters.items import Write
from converters.places import Piece, Places
from converters.plan import Parameter, exported_rows
from converters.storage import StoredCheckpoint
from rlx.arch.architecture import Architecture


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

    def _is_padded(self, shape: tuple[int, ...], piece: Piece) -> bool:
        """A vocabulary as a training run leaves it, padded for its layout."""
        is_vocabulary = piece.key.endswith(("word_embeddings.weight", "output_layer.weight"))
        return is_vocabulary and shape[0] >= piece.global_shape[0] and shape[1:] == piece.global_shape[1:]
